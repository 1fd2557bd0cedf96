"""Against transformers' Trainer on the same packs, and documents with weights against a plain loop in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import SequentialSampler

from helpers.training_runs import clipped_step, finish, metrics, start_training, train_config, weights_of, write_corpus
from micota_fast.chat.encoding import Chat
from micota_fast.config.train import TrainConfig
from micota_fast.data.batches import PackedBatch, PackedSteps
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.train.loop import train


def plan_steps(config: TrainConfig) -> tuple[Documents, PackedSteps]:
    documents = load_documents(config.data, Chat.from_checkpoint(config.model, config.chat), config.pack_tokens)
    return documents, PackedSteps(documents, config.pack_tokens, config.packs_per_step, seed=config.seed)


def hf_model(config: TrainConfig, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, use_cache=False)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def as_transformers_wants(pack: PackedBatch) -> dict[str, Tensor]:
    """Labels stand where the token stands, and positions that begin again tell where a document does."""
    labels_T = pack.targets.roll(1)
    labels_T[0] = -100
    return {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "labels": labels_T}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_equals_transformers_trainer(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its own AdamW, cosine schedule, clipping, accumulation and normalisation."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    write_corpus(tmp_path / "corpus.jsonl", rows=70)
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    config = train_config(checkpoint, tmp_path, max_steps=10, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=0.5)
    train(config)
    _, steps = plan_steps(config)
    packs = [pack for step in range(10) for pack in steps.step(step).batches]
    assert len(packs) == 20, "every step should be a whole one"
    assert min(len(pack.doc_ids) for pack in packs) > 1

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        max_steps=10,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.eps,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = hf_model(config)
    trainer = InOrder(model, arguments, train_dataset=[as_transformers_wants(pack) for pack in packs])
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    for a, b in zip(metrics(config), theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["lr"] == pytest.approx(b["learning_rate"], rel=1e-6)
    assert theirs[0]["loss"] - theirs[-1]["loss"] > 0.5, "it should have learned something"
    assert max(row["grad_norm"] for row in theirs) > 0.5, "clipping should have had something to do"
    expected = model.state_dict()
    for name, ours in weights_of(config).items():
        torch.testing.assert_close(ours, expected[name], rtol=0, atol=5e-5)


def test_no_document_of_theirs_sees_another(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """What makes the comparison above one of like with like."""
    config = train_config(qwen2_checkpoint, tmp_path)
    pack = plan_steps(config)[1].step(0).batches[0]
    first, second = pack.cu_seqlens[1:3].tolist()
    model = hf_model(config)
    with torch.no_grad():
        ids_1T, positions_1T = pack.input_ids[None], pack.position_ids[None]
        together = model(input_ids=ids_1T, position_ids=positions_1T).logits[0]
        alone = model(input_ids=ids_1T[:, first:second]).logits[0]
        changed = ids_1T.clone()
        changed[:, :first] = 5
        torch.testing.assert_close(together[first:second], alone, rtol=0, atol=1e-4)
        assert torch.equal(model(input_ids=changed, position_ids=positions_1T).logits[0, first:], together[first:])


def weighted(config: TrainConfig, weights: list[float]) -> TrainConfig:
    """The same corpus with weights, in turn."""
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["weight"] = weights[number % len(weights)]
    path = Path(config.data).with_name(f"weighted-{weights}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(config, data=str(path), out=f"{config.out}-{weights}")


def test_equal_weights_change_nothing(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    plain = train_config(qwen2_checkpoint, tmp_path)
    train(plain)
    double = weighted(plain, [2.0])
    train(double)
    assert metrics(double) == metrics(plain)
    assert all(torch.equal(tensor, weights_of(plain)[name]) for name, tensor in weights_of(double).items())


@pytest.mark.parametrize("world", [1, 2])
def test_weights_equal_a_plain_loop_in_float64(world: int, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """One document at a time, with transformers' model, whose norms alone are float32 inside."""
    # A larger epsilon than the default: with 1e-8, Adam turns the rounding of a gradient near zero into a whole step.
    plain = train_config(qwen2_checkpoint, tmp_path, weight_decay=0.1, eps=1e-5)
    config = weighted(plain, [0.5, 1.0, 3.0])
    finish(start_training(config, world), config)
    documents, steps = plan_steps(config)
    model = hf_model(config, torch.float64)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, foreach=False)
    for step, row in enumerate(metrics(config)):
        loss, whole = torch.zeros((), dtype=torch.float64), 0.0
        for d in steps.documents(step):
            span = slice(documents.offsets[d], documents.offsets[d + 1])
            tokens = torch.from_numpy(documents.input_ids[span]).long()
            supervised = torch.from_numpy(documents.supervised[span])[1:]
            nll = F.cross_entropy(model(tokens[None, :-1]).logits[0][supervised], tokens[1:][supervised])
            share = [0.5, 1.0, 3.0][d % 3] * int(supervised.sum())
            loss, whole = loss + share * nll, whole + share
        (loss / whole).backward()
        norm = clipped_step(model, optimizer, config.max_grad_norm, row["lr"])
        assert row["loss"] == pytest.approx(loss.item() / whole, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, ours in weights_of(config).items():
        torch.testing.assert_close(ours.double(), model.state_dict()[name], rtol=0, atol=1e-6)
