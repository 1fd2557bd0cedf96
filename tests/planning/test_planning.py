"""The plan of a recipe: by hand on small cases, and against what a real run has left."""

import json
import math
import shutil
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.checkpoints import make_checkpoint
from micota_fast.cli import main
from micota_fast.common.figures import size, two
from micota_fast.common.gpu_specs import GPUS
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig, ServeConfig
from micota_fast.config.recipe import LaunchConfig, Recipe
from micota_fast.config.shipped import RECIPES
from micota_fast.config.train import SoftConfig, TrainConfig
from micota_fast.data.batches import PackedSteps
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.run import Run
from micota_fast.pipeline.stage import Artefact, Stage
from micota_fast.planning.assumptions import Assumptions, shortfall
from micota_fast.planning.costs import answering, train
from micota_fast.planning.overlaps import shared_gpus
from micota_fast.planning.plan import Plan, make_plan, table
from micota_fast.planning.planner import Corpus, Cost, Model, Planner
from micota_fast.planning.shapes import known_shapes, parameters, shapes_of, train_flops, weights_cached
from micota_fast.train.memory import estimate

MICRO = RECIPES / "micro.yaml"
# A run in seconds, and what it leaves to do.
LEFT = ("evaluate/long-seed1", "evaluate/mix-seed1")
MODELS = ("generate", "filter", "mix", "train", "evaluate")
SMALL = (
    "seeds=[1]",
    "arms={long: long, mix: mix}",
    "align=[long]",
    "corpora.mix.mix={long: 1, short: 1}",
    "problems.train.limit=24",
    "train.epochs=1",
    "generate.max_new_tokens=384",
    "evaluate.max_new_tokens=384",
    "evaluate.benchmarks=[{name: press-4, path: ../micro/problems/press-4.jsonl, limit: 12}]",
)


def of_hub(name: str) -> ModelConfig:
    found = known_shapes(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "published"),  # parameters as the models' pages on the hub state them
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-Math-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert parameters(of_hub(name)) == published


def test_what_is_not_known_is_not_guessed() -> None:
    assert known_shapes("Qwen/Qwen2.5-13B-Instruct") is None
    assert known_shapes("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4") is None
    with pytest.raises(InputError, match="no such folder"):
        shapes_of("/nowhere/model")


