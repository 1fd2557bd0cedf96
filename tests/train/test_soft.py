"""Training on a teacher's distributions: against hard targets and a plain loop, on two ranks, and killed."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from helpers.ranks import run_ranks
from helpers.scores import write_scores
from helpers.training_runs import (
    checkpoint_steps,
    clipped_step,
    finish,
    flip,
    kill,
    metrics,
    result,
    start_training,
    train_config,
    wait_until,
    weights_of,
)
from micota_fast.config.loader import identity
from micota_fast.config.train import SoftConfig, TrainConfig
from micota_fast.data.batches import PackedSteps
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.sources.top_logprobs import TopLogprobs
from micota_fast.train.loop import train
from micota_fast.train.prepare import load_documents
from micota_fast.train.world import World


def soft_config(checkpoint: Path, folder: Path, top_k: int | None, **soft: Any) -> TrainConfig:
    """The usual run on scores of a random teacher."""
    plain = train_config(checkpoint, folder, out=str(folder / "soft"))
    return replace(plain, soft=SoftConfig(**soft), top_logprobs=str(write_scores(plain, folder / "scores", top_k)))


def test_one_token_of_probability_1_trains_as_hard_targets_do_to_the_bit(
    qwen2_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soft = soft_config(qwen2_checkpoint, tmp_path, 0, alpha=1.0, tail="ignore")
    hard = train_config(qwen2_checkpoint, tmp_path)
    train(soft)
    assert "supervised tokens, with the teacher's 1 likeliest" in capfd.readouterr().out
    train(hard)
    assert metrics(soft) == metrics(hard)
    for name, tensor in weights_of(hard).items():
        assert torch.equal(tensor, weights_of(soft)[name])


@pytest.mark.parametrize(
    "how",
    [
        {"tail": "bucket"},
        {"alpha": 0.6, "tail": "ignore", "temperature": 2.0},
        {"alpha": 0.7, "divergence": "reverse"},
    ],
)
def test_ten_steps_equal_a_plain_loop_on_the_whole_distribution(
    how: dict[str, Any], qwen2_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers' model and torch's own divergence over the vocabulary, one document at a time."""
    config = replace(soft_config(qwen2_checkpoint, tmp_path, None, **how), epochs=3.0, max_steps=10)
    train(config)
    assert config.soft is not None
    warned = "only right on answers that this student has sampled itself" in capfd.readouterr().out
    assert warned == (config.soft.divergence == "reverse")
    alpha, temperature = config.soft.alpha, config.soft.temperature
    documents, _ = load_documents(config, resolve_checkpoint(config.model), tmp_path, World(0, 1, torch.device("cpu")))
    assert documents.scores is not None
    steps = PackedSteps(documents, config.pack_tokens, config.packs_per_step, seed=config.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rows = metrics(config)
    assert len(rows) == 10
    for step, row in enumerate(rows):
        total, count, estimates = torch.zeros(()), 0, []
        for d in [d for batch in steps.step(step).batches for d in batch.doc_ids]:
            span = slice(documents.offsets[d], documents.offsets[d + 1])
            tokens = torch.from_numpy(documents.input_ids[span]).long()
            logits = model(tokens[None, :-1]).logits[0]
            supervised = torch.from_numpy(documents.supervised[span])[1:]
            answer, nll = (
                logits[supervised],
                F.cross_entropy(logits[supervised], tokens[1:][supervised], reduction="none"),
            )
            scored = documents.scores.store[documents.scores.places[d].key]
            n = len(scored.token_ids_T)
            assert n == len(answer) - 1, "the end of the turn has no score"
            teacher = torch.empty(n, answer.shape[1]).scatter_(
                1,
                torch.from_numpy(scored.top_ids_TK.astype(np.int64)),
                torch.from_numpy(scored.top_logprobs_TK.astype(np.float32)),
            )
            teacher = (teacher / temperature).log_softmax(1)
            student = (answer[:n] / temperature).log_softmax(1)
            divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
            if config.soft.divergence == "reverse":  # this value, with the policy gradient's
                estimate = (-nll[:n] - torch.from_numpy(scored.token_logprobs_T.copy())).detach()
                divergence = estimate - estimate * (nll[:n] - nll[:n].detach())
                estimates.append(estimate)
            total = total + (alpha * temperature**2 * divergence + (1 - alpha) * nll[:n]).sum() + nll[n:].sum()
            count += len(answer)
        loss = total / count
        loss.backward()
        norm = clipped_step(model, optimizer, config.max_grad_norm, row["lr"])
        assert row["loss"] == pytest.approx(loss.item(), abs=2e-5)
        if estimates:
            assert row["reverse_kl"] == pytest.approx(torch.cat(estimates).mean().item(), abs=2e-5)
        else:
            assert "reverse_kl" not in row
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for name, ours in weights_of(config).items():
        torch.testing.assert_close(ours, model.state_dict()[name], rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_two_killed_ranks_resume_to_the_same_bits(divergence: str, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """With whole blocks computed again; and to those of one process, up to rounding."""
    soft = soft_config(qwen2_checkpoint, tmp_path, 4, divergence=divergence)
    one = replace(soft, activation_checkpointing="full")
    train(one)
    two, killed = (replace(one, out=str(tmp_path / name), checkpoint_every=2) for name in ("two", "killed"))
    finish(start_training(two, world=2), two)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("reverse_kl") == pytest.approx(b.get("reverse_kl"), abs=1e-5)
    processes = start_training(killed, world=2)
    wait_until(lambda: len(checkpoint_steps(killed)) > 0, processes)
    kill(processes)
    assert len(metrics(killed)) < len(metrics(two))
    finish(start_training(killed, world=2), killed)
    assert "resuming after step" in Path(f"{killed.out}.log").read_text()
    assert result(killed)[0] == result(two)[0]


@pytest.mark.slow
def test_compiled_blocks_train_on_distributions_as_well(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    eager = replace(soft_config(qwen2_checkpoint, tmp_path, 4), max_steps=1)
    compiled = replace(eager, compile=True, out=str(tmp_path / "compiled"))
    train(eager)
    train(compiled)
    for a, b in zip(metrics(eager), metrics(compiled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_another_store_is_another_run_and_a_damaged_one_is_refused(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = replace(soft_config(qwen2_checkpoint, tmp_path, 4), max_steps=1)
    assert train(config)
    assert train(config), "finished already"
    other = replace(config, top_logprobs=str(write_scores(config, tmp_path / "others", 3)))
    with pytest.raises(InputError, match=r"holds the result of another run .*top_logprobs"):
        train(other)
    assert config.top_logprobs is not None
    flip(Path(config.top_logprobs) / "000000.safetensors")
    with pytest.raises(InputError, match=r"000000\.safetensors: tensor \w+ does not match its checksum"):
        train(replace(config, out=str(tmp_path / "again")))


def _damaged_for_all(world: World, config: TrainConfig, folder: Path) -> None:
    read = []
    with pytest.MonkeyPatch.context() as patch:
        verify = TopLogprobs.verify
        patch.setattr(TopLogprobs, "verify", lambda store: (read.append(world.rank), verify(store)))
        with pytest.raises(InputError, match=r"^rank 0: .*000000\.safetensors: tensor \w+ does not match its checksum"):
            load_documents(config, resolve_checkpoint(config.model), folder, world)
    assert read == [0] * (world.rank == 0)


def test_one_rank_reads_the_whole_store_and_all_end_with_what_it_found(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = soft_config(qwen2_checkpoint, tmp_path, 4)
    assert config.top_logprobs is not None
    flip(Path(config.top_logprobs) / "000000.safetensors")
    run_ranks(2, _damaged_for_all, tmp_path / "log", config, tmp_path)


def test_runs_without_distributions_keep_their_identity() -> None:
    plain = TrainConfig(model="m", data="d", out="o")
    assert {"soft", "top_logprobs"}.isdisjoint(identity(plain))
    soft = replace(plain, soft=SoftConfig(), top_logprobs="scores")
    assert identity(soft)["soft"] == {"alpha": 0.9, "temperature": 1.0, "tail": "bucket"}
    reverse = replace(soft, soft=SoftConfig(divergence="reverse"))
    assert identity(reverse)["soft"] == identity(soft)["soft"] | {"divergence": "reverse"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft": SoftConfig()}, "set both `soft` .how to train on distributions. and `top_logprobs`"),
        ({"top_logprobs": "scores"}, "set both `soft` .how to train on distributions. and `top_logprobs`"),
        ({"soft": SoftConfig(), "top_logprobs": "s", "row_filter": 0.1}, "`row_filter` with `soft`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(model="m", data="d", out="o", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "`alpha` must be above 0 and at most 1"),
        ({"alpha": math.nan}, "`alpha` must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"temperature": 2.0}, "`temperature: 2.0` needs `tail: ignore`"),
        ({"divergence": "reverse", "temperature": 2.0}, "`temperature: 2.0` with `divergence: reverse`"),
        ({"divergence": "reverse", "tail": "ignore"}, "`tail: ignore` with `divergence: reverse`"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftConfig(**options)
