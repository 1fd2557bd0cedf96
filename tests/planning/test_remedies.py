"""What a plan names as a remedy is one: pasted, it makes the stages fit, and GPUs that idled work."""

from pathlib import Path
from typing import Any

import pytest

from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import RECIPES
from micota_fast.planning.assumptions import Assumptions
from micota_fast.planning.levers import LEVERS, Machine
from micota_fast.planning.plan import Plan, make_plan, table
from micota_fast.planning.planner import Cost

NAME = "micota-qwen2.5-7b"


def of_recipe(*overrides: str, **options: Any) -> Plan:
    path = RECIPES / f"{NAME}.yaml"
    return make_plan(loader.load(Recipe, path, ("claims=null", *overrides)), path, Path("/nowhere/run"), **options)


def too_big(made: Plan) -> dict[str, Cost]:
    return {cost.stage: cost for cost in made.costs if cost.too_big}


@pytest.mark.parametrize(
    ("overrides", "options", "remedies"),
    [
        (
            ("models.assistant-long.train.overrides={}",),
            {"gpu": "h100"},
            ["models.assistant-long.train.overrides.activation_checkpointing=full"],
        ),
        (
            ("arms={long: long}", "align=[]"),
            {"gpu": "a100-40gb"},
            ["train.activation_checkpointing=full", "models.teacher.serve.tp=4"],
        ),
        (  # Full checkpointing is on, and is not named: packs get shorter, and a step keeps its tokens.
            ("arms={long: long}", "align=[]", "train.activation_checkpointing=full", "train.pack_tokens=131072"),
            {"gpu": "a100-40gb"},
            ["train.pack_tokens=32768", "train.packs_per_step=32"],
        ),
        (  # Rounds: of the student's training, and of the model that scores.
            (
                "corpora.mine={on_policy: {by: teacher, rounds: 2, problems_per_round: 900}}",
                "arms={mine: mine}",
                "align=[]",
                "train.pack_tokens=131072",
                "models.teacher.serve.tp=1",
            ),
            {"gpu": "a100-40gb"},
            ["train.activation_checkpointing=full", "models.teacher.serve.tp=2"],
        ),
        (  # Rounds whose answers override their server.
            (
                "corpora.mine={on_policy: {by: student, rounds: 2, problems_per_round: 9, "
                "overrides: {serve: {engine: sglang, replicas: 1}, max_new_tokens: 400000}}}",
                "arms={mine: mine}",
                "align=[]",
            ),
            {"gpu": "a100-40gb"},
            ["corpora.mine.on_policy.overrides.serve.tp=2"],
        ),
        (  # Two levers together.
            ("arms={long: long}", "align=[]", "train.pack_tokens=131072"),
            {"gpu": "a100-40gb"},
            ["train.activation_checkpointing=full", "train.pack_tokens=32768", "train.packs_per_step=32"],
        ),
        (  # 14 billion weights on eight GPUs of 40 GB: no shorter pack makes room for their moments.
            ("models.teacher.serve.tp=4", "models.short-teacher.serve.tp=4"),
            {"gpu": "a100-40gb"},
            ["train.activation_checkpointing=full", "models.assistant-long.train.overrides.optimizer_states=8bit"],
        ),
        (  # Nor are 8 bits few enough on four.
            ("models.teacher.serve.tp=4", "models.short-teacher.serve.tp=4", "launch.nproc=4"),
            {"gpu": "a100-40gb", "gpus": 4},
            ["train.optimizer_states=8bit", "models.assistant-long.train.overrides.offload=true"],
        ),
        (  # Nor does offload, if copies of the model are asked for.
            ("arms={long: long}", "align=[]", "train.mesh={replicate: 8}", "train.activation_checkpointing=full"),
            {"gpu": "a100"},
            ["train.lora.merged=true"],
        ),
        (("arms={long: long}", "align=[]", "launch.nproc=2"), {"gpu": "a100", "gpus": 8}, ["launch.nproc=8"]),
        (  # More GPUs for each server leave fewer servers; the judge's server is another.
            (
                "models.teacher.serve={tp: 1, replicas: 8}",
                "evaluate.judge={model: Qwen/Qwen2.5-32B-Instruct, serve: {engine: sglang}}",
            ),
            {"gpu": "l40s", "gpus": 8},
            ["models.teacher.serve.tp=2", "models.teacher.serve.replicas=4", "evaluate.judge.serve.tp=2"],
        ),
        (  # So has an arm that overrides an option of training.
            (
                "arms={long: {corpus: long, overrides: {activation_checkpointing: none, pack_tokens: 65536}}}",
                "align=[]",
                "launch.nproc=8",
                "models.teacher.serve.tp=2",
            ),
            {"gpu": "h100", "gpus": 8},
            ["arms.long.overrides.activation_checkpointing=full"],
        ),
        (  # A corpus that overrides its server has its own key.
            ("corpora.long.generate.overrides={serve: {tp: 1}}",),
            {"gpu": "h100"},
            ["corpora.long.generate.overrides.serve.tp=2"],
        ),
    ],
)
def test_pasting_the_remedies_makes_the_plan_fit(
    overrides: tuple[str, ...], options: dict[str, Any], remedies: list[str]
) -> None:
    before = of_recipe(*overrides, **options)
    assert too_big(before)
    assert set(remedies) <= set(before.remedies)
    text = table(before, Assumptions())
    assert f"To make them fit, except where nothing does: --set {before.remedies[0]}" in text
    after = of_recipe(*overrides, *before.remedies, **options)
    assert too_big(after).keys() == {name for name, cost in too_big(before).items() if "fits with" not in cost.remedy}
    assert after.remedies == []