def test_shapes_are_those_of_the_folder_now(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """A process that plans twice, as a notebook does, sees what was changed in between."""
    folder = shutil.copytree(qwen2_checkpoint, tmp_path / "model")
    before = shapes_of(str(folder))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": raw["vocab_size"] + 8}))
    assert shapes_of(str(folder)).vocab_size == before.vocab_size + 8


def test_training_flops_are_the_trainers(qwen2_checkpoint: Path) -> None:
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    with torch.device("meta"):
        decoder = Decoder(model)
    lengths = np.array([3, 50, 700])
    context = float((lengths**2).sum() / lengths.sum())
    by_document = sum(int(n) * decoder.flops_per_token(int(n)) for n in lengths)
    assert train_flops(model, int(lengths.sum()), context) == pytest.approx(by_document)


def test_answering_by_hand() -> None:
    """An R1-Distill-Qwen-32B on two H100, every figure worked out here from the published shapes."""
    model = Model(of_hub("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"), 4000, "")
    assumed = Assumptions(serve_memory=0.85, decode_bandwidth=0.6, prefill_mfu=0.5, startup_s=100)
    settings = GenerateConfig(
        model="m", problems="p", out="o", max_new_tokens=16384, serve=ServeConfig(engine="sglang", tp=2)
    )
    cost = Cost("answers/long", "generate")
    answering(cost, model, settings, [Corpus(rows=12000, prompt=100, answer=4000, context=4100)], GPUS["h100"], assumed)
    weights, kv = 2 * 32_763_876_352, 2 * 64 * 8 * 128 * 2
    assert cost.tokens == 12000 * 4100
    assert cost.gpus == 2
    assert cost.memory == pytest.approx((weights + (100 + 16384) * kv) / 2)
    batch = (0.85 * 2 * 80e9 - weights) / (4100 * kv)
    read = 2 * 0.6 * 3.35e12
    step = (weights + batch * 4100 * kv) / read
    decoding = 12000 * 4000 / batch * step
    alone = 16384 * (weights + (100 + 16384) * kv / 2) / read
    prefill = 12000 * 100 * 2 * (32_763_876_352 - 152064 * 5120) / (0.5 * 2 * 989e12)
    assert cost.hours == pytest.approx((100 + decoding + alone + prefill) / 3600, rel=1e-3)
    assert f"{batch:.0f} at once" in cost.how


def test_four_servers_take_a_quarter_of_the_time_and_the_same_gpu_hours() -> None:
    model = Model(of_hub("Qwen/Qwen2.5-7B-Instruct"), 600, "")
    sets = [Corpus(rows=40000, prompt=100, answer=4000, context=4100)]
    costs = []
    for serve in (ServeConfig(engine="sglang"), ServeConfig(engine="sglang", replicas=2, dp=2)):
        settings = GenerateConfig(model="m", problems="p", out="o", max_new_tokens=1, serve=serve)
        costs.append(Cost("a", "generate"))
        answering(costs[-1], model, settings, sets, GPUS["h100"], Assumptions(startup_s=0))
    assert [cost.gpus for cost in costs] == [1, 4]
    assert costs[0].hours == pytest.approx(4 * (costs[1].hours or 0), rel=1e-3)


def test_a_model_that_does_not_fit_is_said_not_to() -> None:
    model = Model(of_hub("Qwen/Qwen2.5-32B-Instruct"), 600, "")
    settings = GenerateConfig(model="m", problems="p", out="o", serve=ServeConfig(engine="sglang"))
    cost = Cost("a", "generate")
    answering(cost, model, settings, [Corpus(10, 100, 600, 700)], GPUS["h100"], Assumptions())
    assert cost.hours is None
    # 65.5 GB of weights and 16,484 tokens of 262,144 bytes.
    assert cost.too_big == (
        "69.9 GB on each GPU, which can use 68.0 of its 80.0 GB "
        "(15% is kept free for what a server computes with: `serve_memory`)"
    )
    assert cost.left_out == ["does not fit"]


def of_recipe(name: str, *overrides: str, folder: Path = Path("/nowhere/run"), **options: Any) -> Plan:
    path = RECIPES / f"{name}.yaml"
    return make_plan(loader.load(Recipe, path, overrides), path, folder, **options)


def test_the_paper_recipe_by_hand() -> None:
    """Without data, network or GPU: MiCoTA's 12,000 problems, Qwen2.5's shapes."""
    made = of_recipe("micota-qwen2.5-7b", dollars=2.0)
    costs = {cost.stage: cost for cost in made.costs}
    assert made.gpu == "h100"
    assert made.gpus == 8
    assert len(made.absent) == 6
    lines = table(made, Assumptions()).splitlines()
    assert [line.startswith("Missing: ") for line in lines[:8]] == [True] * 6 + [False] * 2
    assert lines[7].startswith("stage ")
    assert sum(made.downloads.values()) == pytest.approx(2 * (7.6156e9 + 14.77e9 + 2 * 32.7639e9), rel=1e-4)

    long = costs["answers/long"]
    prompt = 200 / 3 + 60
    assert long.tokens == pytest.approx(12000 * (prompt + 4000))
    student = costs["student/long-seed0"]
    assert student.tokens == pytest.approx(2 * 0.85 * 12000 * (prompt + 4000))
    mean = prompt + 4000
    context = mean + (0.7 * 4000) ** 2 / mean
    qwen7 = of_hub("Qwen/Qwen2.5-7B-Instruct")
    with torch.device("meta"):
        assert student.flops == pytest.approx(student.tokens * Decoder(qwen7).flops_per_token(context))
    # Selective checkpointing runs one product of a block, the gate, a second time.
    again = student.tokens * 2 * 28 * 3584 * 18944
    assert student.hours == pytest.approx((student.flops + again) / (8 * 989e12 * 0.4) / 3600)
    assert student.memory == estimate(qwen7, 16384, 8, "selective", torch.bfloat16, "cuda").total
    assert student.disk == 2 * 7_615_616_512
    assert student.passing == 3 * 12 * 7_615_616_512
    # The mix has a fifth of the long rows and four fifths of the short ones; the merge, a length between its parents'.
    assert costs["student/mix-seed0"].tokens == pytest.approx(2 * 10200 * (prompt + 4000 / 5 + 600 * 4 / 5))
    assert costs["answers/mid"].tokens == pytest.approx(12000 * (prompt + math.sqrt(600 * 4000)))
    assert costs["evaluate/mid-seed0"].tokens == pytest.approx(2564 * (prompt + math.sqrt(600 * 4000)))
    paid = sum(8 * (cost.hours or 0) for cost in made.costs)
    assert f"{two(paid)} GPU-hours" in table(made, Assumptions())
    assert f"${two(2 * paid)} at $2 per GPU-hour" in table(made, Assumptions())


def test_a_benchmark_that_is_asked_more_often_counts_so_often() -> None:
    sampled = "evaluate.benchmarks=[{preset: aime2024, sampling: {samples: 16, temperature: 0.6, max_new_tokens: 500}}]"
    cost = next(c for c in of_recipe("micota-qwen2.5-7b", sampled).costs if c.stage == "evaluate/base")
    assert "480 answers of 500 tokens" in cost.how
    assert cost.tokens == pytest.approx(480 * (200 / 3 + 60 + 500))


def test_what_does_not_fit_is_named_with_what_helps() -> None:
    tight = of_recipe("micota-qwen2.5-7b", "train.activation_checkpointing=selective", gpu="a100-40gb")
    assert "DOES NOT FIT on A100-40GB" in table(tight, Assumptions())
    student = next(cost for cost in tight.costs if cost.verb == "train")
    needed = student.memory
    free = "5% is kept free for the allocator's gaps and CUDA's own memory"
    assert student.too_big == (
        f"{math.ceil(needed / 1e8) / 10} GB on each GPU, which can use 38.0 of its 40.0 GB ({free})"
    )
    roomy = of_recipe("micota-qwen2.5-7b", "train.activation_checkpointing=full", gpu="h200")
    assert "DOES NOT FIT" not in table(roomy, Assumptions())


def test_what_is_computed_again_takes_time() -> None:
    """With full checkpointing every block's forward pass; the output matrix and the embedding are in none."""
    full, none = (
        next(
            cost
            for cost in of_recipe("micota-qwen2.5-7b", f"train.activation_checkpointing={how}", gpu="h200").costs
            if cost.stage == "student/long-seed0"
        )
        for how in ("full", "none")
    )
    assert full.flops == none.flops == pytest.approx(3600 * (none.hours or 0) * 8 * 989e12 * 0.4)
    blocks = full.flops / 3 - full.tokens * 2 * 152064 * 3584
    assert full.hours == pytest.approx((full.flops + blocks) / (8 * 989e12 * 0.4) / 3600)


def test_a_rank_needs_its_shards_alone() -> None:
    """72 billion parameters, 291 GB in float32, which no rank ever holds whole."""
    overrides = ("models.student.checkpoint=Qwen/Qwen2.5-72B", "train.activation_checkpointing=full", "launch.nproc=64")
    student = next(c for c in of_recipe("micota-qwen2.5-7b", *overrides).costs if c.stage == "student/long-seed0")
    assert student.memory == estimate(of_hub("Qwen/Qwen2.5-72B"), 16384, 64, "full", torch.bfloat16, "cuda").total
    assert student.memory < 4 * 72.7e9


def test_stages_at_once_need_their_room_at_once() -> None:
    one, two_at_once = (of_recipe("micota-qwen2.5-7b", f"launch.jobs={jobs}") for jobs in (1, 2))
    passing = sorted((cost.passing for cost in one.costs), reverse=True)
    assert two_at_once.disk - one.disk == passing[1] > 0


def test_fewer_gpus_than_a_stage_takes_are_refused() -> None:
    with pytest.raises(InputError, match=r"--gpus 4: student/short-seed0 takes 8 \(`launch.nproc`\)"):
        of_recipe("micota-qwen2.5-7b", "launch.nproc=8", gpus=4)
    assert of_recipe("micota-qwen2.5-7b", "launch.nproc=8", gpus=16).gpus == 16
    tp = ("launch.nproc=1", "models.teacher.serve.tp=4", "models.student.serve={tp: 1, replicas: 1}")
    with pytest.raises(InputError, match=r"--gpus 1: answers/long takes 4 \(`serve.tp`, `serve.dp` and `serve.repl"):
        of_recipe("micota-qwen2.5-7b", *tp, gpus=1)


def test_tries_that_an_accepted_answer_saves_are_the_most_there_can_be() -> None:
    tried = ("corpora.long.generate.overrides={samples: 4, stop_after_accepted: 1, temperature: 0.7}",)
    cost = next(c for c in of_recipe("micota-qwen2.5-7b", *tried).costs if c.stage == "answers/long")
    assert cost.how.startswith("at most 48,000 answers of ")


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_given_as_the_table_shows_it(name: str) -> None:
    shown = of_recipe("micro", "train.device=auto", gpu=name)
    assert f" × {name.upper()}, one stage after another" in table(shown, Assumptions())
    assert of_recipe("micro", "train.device=auto", gpu=name.upper()).costs == shown.costs


def test_what_is_needed_and_what_can_be_used_never_look_equal() -> None:
    assert shortfall(38.02e9, 40e9, 0.95, "for gaps").startswith("38.1 GB on each GPU, which can use 38.0 of its 40.0")


def test_totals_name_what_their_hours_leave_out() -> None:
    left = ("models.short-teacher.url=http://host:30000", "models.teacher.serve.tp=1", "train.dtype=float32")
    line = next(
        line
        for line in table(of_recipe("micota-qwen2.5-7b", *left), Assumptions()).splitlines()
        if line.startswith("Left out of hours and GPU-hours: ")
    )
    assert "at servers that already run: answers/short;" in line
    assert "does not fit: answers/long;" in line
    assert "in float32, whose speed is not known: student/short-seed0, " in line
    assert "on the CPU: corpus/short, " in line
    assert line.endswith("downloads from the hub.")


def test_stages_that_may_run_at_once_on_the_same_gpus_are_warned_of() -> None:
    text = table(of_recipe("micota-qwen2.5-7b", "launch.jobs=2"), Assumptions())
    assert "WARNING: `launch.jobs` is 2: evaluate/base and answers/short (and " in text
    assert "WARNING" not in table(of_recipe("micota-qwen2.5-7b"), Assumptions())
    assert "WARNING" not in table(of_recipe("micro", "launch.jobs=2"), Assumptions())  # on a CPU


def test_stages_that_wait_for_each_other_share_no_gpu() -> None:
    chain = [
        Stage("a", "train", None, (), ()),
        Stage("cpu", "filter", None, (Artefact("x", "a"),), ()),
        Stage("b", "train", None, (Artefact("y", "cpu"),), ()),
    ]
    assert shared_gpus(chain, {"a": 8, "b": 8}, 2) is None
    assert "a and c may run at once" in (
        shared_gpus([*chain[:2], Stage("c", "train", None, (), ())], {"a": 1, "c": 1}, 2) or ""
    )


def test_a_judge_is_counted() -> None:
    judge = "evaluate.judge={model: Qwen/Qwen2.5-32B-Instruct, serve: {engine: sglang, tp: 2}}"
    with_judge, without = (
        next(c for c in of_recipe("micota-qwen2.5-7b", *judged).costs if c.stage == "evaluate/base")
        for judged in ((judge,), ())
    )
    # A question about two answers in five, of 200 tokens, and a reply of 20.
    assert with_judge.tokens - without.tokens == pytest.approx(0.4 * 2564 * 220)
    assert with_judge.hours is not None
    assert without.hours is not None
    assert with_judge.hours > without.hours + 120 / 3600
    assert (with_judge.gpus, without.gpus) == (2, 1)
    assert with_judge.memory > without.memory
    small = next(
        c
        for c in of_recipe("micota-qwen2.5-7b", judge.replace("tp: 2", "tp: 1"), gpu="a100-40gb").costs
        if c.stage == "evaluate/base"
    )
    assert small.too_big.startswith("the judge: ")
    assert small.left_out == ["the judge, does not fit"]


def test_scoring_reads_a_corpus_once_and_leaves_its_likeliest_tokens() -> None:
    """Every figure by hand, from the corpus that is scored."""
    scored = (
        "corpora.mid-soft={score: {of: mid, by: assistant-mid, top: 32}}",
        "arms={mid: mid, mid-soft: mid-soft}",
    )
    costs = {cost.stage: cost for cost in of_recipe("micota-qwen2.5-7b", *scored).costs}
    score, train, answers = costs["scores/mid-soft"], costs["student/mid-soft-seed0"], costs["answers/mid"]
    qwen14, epochs = of_hub("Qwen/Qwen2.5-14B-Instruct"), 2
    assert score.tokens == pytest.approx(train.tokens / epochs)
    rows = 0.85 * 12000
    positions = score.tokens - rows * (200 / 3 + 60 - 1)  # answers through the end of turn, without prompts
    assert score.disk == pytest.approx(positions * (8 + 32 * 6), rel=1e-3)
    assert score.passing == pytest.approx(positions * (8 + 4 * 4 / 3 + 32 * 14), rel=1e-3)
    assert score.flops == pytest.approx(2 * (parameters(qwen14) - 152064 * 5120) * score.tokens, rel=0.15)
    assert score.hours is not None
    assert answers.hours is not None
    assert 0 < score.hours < answers.hours
    assert score.gpus == answers.gpus
    hard = costs["student/mid-seed0"]
    need = estimate(of_hub("Qwen/Qwen2.5-7B-Instruct"), 16384, 8, "selective", torch.bfloat16, "cuda", top_k=32)
    assert train.memory == need.total > hard.memory


def test_each_round_answers_scores_and_learns_its_own_problems() -> None:
    """Every figure by hand: 2,000 of 12,000 problems per round, none of whose answers is rejected."""
    mine = "corpora.mine={on_policy: {by: assistant-mid, rounds: 2, problems_per_round: 2000}}"
    arm = "arms={mine: {corpus: mine, overrides: {epochs: 3}}}"
    made = of_recipe("micota-qwen2.5-7b", mine, arm, "claims=null", answer_tokens=["mine=500"])
    costs = {cost.stage: cost for cost in made.costs}
    qwen7 = of_hub("Qwen/Qwen2.5-7B-Instruct")
    for name in ("mine-seed0-round1", "mine-seed0-round2"):
        answers, score, train = (costs[f"{kind}/{name}"] for kind in ("answers", "scores", "student"))
        tokens = 2000 * (500 + 200 / 3 + 60)
        assert answers.tokens == pytest.approx(tokens)
        assert score.tokens == pytest.approx(tokens)
        assert train.tokens == pytest.approx(3 * tokens)
        assert score.disk == pytest.approx(2000 * 501 * (8 + 6 * 32))
        assert train.flops > 6 * (parameters(qwen7) - 152064 * 3584) * 3 * tokens
        assert all(cost.hours is not None and cost.hours > 0 for cost in (answers, score, train))
    assert costs["student/mine-seed0-round1"].disk == costs["student/mine-seed0-round2"].disk == 2 * parameters(qwen7)
    with pytest.raises(InputError, match="expected NAME=TOKENS with a NAME of base, "):
        of_recipe("micota-qwen2.5-7b", mine, arm, "claims=null", answer_tokens=["mine-seed0-round1=500"])


def test_align_multiplies_the_output_matrix_twice() -> None:
    costs = {cost.stage: cost for cost in of_recipe("micota-qwen2.5-7b", "align=[long]").costs}
    prompt, rows, qwen7 = 200 / 3 + 60, 10200, of_hub("Qwen/Qwen2.5-7B-Instruct")
    mean = prompt + 4000
    context = mean + (0.7 * 4000) ** 2 / mean
    forward = train_flops(qwen7, rows * mean, context) / 3
    assert costs["align"].flops == pytest.approx(forward + rows * 4000 * 2 * 152064 * 3584)


def cached(folder: Path, name: str, files: dict[str, str]) -> None:
    """A model in a cache laid out as the hub's."""
    of_model = folder / f"models--{name.replace('/', '--')}"
    (of_model / "refs").mkdir(parents=True)
    (of_model / "refs" / "main").write_text("0" * 40)
    for file, content in files.items():
        path = of_model / "snapshots" / ("0" * 40) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        ({"config.json": "{}"}, False),  # as a plan fetches it that does not know the shapes
        ({"config.json": "{}", "model.safetensors": ""}, True),
        ({"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "1.st", "b": "2.st"}}'}, False),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "1.st"}}', "1.st": ""},
            True,
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "torn"}, False),
    ],
)
def test_a_model_is_in_the_cache_with_its_weights(
    files: dict[str, str], whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "Qwen/Qwen2.5-0.5B", files)
    assert weights_cached("Qwen/Qwen2.5-0.5B") is whole


