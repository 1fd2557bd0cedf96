"""On-policy rounds: the stages of a recipe, what a wrong one is told, and a run that is killed in its second round."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import wait_for
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import RECIPES
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.provenance import provenance
from micota_fast.pipeline.stage import Stage

MICRO_SOFT = RECIPES / "micro-soft.yaml"
OWN = (
    "corpora.own={on_policy: {by: assistant-mid, rounds: 3, problems_per_round: 250, top: 4, "
    "overrides: {temperature: 1.0, seed: 7}}}",
    "arms={mid: mid, mine: {corpus: own, overrides: {lr: 0.5, soft: {alpha: 1.0}}}}",
    "seeds=[1, 2]",
)


REVERSE = "arms.mine.overrides.soft.divergence=reverse"


def recipe(*overrides: str) -> Recipe:
    return loader.load(Recipe, MICRO_SOFT, (*OWN, *overrides))


def planned(*overrides: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_stages(recipe(*overrides), MICRO_SOFT, Path("/nowhere/run"))}


def test_each_round_starts_from_the_weights_of_the_one_before() -> None:
    stages = planned()
    student = str((RECIPES.parent / "micro/checkpoints/student").resolve())
    for seed in (1, 2):
        run = f"mine-seed{seed}"
        trainings = [f"student/{run}-round1", f"student/{run}-round2", f"student/{run}-round3"]
        model = student
        for number, training in enumerate(trainings, start=1):
            name = f"{run}-round{number}"
            answers, scores, learning = stages[f"answers/{name}"], stages[f"scores/{name}"], stages[training]
            assert answers.settings.model == learning.settings.model == model
            before = (trainings[number - 2],) if number > 1 else ()
            assert answers.needs == before
            assert stages[f"corpus/{name}"].needs == (f"answers/{name}",)
            assert scores.needs == (f"corpus/{name}", "model/assistant-mid")
            assert learning.needs == (*before, f"corpus/{name}", f"scores/{name}")
            assert (scores.settings.student, scores.settings.top_k) == (student, 4)
            assert scores.settings.completions == learning.settings.data == stages[f"corpus/{name}"].settings.out
            assert learning.settings.top_logprobs == scores.settings.out
            model = f"{learning.settings.out}/model"
        assert f"student/{run}" not in stages
        assert stages[f"evaluate/{run}"].needs == (trainings[-1],)


def test_rounds_take_the_next_problems_and_sample_by_seeds_of_their_own() -> None:
    stages = planned()
    asked = {name: stage.settings for name, stage in stages.items() if name.startswith("answers/mine")}
    slices = [(0, 250), (250, 250), (500, 250)]
    assert [settings.slice for settings in asked.values()] == 2 * slices
    assert [settings.seed for settings in asked.values()] == [1008, 1009, 1010, 2008, 2009, 2010]
    assert {settings.temperature for settings in asked.values()} == {1.0}
    assert {stages[f"student/mine-seed{seed}-round3"].settings.seed for seed in (1, 2)} == {1, 2}
    assert stages["answers/mid"].settings.slice is None


def test_every_round_has_the_training_options_of_its_arm() -> None:
    stages = planned()
    for name in ("student/mine-seed1-round1", "student/mine-seed1-round3"):
        ours = stages[name].settings
        assert (ours.lr, ours.soft.alpha, ours.soft.tail) == (0.5, 1.0, "bucket")  # of the recipe's `soft` the rest
    texts = stages["student/mid-seed1"].settings
    assert (texts.lr, texts.soft) == (1e-3, None)
    changed = planned("arms.mine.overrides={chat: {thinking: strip}}")
    assert changed["scores/mine-seed1-round1"].settings.student_chat.thinking == "strip"


def test_all_answers_are_kept_ungraded_or_the_right_ones() -> None:
    rules = planned()["corpus/mine-seed1-round1"].settings
    assert (rules.require_correct, rules.require_boxed, rules.max_tokens) == (False, False, 512)
    assert (rules.allow_empty, planned()["corpus/mid"].settings.allow_empty) == (False, True)
    stages = planned("corpora.own.on_policy.keep=right")
    rules = stages["corpus/mine-seed1-round1"].settings
    assert (rules.require_correct, rules.require_boxed) == (True, True)
    assert stages["answers/mine-seed1-round1"].settings.accept.require_correct


def test_the_reverse_divergence_takes_samples_of_the_whole_distribution() -> None:
    stages = planned(REVERSE)
    assert stages["student/mine-seed1-round1"].settings.soft.divergence == "reverse"


def test_a_model_of_the_recipe_can_be_trained_in_rounds() -> None:
    trained = "models.better={train: {base: student, corpus: own, overrides: {seed: 5, lr: 0.25}}}"
    better = "corpora.of-better={generate: {model: better}}"
    stages = planned(trained, better, "arms={taught: of-better}", "train.soft=null")
    assert stages["answers/better-round2"].needs == ("model/better-round1",)
    assert stages["answers/better-round2"].settings.seed == 5009
    assert stages["model/better-round3"].settings.lr == 0.25
    assert stages["answers/of-better"].needs == ("model/better-round3",)
    again = "corpora.of-better-too={generate: {model: better}}"
    stages = planned(trained, better, again, "arms={taught: of-better, too: of-better-too}", "train.soft=null")
    assert stages["answers/of-better-too"].needs == ("model/better-round3",)


def test_more_rounds_leave_those_that_are_done() -> None:
    three, four = planned(), planned("corpora.own.on_policy.rounds=4")
    for number in (1, 2, 3):
        for kind in ("answers", "corpus", "scores", "student"):
            name = f"{kind}/mine-seed1-round{number}"
            assert (four[name].settings, four[name].inputs) == (three[name].settings, three[name].inputs)
    assert four["evaluate/mine-seed1"].needs == ("student/mine-seed1-round4",)


def test_the_report_knows_every_round() -> None:
    stages = planned()
    settings = stages["report"].settings
    folder = Path("/nowhere/run/student")
    assert settings.training["mine"] == [str(folder / f"mine-seed{seed}-round3/metrics.jsonl") for seed in (1, 2)]
    rounds = [[str(folder / f"mine-seed{s}-round{r}/metrics.jsonl") for r in (1, 2)] for s in (1, 2)]
    assert settings.earlier_rounds == {"mine": rounds}
    assert settings.trained_on == {"mine": "own"}
    assert "student/mine-seed2-round1" in stages["report"].needs
    searched = list(stages["contamination"].settings.corpora)
    assert searched == ["mid", "long", *(f"mine-seed{s}-round{r}" for s in (1, 2) for r in (1, 2, 3))]
    said = provenance(recipe())["corpus own"]
    before = "3 rounds: student answers 250 problems, assistant-mid scores "
    assert said.startswith(
        f"{before}its answers, right or wrong, except those cut off, of 512 tokens or more (4 tokens)"
    )
    for options, kept in (
        (("filter.max_repeated=0.5",), "cut off, of 512 tokens or more or with a share above 0.5 repeated (4 tokens)"),
        (("corpora.own.on_policy.keep=right",), "scores those of its answers that the filter accepts (4 tokens)"),
    ):
        assert kept in provenance(recipe(*options))["corpus own"]


def test_other_stages_do_not_know_of_rounds() -> None:
    """What had been made before a recipe got an arm in rounds stays done."""
    with_rounds, without = planned(), planned("arms={mid: mid}", "train.soft=null")
    for name in ("answers/mid", "corpus/mid", "student/mid-seed1", "evaluate/mid-seed1", "model/assistant-mid"):
        assert loader.identity(with_rounds[name].settings) == loader.identity(without[name].settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpora.own.on_policy.rounds=0"], "`rounds` must be at least 1"),
        (["corpora.own.on_policy.rounds=1000"], "`rounds` must be at most 999"),
        (["corpora.own.on_policy.problems_per_round=0"], "`problems_per_round` must be at least 1"),
        (["corpora.own.on_policy.top=129"], "`top` must be at most 128"),
        (["problems.train.limit=249"], r"`problems\.train` has 249, and a round asks each problem once; set it to 249"),
        (
            ["corpora.own.on_policy.problems_per_round=9000"],
            r"problems_per_round: 9000`: `problems\.train` has \d+, and",
        ),
        *(
            (
                [REVERSE, f"{key}={value}"],
                rf"`corpora\.own\.on_policy\.overrides\.{key.rpartition('.')[2]}` is {value}, ",
            )
            for key, value in (
                ("corpora.own.on_policy.overrides.temperature", 0.0),
                ("corpora.own.on_policy.overrides.temperature", 0.7),
                ("corpora.own.on_policy.overrides.top_p", 0.9),
                ("corpora.own.on_policy.overrides.top_k", 40),
                ("generate.top_p", 0.8),
            )
        ),
        (["corpora.own.on_policy.keep=wrong"], r"corpora\.own\.on_policy\.keep`: must be one of"),
        (["corpora.own.on_policy.by=asistant"], r"`corpora\.own\.on_policy\.by` names the model 'asistant'; did you"),
        (["corpora.own.on_policy.problems=tran"], r"`corpora\.own\.on_policy\.problems` names the problem set 'tran'"),
        (["arms.mine.overrides={lrr: 1}"], r"`arms\.mine\.overrides`: `lrr`: unknown"),
        (["corpora.own.on_policy.overrides={temprature: 1}"], r"on_policy\.overrides`: `temprature`: unknown key"),
        *(
            (
                [f"corpora.own.on_policy.overrides.{key}={value}"],
                f"`overrides` sets `{key}`: the run starts servers for",
            )
            for key, value in (("url", "http://h"), ("api", "openai"), ("slice", "[0, 1]"))
        ),
        (
            [
                "models.mine-seed1={train: {base: student, corpus: own}}",
                "corpora.theirs={generate: {model: mine-seed1}}",
                "arms={mine: own, other: theirs}",
            ],
            "two parts of the recipe make the stage answers/mine-seed1-round1; rename one of them",
        ),
        (
            ["arms.mine.overrides={soft: null}"],
            r"`arms\.mine\.overrides\.soft: null`: this corpus has distributions to learn; leave `soft` out",
        ),
        (
            ["arms.mid={corpus: mid, overrides: {soft: {alpha: 0.5}}}"],
            r"`arms\.mid\.overrides\.soft`: this corpus has texts alone; leave `soft` out",
        ),
        (["arms.mine.overrides.init=random"], r"`arms\.mine\.overrides\.init: random`: each round of student/mine-s"),
        (["train.init=random"], r"`train\.init: random`: each round of student/mine-seed1 would start from fresh"),
        (
            [
                "models.better={train: {base: student, corpus: own}}",
                "models.better-round1={train: {base: student, corpus: mid}}",
            ],
            r"`models\.better-round1`: names ending in -round and a number belong to rounds",
        ),
        (["corpora.own.mix={mid: 1}"], "exactly one of `file`, `generate`, `mix`, `score`, `on_policy`"),
        (["align=[mid, own]"], r"`align` names 'own', whose rows are generated during each training"),
        (
            ["corpora.both={mix: {mid: 1, own: 1}}"],
            r"`corpora\.both\.mix` names 'own', whose rows are generated during",
        ),
        (["corpora.again={score: {of: own, by: teacher}}"], r"`corpora\.again\.score\.of` names 'own', whose rows"),
        (["student_answers=own"], "`student_answers` names the corpus 'own', which is not generated by 'student'"),
        (
            ["models.other={train: {base: assistant, corpus: own}}"],
            "whose scores use the token ids of `student`, 'student'",
        ),
        (["corpora.x-round2={file: x}"], r"`corpora\.x-round2`: names ending in -round and a number"),
        (
            ["models.apart={served: x, url: http://h/v1}", "corpora.own.on_policy.by=apart"],
            "`models.apart`: it is only",
        ),
        (
            ["models.teacher.url=http://h/v1", "generate.api=openai", "corpora.own.on_policy.by=teacher"],
            r"`corpora\.own\.on_policy\.by`: teacher is asked by `generate\.api: openai`",
        ),
        (
            ["models.mine-seed1={train: {base: student, corpus: own}}", "corpora.own.on_policy.by=mine-seed1"],
            "these are made from each other: model/mine-seed1-round3 -> model/mine-seed1-round3",
        ),
        (["arms={mid: mid}"], "`train.soft` needs a corpus with `score` or `on_policy`"),
        (
            [f"corpora.own.on_policy.problems_per_round={2**62}"],
            f"`rounds` times `problems_per_round` must fit 64 bits, not {3 * 2**62}",
        ),
        (
            ["seeds=[9300000000000000]"],
            r"`corpora\.own\.on_policy`: the seed of sampling is .* seed 9300000000000000 .* must fit 64 bits",
        ),
    ],
)
def test_a_wrong_corpus_in_rounds_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(*overrides)


def test_right_answers_need_problems_with_answers(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"id": "a", "problem": "1+1", "answer": "2"}\n{"id": "b", "problem": "1+2"}\n')
    source: Any = f"problems.open={{path: {problems}}}"
    chosen = "corpora.own={on_policy: {by: assistant-mid, rounds: 3, problems_per_round: 1, problems: open}}"
    assert "answers/mine-seed1-round1" in planned(source, chosen)
    told = r"`corpora\.own\.on_policy\.keep: right` needs problems with answers: " + re.escape(
        f"{problems}:2: key 'ans"
    )
    with pytest.raises(InputError, match=told):
        planned(source, chosen, "corpora.own.on_policy.keep=right")
    assert "answers/mine-seed1-round1" in planned(
        source, chosen, "corpora.own.on_policy.keep=right", "problems.open.limit=1"
    )
    wrong = recipe(source, chosen, "corpora.own.on_policy.keep=right")
    answered = tmp_path / "run/answers/mine-seed1-round1/completions.jsonl"
    answered.parent.mkdir(parents=True)
    answered.touch()
    assert build_stages(wrong, MICRO_SOFT, tmp_path / "run")  # the problems are not read again


KILLED = (
    "corpora.own={on_policy: {by: assistant, rounds: 2, problems_per_round: 24, top: 4, "
    "overrides: {temperature: 1.0, max_new_tokens: 96}}}",
    "arms={mine: {corpus: own, overrides: {epochs: 60, checkpoint_every: 5}}}",
    "align=[]",
    "seeds=[1]",
    "launch.jobs=1",
)
FIRST, LAST, WEIGHTS = "student/mine-seed1-round1", "student/mine-seed1-round2", "model/model.safetensors"


@pytest.mark.slow
def test_killed_in_the_second_rounds_training_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The run that is killed has what the calm one had before that training: a run's folder can be copied."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"

    def until(folder: Path, happened: Callable[[], bool], signal_number: int) -> None:
        options = (f"--set={option}" for option in KILLED)
        command = [sys.executable, "-m", "micota_fast", "run", "micro-soft", "--out", str(folder), *options]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: happened() or run.poll() is not None, 600)
            assert run.poll() is None, "the run ended before"
        finally:
            run.send_signal(signal_number)
            run.wait()

    until(calm, (calm / LAST / "done.json").exists, signal.SIGINT)
    shutil.copytree(
        calm, killed, ignore=lambda folder, names: ["mine-seed1-round2"] if Path(folder).name == "student" else []
    )
    rows = killed / LAST / "metrics.jsonl"
    until(killed, lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 6, signal.SIGKILL)
    assert not (killed / LAST / "done.json").exists()
    until(killed, (killed / LAST / "done.json").exists, signal.SIGINT)
    for stage in (FIRST, LAST):
        assert (killed / stage / WEIGHTS).read_bytes() == (calm / stage / WEIGHTS).read_bytes()
    logs = [(folder / LAST / "log.txt").read_text() for folder in (calm, killed)]
    assert ["resuming after step" in log for log in logs] == [False, True]