def test_a_lever_that_is_on_is_not_named() -> None:
    on = (
        "train.activation_checkpointing=full",
        "train.pack_tokens=1048576",
        "train.max_doc_tokens=524289",
        "train.offload=true",
        "train.lora={merged: true}",
        "launch.nproc=1",
    )
    on = (*on, "arms={long: long}", "align=[]", "models.teacher.serve.tp=1")
    cost = too_big(of_recipe(*on, "models.student.checkpoint=Qwen/Qwen2.5-72B", gpu="a100"))["student/long-seed0"]
    assert cost.remedy == "every lever is on already; take GPUs with more memory, or more of them"
    cost = too_big(
        of_recipe(*on, "train.max_doc_tokens=524288", "models.student.checkpoint=Qwen/Qwen2.5-72B", gpu="a100")
    )["student/long-seed0"]
    assert "nothing makes it fit (tried: `pack_tokens`)" in cost.remedy
    assert "--set" not in cost.remedy


def test_documents_that_may_be_long_bound_the_pack() -> None:
    long = ("arms={long: long}", "align=[]", "train.activation_checkpointing=full", "train.pack_tokens=131072")
    cost = too_big(of_recipe(*long, "train.max_doc_tokens=131072", gpu="a100-40gb"))["student/long-seed0"]
    assert "pack_tokens" not in cost.remedy


def test_a_served_model_is_split_by_a_divisor_of_its_heads() -> None:
    """Qwen2.5-7B has 28: 2 and 4 GPUs share them evenly, 8 do not."""
    made = of_recipe()
    stage = next(stage for stage in made.stages if stage.name == "answers/own")
    lever = next(lever for lever in LEVERS if lever.name == "serve.tp")
    assert list(lever.steps(made.planner, stage, Machine(8, may_grow=False))) == [{"serve.tp": 2}, {"serve.tp": 4}]
    assert list(lever.steps(made.planner, stage, Machine(2, may_grow=False))) == [{"serve.tp": 2}]


def test_what_is_done_needs_no_remedy() -> None:
    made = of_recipe(gpu="a100-40gb")
    made.planner.done = {"answers/long": 3600.0}
    made.planner.counted = lambda path: made.planner.corpora[str(path)]  # type: ignore[method-assign]
    cost = next(cost for cost in made.planner.costs(made.stages) if cost.stage == "answers/long")
    assert (cost.done, cost.too_big, cost.left_out) == (True, "", [])


def test_pasting_what_uses_idle_gpus_leaves_fewer_idle() -> None:
    four = ("launch.nproc=4", "models.assistant-long.train.overrides={activation_checkpointing: full}")
    before = of_recipe(*four, gpu="h200", gpus=4)
    assert before.idle is not None
    idle = sum(before.idle.gpu_hours.values())
    text = table(before, Assumptions())
    assert "Idle: " in text
    assert "--set models.student.serve.replicas=4" in text
    assert "models.teacher.serve.replicas=2" in text  # two GPUs each
    assert "GPU-hours, in model/assistant-mid, align." in text
    after = of_recipe(*four, *before.idle.arguments, gpu="h200", gpus=4)
    assert after.idle is not None
    assert sum(after.idle.gpu_hours.values()) < idle / 2
    assert after.idle.arguments == []
    assert sum(cost.hours or 0 for cost in after.costs) == pytest.approx(before.idle.hours)


def test_a_training_uses_more_gpus_by_more_processes() -> None:
    made = of_recipe("launch.nproc=2", gpu="b200", gpus=8)
    assert made.idle is not None
    assert "launch.nproc=8" in made.idle.arguments