def test_a_length_sweep_samples_at_every_weight() -> None:
    sweep = ("models.assistant-mid.merge.median_tokens=1500", "models.assistant-mid.merge.sweep={limit: 100}")
    costs = {cost.stage: cost for cost in of_recipe("micota-qwen2.5-7b", *sweep).costs}
    prompt = 200 / 3 + 60
    assert costs["model/assistant-mid"].tokens == pytest.approx(5 * 100 * (prompt + 1500))
    assert "5 weights, and up to 3 more to find the length: " in costs["model/assistant-mid"].how
    assert costs["answers/mid"].tokens == pytest.approx(12000 * (prompt + 1500))


@pytest.mark.parametrize("verb", ["plan", "doctor"])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert f"usage: micota {verb}" in capsys.readouterr().out


def test_assumptions_can_be_changed_and_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    common = ["plan", "micota-qwen2.5-7b", "--out", str(tmp_path / "run"), "--json", str(file)]
    assert main([*common, "--assume", "train_mfu=0.2", "--answer-tokens", "long=1000", "--gpus=8"]) == 0
    printed = capsys.readouterr().out
    assert "train_mfu = 0.2: FLOP utilisation of training, including what activation" in printed
    assert "recomputes [as given]" in printed
    assert "This is a plan, not a measurement" in printed
    written = json.loads(file.read_text())
    student = next(stage for stage in written["stages"] if stage["stage"] == "student/long-seed0")
    again = student["tokens"] * 2 * 28 * 3584 * 18944
    assert student["hours"] == pytest.approx((student["flops"] + again) / (8 * 989e12 * 0.2) / 3600)
    assert student["tokens"] == pytest.approx(2 * 10200 * (200 / 3 + 60 + 1000))
    assert student["gpu_hours"] == pytest.approx(8 * student["hours"])
    for wrong, said in (
        (["--assume", "train_mfu=40"], "--assume train_mfu=40: `train_mfu` must lie above 0 and at most at 1"),
        (["--assume", "mfu=0.4"], "`mfu`: unknown key"),
        (["--answer-tokens", "medium=5"], "expected NAME=TOKENS with a NAME of base, long, mid, short"),
        (["--answer-tokens", "long=many"], "expected NAME=TOKENS"),
        (["--gpu", "h1000"], "--gpu h1000: unknown; known are cpu, h100"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--dollars-per-gpu-hour", "-1"], "--dollars-per-gpu-hour must be above 0"),
        (["--set", "problems.train.path=other.jsonl"], "other.jsonl; its problems must be counted"),
        (["--set", "models.student.checkpoint=nowhere"], "no such folder"),
    ):
        assert main([*common, *wrong]) == 2, wrong
        assert said in capsys.readouterr().err


def test_figures_have_two_digits() -> None:
    said = {0.0234: "0.023", 0.5: "0.50", 7.06: "7.1", 12.4: "12", 99.6: "100", 1234: "1,200", 0: "0"}
    assert [two(x) for x in said] == list(said.values())
    said = {0: "–", 950: "950 B", 15_230: "15 kB", 7.6e9: "7.6 GB", 999.6e9: "1,000 GB", 2.5e12: "2.5 TB"}
    assert [size(x) for x in said] == list(said.values())


# --- against a real run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run, made by the pipeline's own stages, some of which are left to do."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    recipe = loader.load(Recipe, MICRO, SMALL)
    stages = [stage for stage in build_stages(recipe, MICRO, folder) if stage.verb in MODELS and stage.name not in LEFT]
    Run(stages, LaunchConfig(jobs=2, threads=1), folder).run(lambda _: None)
    return folder


@pytest.mark.slow
def test_done_stages_show_their_own_counts(finished: Path) -> None:
    recipe = loader.load(Recipe, MICRO, SMALL)
    made = make_plan(recipe, MICRO, finished)
    costs = {cost.stage: cost for cost in made.costs}
    assert sorted(cost.stage for cost in made.to_do if cost.verb in MODELS) == sorted(LEFT)
    for name in ("long", "short"):
        meta = json.loads((finished / f"answers/{name}/completions.jsonl.meta.json").read_text())
        assert costs[f"answers/{name}"].tokens == meta["prompt_tokens"] + meta["completion_tokens"]
    for name in ("student/long-seed1", "student/mix-seed1"):
        summary = json.loads((finished / name / "summary.json").read_text())
        assert costs[name].tokens == summary["data"]["tokens"]  # of one epoch
        assert f"{summary['steps']} steps" in costs[name].how
    done = json.loads((finished / "student/long-seed1/done.json").read_text())
    assert costs["student/long-seed1"].hours == done["seconds"] / 3600
    assert "done: " in table(made, Assumptions())
    assert f"To do: {len(made.to_do)} of" in table(made, Assumptions())
    results = json.loads((finished / "evaluate/base/results.json").read_text())["benchmarks"]["press-4"]
    assert f"12 answers of {two(results['mean_tokens'])} tokens (counted)" in costs["evaluate/base"].how


@pytest.mark.slow
def test_a_plan_made_before_is_within_a_few_percent_of_the_run(finished: Path) -> None:
    """Given the accepted share and the answers' mean and spread, which a plan can only assume, the rest follows."""
    recipe = loader.load(Recipe, MICRO, SMALL)
    metas = {
        name: json.loads((finished / f"answers/{name}/completions.jsonl.meta.json").read_text())
        for name in ("long", "short")
    }
    counts = json.loads((finished / "corpus/long/corpus.jsonl.counts.json").read_text())
    lengths = [f"{name}={round(meta['completion_tokens'] / meta['completions'])}" for name, meta in metas.items()]
    spread = float(np.std(counts["lengths"]) / np.mean(counts["lengths"]))
    assumed = Assumptions(accepted=counts["accepted"] / counts["total"], length_cv=spread)
    before = make_plan(recipe, MICRO, finished / "elsewhere", assumed=assumed, answer_tokens=lengths)
    assert len(before.to_do) == len(before.costs)
    planned = {cost.stage: cost for cost in before.costs}
    real = {cost.stage: cost for cost in make_plan(recipe, MICRO, finished).costs}
    for name in ("answers/long", "answers/short", "student/long-seed1"):
        assert planned[name].tokens == pytest.approx(real[name].tokens, rel=0.03), name
        assert planned[name].flops == pytest.approx(real[name].flops, rel=0.05), name
    # A mix takes its share of each part's mean length, and has the luck of few rows.
    assert planned["student/mix-seed1"].tokens == pytest.approx(real["student/mix-seed1"].tokens, rel=0.25)
    written = sum(file.stat().st_size for file in (finished / "student/long-seed1/model").glob("*.safetensors"))
    assert planned["student/long-seed1"].disk == pytest.approx(written, rel=0.05)


def test_steps_are_those_of_the_trainer(tmp_path: Path) -> None:
    """On documents of the lengths that are assumed."""
    checkpoint = make_checkpoint(tmp_path, "qwen2")
    lengths = np.full(500, 128)
    rows = [{"prompt_tokens": 48, "completion_tokens": 80, "id": str(i)} for i in range(len(lengths))]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    planner = Planner(LaunchConfig(), None, Assumptions(), {}, {})
    corpus = planner.corpus(str(data))
    assert (corpus.rows, corpus.tokens, corpus.context) == (500, 64000, 128)
    documents = Documents(
        input_ids=np.zeros(lengths.sum(), dtype=np.int32),
        supervised=np.ones(lengths.sum(), dtype=bool),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        rows=len(lengths),
        dropped=0,
        truncated=0,
        rejected=0,
        rejects_path=None,
    )
    steps = PackedSteps(documents, 1024, 4).total_steps(3)
    settings = TrainConfig(
        model=str(checkpoint), data=str(data), out=str(tmp_path / "out"), epochs=3, pack_tokens=1024, packs_per_step=4
    )
    stage = Stage("student/a-seed0", "train", settings, (Artefact(str(checkpoint)),), ("model",))
    cost = train(planner, stage)
    assert f"{steps} steps" in cost.how
    assert cost.tokens == 3 * 64000
    planner.scores["scores"] = 32
    forward, reverse = (
        train(
            planner, replace(stage, settings=replace(settings, soft=SoftConfig(divergence=way), top_logprobs="scores"))
        )
        for way in typing.get_args(typing.get_type_hints(SoftConfig)["divergence"])
    )
    assert forward.memory > cost.memory == reverse.memory
    limited = train(planner, replace(stage, settings=replace(settings, max_steps=5)))
    assert limited.tokens == pytest.approx(5 / (steps / 3) * 64000)
