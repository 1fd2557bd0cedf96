"""From recipe to stages: what depends on what, and what a wrong recipe is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.run import run_recipe
from micota_fast.pipeline.stage import Stage

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [1, 2],
    "problems": {"train": {"path": "train.jsonl", "limit": 3}},
    "models": {
        "teacher": {"checkpoint": "teacher", "url": "http://127.0.0.1:1", "serve": {"dtype": "float32"}},
        "assistant": {"checkpoint": "org/assistant"},
        "student": {"checkpoint": "student"},
        "assistant-long": {"train": {"base": "assistant", "corpus": "long", "overrides": {"lr": 0.5}}},
        "assistant-mid": {
            "merge": {
                "seed": 3,
                "mergekit": {
                    "merge_method": "dare_ties",
                    "base_model": "assistant",
                    "models": [{"model": "assistant-long", "parameters": {"weight": 0.5, "density": 0.5}}],
                },
            }
        },
    },
    "corpora": {
        "long": {"generate": {"model": "teacher", "overrides": {"max_new_tokens": 77}}},
        "mid": {"generate": {"model": "assistant-mid", "filter": {"max_tokens": 9}}},
        "mix": {"mix": {"long": 1, "mid": 4}},
    },
    "student": "student",
    "arms": {"mid": "mid", "mix": "mix"},
    "align": ["long"],
    "evaluate": {"benchmarks": [{"name": "easy", "path": "easy.jsonl"}]},
}


MEDIAN = "models.assistant-mid.merge.median_tokens"
LINEAR = (
    "models.assistant-mid.merge.mergekit="
    "{merge_method: linear, models: [{model: assistant-long, parameters: {weight: 1}}]}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    for name in ("train.jsonl", "easy.jsonl"):
        (tmp_path / name).write_text('{"id": "a", "problem": "1+1", "answer": "2"}\n')
    return tmp_path


def planned(folder: Path, change: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> dict[str, Stage]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | (change or {})))
    stages = build_stages(loader.load(Recipe, file, overrides), file, folder / "run")
    return {stage.name: stage for stage in stages}


def test_every_stage_comes_after_what_it_needs(folder: Path) -> None:
    stages = planned(folder)
    seen: set[str] = set()
    for name, stage in stages.items():
        assert seen.issuperset(stage.needs), name
        seen.add(name)
    assert stages["corpus/mix"].needs == ("corpus/long", "corpus/mid")
    assert stages["model/assistant-mid"].needs == ("model/assistant-long",)
    assert stages["answers/mid"].needs == ("model/assistant-mid",)
    assert stages["student/mix-seed2"].needs == ("corpus/mix",)
    assert "evaluate/base" in stages["report"].needs
    assert sorted(name for name in stages if name.startswith("evaluate/")) == [
        "evaluate/base",
        "evaluate/mid-seed1",
        "evaluate/mid-seed2",
        "evaluate/mix-seed1",
        "evaluate/mix-seed2",
    ]


def test_settings_reach_the_stage_they_are_for(folder: Path) -> None:
    stages = planned(folder, overrides=("train.epochs=7",))
    assert stages["model/assistant-long"].settings.lr == 0.5
    assert stages["model/assistant-long"].settings.epochs == 7
    assert stages["student/mid-seed2"].settings.seed == 2
    assert stages["student/mid-seed2"].settings.lr != 0.5
    assert stages["answers/long"].settings.max_new_tokens == 77
    assert stages["answers/long"].settings.limit == 3
    assert stages["answers/long"].settings.url == "http://127.0.0.1:1"
    assert stages["answers/long"].settings.serve.dtype == "float32"
    assert stages["answers/mid"].settings.url is None
    assert stages["answers/mid"].settings.serve.dtype == "auto"
    assert stages["corpus/mid"].settings.max_tokens == 9
    merged = yaml.safe_load(stages["model/assistant-mid"].files["mergekit.yaml"])
    assert merged["base_model"] == "org/assistant"
    assert merged["models"][0]["model"] == str(folder / "run/model/assistant-long/model")


def test_a_merge_of_a_wanted_length_is_a_sweep(folder: Path) -> None:
    plain = planned(folder)["model/assistant-mid"]
    assert (plain.verb, plain.outputs) == ("merge", ("model",))
    wanted = ("models.assistant-mid.merge.median_tokens=90", "models.assistant-mid.merge.sweep={weights: [0.1, 0.9]}")
    own = ("generate.temperature=0.5", "generate.samples=2", "models.assistant-mid.serve.dtype=float64")
    stages = planned(folder, overrides=(*wanted, *own, "filter.timeout_s=7"))
    stage = stages["model/assistant-mid"]
    assert (stage.verb, stage.outputs[:2]) == ("length-sweep", ("model", "sweep.json"))
    settings = stage.settings
    assert (settings.target_median_tokens, settings.weights, settings.seed) == (90, [0.1, 0.9], 3)
    assert (settings.limit, settings.timeout_s) == (3, 7)  # the recipe's problems are three
    assert (settings.generate.temperature, settings.generate.samples) == (0.5, 2)
    assert settings.generate.serve.dtype == "float64"
    assert settings.out == str(folder / "run/model/assistant-mid")
    assert settings.config == str(folder / "run/model/assistant-mid/mergekit.yaml")
    assert settings.problems in [artefact.location for artefact in stage.inputs]
    assert stage.needs == plain.needs
    assert stages["answers/mid"].settings.model == str(folder / "run/model/assistant-mid/model")
    assert loader.load(type(settings), write(folder, loader.dump(settings))) == settings


def test_an_arm_may_be_trained_with_options_of_its_own(folder: Path) -> None:
    lora = {"corpus": "mid", "overrides": {"lr": 0.01, "lora": {"rank": 4, "merged": True}}}
    plain, stages = planned(folder), planned(folder, {"arms": {"mid": "mid", "mid-lora": lora}})
    for seed in (1, 2):
        full, adapted = (stages[f"student/{arm}-seed{seed}"].settings for arm in ("mid", "mid-lora"))
        assert loader.identity(full) == loader.identity(plain[f"student/mid-seed{seed}"].settings)
        assert (adapted.lr, adapted.lora.rank, adapted.lora.merged, adapted.seed) == (0.01, 4, True, seed)
        assert (adapted.data, adapted.epochs) == (full.data, full.epochs)
    report = stages["report"].settings
    assert report.trained_on == {"mid-lora": "mid"}
    assert report.provenance["arm mid-lora"] == "trained on mid, lora {'merged': True, 'rank': 4}, lr 0.01"
    assert list(stages["contamination"].settings.corpora) == ["mid", "long"]


def write(folder: Path, text: str) -> Path:
    (folder / "stage.yaml").write_text(text)
    return folder / "stage.yaml"


def test_only_what_the_arms_need_is_made(folder: Path) -> None:
    stages = planned(folder, {"arms": {}})
    assert set(stages) == {"evaluate/base", "answers/long", "corpus/long", "align", "report"}


def test_the_students_own_answers_are_measured_against_and_not_filtered(folder: Path) -> None:
    own = {"corpora": RECIPE["corpora"] | {"self": {"generate": {"model": "student"}}}, "student_answers": "self"}
    stages = planned(folder, own)
    assert stages["align"].settings.student_answers == stages["answers/self"].settings.out
    assert "answers/self" in stages["align"].needs
    assert "corpus/self" not in stages  # nothing is trained on it, so that none of it need be right
    with pytest.raises(
        InputError, match=r"`student_answers` names the corpus 'long', which is not generated by 'student'"
    ):
        planned(folder, own | {"student_answers": "long"})


def test_the_report_reads_whose_answers_the_preconditions_are_measured_on(folder: Path) -> None:
    short = {"short": {"generate": {"model": "assistant"}}, "self": {"generate": {"model": "student"}}}
    recipe = {"corpora": RECIPE["corpora"] | short, "student_answers": "self", "arms": RECIPE["arms"] | {"s": "short"}}
    stages = planned(folder, recipe)
    asked = stages["report"].settings.training_answers
    names = {"long": "long", "mid": "mid", "short": "short", "student": "self"}
    assert asked.answers == {part: str(folder / f"run/corpus/{name}/corpus.jsonl") for part, name in names.items()}
    assert asked.problems == stages["answers/long"].settings.problems
    assert {f"corpus/{name}" for name in names.values()} <= set(stages["report"].needs)
    assert asked.problems in [artefact.location for artefact in stages["report"].inputs]
    assert (
        planned(folder, recipe | {"corpora": RECIPE["corpora"], "student_answers": None, "arms": {}, "align": []})[
            "report"
        ].settings.training_answers
        is None
    ), "nothing is answered only for it"


def test_chance_is_the_reports_and_no_evaluation_is_stale_for_it(folder: Path) -> None:
    plain, told = (
        planned(folder),
        planned(folder, overrides=("evaluate.benchmarks=[{name: easy, path: easy.jsonl, chance: 10}]",)),
    )
    benchmark = told["evaluate/base"].settings.benchmarks[0]
    assert told["report"].settings.chance == {benchmark.name: 10.0}
    assert loader.identity(told["evaluate/base"].settings) == loader.identity(plain["evaluate/base"].settings)
    assert loader.identity(told["report"].settings) != loader.identity(plain["report"].settings)


def test_a_recipe_of_the_version_before_makes_the_same_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options by their old names, in the file, in overrides, and in what a corpus overrides."""
    long = {"model": "teacher"}
    drawn = {"samples": 4, "temperature": 0.7}
    corpora = RECIPE["corpora"] | {"self": {"generate": {"model": "student"}}}
    new = corpora | {"long": {"generate": long | {"overrides": drawn | {"stop_after_accepted": 2}}}}
    old = corpora | {"long": {"generate": long | {"set": drawn | {"enough": 2}}}}
    wanted = planned(folder, {"corpora": new, "student_answers": "self"})
    assert capsys.readouterr().err == ""
    assert planned(folder, {"corpora": old}, ("own=self",)) == wanted
    notices = capsys.readouterr().err
    for name in ("`corpora.long.generate.set`", "`own`", "`enough`"):
        assert notices.count(name) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("problems.train.path=nowhere.jsonl",), r"`problems\.train\.path`: no such file: .*nowhere\.jsonl"),
        (("models.student.checkpoint=nowhere",), r"`models\.student\.checkpoint`: no such folder: .*nowhere"),
        (
            ("models.student.checkpoint=org/model+adapter",),
            r"`models\.student\.checkpoint`: .* If org/model\+adapter is MODEL\+ADAPTER: .* Merge the two first",
        ),
        (("models.student.checkpoint=org/model+./a/b",), r"no such folder: .* a recipe takes whole models"),
        (("evaluate.top_logprobs=2",), r"`evaluate.*`top_logprobs`: nothing trains on an evaluation's answers"),
        (
            (f"{MEDIAN}=9", "models.assistant-mid.merge.sweep={generate: {top_logprobs: 2}}"),
            "`generate.top_logprobs`: nothing trains on a sweep's answers",
        ),
        (("evaluate.benchmarks.0=x",), r"`evaluate\.benchmarks`"),
        (("arms.mid=middle",), r"`arms\.mid` names the corpus 'middle'; known: long, mid, mix"),
        (("arms.base=mid",), "'base' is the untouched student"),
        (("arms.mid={corpus: middle}",), r"`arms\.mid` names the corpus 'middle'; known: long, mid, mix"),
        (("arms.mid={corpus: mid, set: {lr: 1}}",), r"`arms\.mid\.set`: unknown key; known here: corpus, overrides"),
        (("arms.mid={overrides: {lr: 1}}",), r"`arms\.mid\.corpus`: this key is required"),
        (("arms.mid=[mid]",), r"`arms\.mid`: must be str or a mapping of keys to values"),
        (("arms.mid={corpus: mid, overrides: {lrr: 1}}",), r"`arms\.mid\.overrides`: `lrr`: unknown key"),
        (("arms.mid={corpus: mid, overrides: {seed: 1}}",), "trained once per seed of the recipe's `seeds`"),
        (
            ("arms.mid={corpus: mid, overrides: {lora: {rank: 2}}}",),
            r"`arms\.mid\.overrides`: `lora` needs `merged: true`",
        ),
        (
            ("models.student.train={base: teacher, corpus: long}",),
            "exactly one of `checkpoint`, `served`, `train`, `merge`",
        ),
        (
            ("models.assistant-long.train.overrides.lrr=1",),
            r"`models\.assistant-long\.train\.overrides`: `lrr`: unknown key",
        ),
        (
            ("corpora.long.generate.model=assistant-mid",),
            "made from each other: model/assistant-mid -> model/assistant-long -> corpus/long -> answers/long",
        ),
        (("arms={../../up: mid}",), r"`arms`: '../../up' is not a name"),
        (("corpora.a/b={file: x}",), r"`corpora`: 'a/b' is not a name"),
        (("name=..",), r"`name`: '\.\.' is not a name"),
        (("generate.url=http://127.0.0.1:1",), r"`generate\.url` would apply to every model"),
        (("models.assistant-mid.url=http://127.0.0.1:1",), "a model that is made in the run: the run serves it"),
        (("models.assistant-mid.merge.mergekit.models=[x]",), r"merge\.mergekit`: `models\.0`: must be a mapping"),
        (("models.assistant-mid.merge.mergekit.slices=[]",), r"merge\.mergekit`: `slices`: unknown key"),
        (("models.assistant-mid.merge.mergekit.parameters.density=2",), r"`parameters\.density` must lie between"),
        (("models.assistant-mid.merge.mergekit.base_model={a: b}",), r"`base_model`: must be str"),
        (("models.assistant-mid.merge.median_tokens=0",), "`median_tokens` must be at least 1"),
        (("models.assistant-mid.merge.sweep={limit: 3}",), "`sweep` is only used with `median_tokens`"),
        ((f"{MEDIAN}=9", "models.assistant-mid.merge.problems=no"), r"merge\.problems` names the problem set 'no'"),
        ((f"{MEDIAN}=9", "models.assistant-mid.merge.sweep={wieghts: []}"), r"merge\.sweep`: `wieghts`: unknown key"),
        ((f"{MEDIAN}=9", "models.assistant-mid.merge.sweep={weights: [1, 1]}"), "`weights` must list at least two"),
        ((f"{MEDIAN}=9", "models.assistant-mid.merge.sweep={weights: [1, 1e9]}"), "is out of range"),
        ((f"{MEDIAN}=9", LINEAR), r"merge\.mergekit`: a sweep over weights needs one model"),
        (("launch.jobs=0",), "`jobs` must be at least 1"),
        (("generate.temperature=.nan",), "`generate.temperature`: must be a finite number"),
        (("filter.timeout_s=0",), "`timeout_s` must be at least"),
        (("seeds=[1,1]",), "`seeds` must be a list of different numbers"),
        (("corpora.mix.mix={mix: 1}",), "made from each other: corpus/mix -> corpus/mix"),
        (("models.assistant-mid.merge.mergekit.base_model=org/other",), "'org/other' is not a name under `models`"),
    ],
)
def test_wrong_recipes(folder: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        planned(folder, overrides=overrides)


def test_keys_of_other_names_and_datasets_of_the_hub_reach_their_stages(folder: Path) -> None:
    source = "hf://datasets/org/name:train"
    columns = {"problem": "question"}
    corpora = RECIPE["corpora"] | {"theirs": {"file": source, "columns": {"output": "generation"}}}
    change = {
        "problems": {"train": {"path": source, "columns": columns}},
        "corpora": corpora,
        "arms": {"mid": "mid", "theirs": "theirs"},
        "align": ["theirs"],
    }
    stages = planned(folder, change)
    assert (stages["answers/mid"].settings.problems, stages["answers/mid"].settings.columns) == (source, columns)
    assert stages["student/theirs-seed1"].settings.data == source
    assert stages["student/theirs-seed1"].settings.columns == {"output": "generation"}
    assert stages["student/mid-seed1"].settings.columns == {}
    assert stages["align"].settings.columns == {"theirs": {"output": "generation"}}
    with pytest.raises(InputError, match="`columns` goes with `file`"):
        planned(folder, {"corpora": RECIPE["corpora"] | {"mix": {"mix": {"long": 1}, "columns": columns}}})
    with pytest.raises(InputError, match="names 'theirs': a mix copies rows without"):
        planned(folder, {"corpora": corpora | {"mix": {"mix": {"long": 1, "theirs": 1}}}})


# -- scores ----------------------------------------------------------------------------------------------------------

SOFT: dict[str, Any] = {
    "corpora": RECIPE["corpora"] | {"mid-soft": {"score": {"of": "mid", "by": "assistant-mid", "top": 8}}},
    "arms": {"mid": "mid", "mid-soft": "mid-soft"},
    "train": {"soft": {"alpha": 0.5}, "chat": {"thinking": "strip"}},
}


def test_scores_that_generating_keeps_are_an_output_of_its_stage_alone(folder: Path) -> None:
    store = "completions.jsonl.top_logprobs"
    plain, scored = planned(folder), planned(folder, {"generate": {"top_logprobs": 2}}, (f"{MEDIAN}=9",))
    assert store not in plain["answers/mid"].outputs
    assert scored["answers/mid"].outputs == (*plain["answers/mid"].outputs, store)
    assert scored["model/assistant-mid"].settings.generate.top_logprobs == 0
    assert loader.identity(scored["evaluate/base"].settings) == loader.identity(plain["evaluate/base"].settings)


def test_a_scored_corpus_is_its_texts_and_its_scores(folder: Path) -> None:
    stages = planned(folder, SOFT)
    scores = stages["scores/mid-soft"]
    assert (scores.verb, scores.needs) == ("score", ("corpus/mid", "model/assistant-mid"))
    settings, run = scores.settings, folder / "run"
    assert settings.completions == stages["corpus/mid"].settings.out
    assert (settings.model, settings.student) == (f"{run}/model/assistant-mid/model", str(folder / "student"))
    assert (settings.top_k, settings.chat.thinking, settings.student_chat.thinking) == (8, "strip", "strip")
    assert (settings.chat.prompt, settings.url) == (stages["answers/mid"].settings.chat.prompt, None)
    soft, hard = stages["student/mid-soft-seed2"], stages["student/mid-seed2"]
    assert soft.needs == ("corpus/mid", "scores/mid-soft")
    assert soft.settings.data == hard.settings.data
    assert soft.settings.top_logprobs == settings.out
    assert (soft.settings.soft.alpha, soft.settings.soft.tail) == (0.5, "bucket")
    assert (hard.settings.soft, hard.settings.top_logprobs) == (None, None)
    assert "evaluate/mid-soft-seed1" in stages["report"].needs
    assert list(stages["contamination"].settings.corpora) == ["mid", "long"]  # each text once


def test_scores_need_no_options_of_training_and_change_no_other_stage(folder: Path) -> None:
    plain, soft = planned(folder), planned(folder, {key: SOFT[key] for key in ("corpora", "arms")})
    assert soft["student/mid-soft-seed1"].settings.soft is not None
    for name in ("answers/mid", "corpus/mid", "student/mid-seed1", "model/assistant-long"):
        assert loader.identity(soft[name].settings) == loader.identity(plain[name].settings)


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ({}, r"`corpora\.mid-soft\.score\.of` names 'mid', which is not generated by `student`, 'student', but"),
        ({"mid": {"file": "train.jsonl"}}, r"`corpora\.mid-soft\.score\.of` names 'mid', which is not generated by"),
        ({"mid": {"mix": {"own": 1, "long": 1}}}, r"`corpora\.mid\.mix` names 'long', which is not generated by"),
        ({"mid": {"mix": {"own": 1, "greedy": 1}}}, r"`corpora\.greedy\.generate\.overrides\.temperature` is 0\.0, "),
        ({"mid": {"generate": {"model": "student"}}}, r"`corpora\.mid\.generate\.overrides\.temperature` is 0\.0, but"),
        ({"mid": {"generate": {"model": "student", "overrides": {"temperature": 1, "top_k": 9}}}}, r"top_k` is 9, but"),
        ({"mid": {"mix": {"own": 1}}}, None),
        ({"mid": {"generate": {"model": "student", "overrides": {"temperature": 1}}}}, None),
    ],
)
def test_the_reverse_divergence_takes_only_samples_of_the_student(
    folder: Path, corpora: dict[str, Any], message: str | None
) -> None:
    own = {"own": {"generate": {"model": "student", "overrides": {"temperature": 1.0}}}}
    greedy = {"greedy": {"generate": {"model": "student"}}}
    change = SOFT | {"corpora": SOFT["corpora"] | own | greedy | corpora, "arms": {"mid-soft": "mid-soft"}}
    reverse = ("train.soft.divergence=reverse",)
    if message is None:
        assert planned(folder, change, reverse)["student/mid-soft-seed1"].settings.soft.divergence == "reverse"
        return
    with pytest.raises(InputError, match=message):
        planned(folder, change, reverse)
    assert planned(folder, change)  # forward takes any text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "corpora.mid-soft.score.of=midd",
            r"mid-soft\.score\.of` names the corpus 'midd'; did you mean `mid`",
        ),
        ("corpora.mid-soft.score.by=asistant", r"corpora\.mid-soft\.score\.by` names the model 'asistant'; did you"),
        ("corpora.mid-soft.score.of=mid-soft", "which is scored itself"),
        ("corpora.mid-soft.score.top=129", "`top` must be at most 128, not 129"),
        ("corpora.mid-soft.score.by=teacher", "scores need SGLang's native API"),
        ("corpora.mix.mix={mid-soft: 1, long: 1}", "a mix copies texts without scores; score the mix instead"),
        ("models.assistant-long.train.corpus=mid-soft", "whose scores use the token ids of `student`, 'student'"),
        ("arms={mid: mid}", "`train.soft` needs a corpus with `score`"),
        ("corpora.mid-soft.mix={mid: 1}", "set exactly one of `file`, `generate`, `mix`, `score`"),
    ],
)
def test_a_wrong_score_is_told(folder: Path, override: str, message: str) -> None:
    more = ("generate.api=openai",) if "by=teacher" in override else ()
    with pytest.raises(InputError, match=message) as error:
        planned(folder, SOFT, (override, *more))
    assert "recipe.yaml" in str(error.value) or "--set" in str(error.value)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        (
            "arms.mid",
            {"lora": {"targets": ["q_porj"], "merged": True}},
            "stage student/mid-seed1: `lora.targets`: 'q_porj'",
        ),
        ("arms.mid", {"lora": {"rank": 4096, "merged": True}}, "stage student/mid-seed1: `lora.rank` 4096 exceeds"),
        ("arms.mid", {"freeze": ["*.embed"]}, "stage student/mid-seed1: `freeze`: '*.embed' matches no parameter"),
        ("models", {"freeze": ["*.embed"]}, "stage model/assistant-long: `freeze`: '*.embed' matches no parameter"),
    ],
)
def test_what_no_model_has_is_refused_before_the_first_stage(
    where: str, options: dict[str, Any], message: str, folder: Path, qwen2_checkpoint: Path
) -> None:
    models = {
        name: model | {"checkpoint": str(qwen2_checkpoint)}
        for name, model in RECIPE["models"].items()
        if len(model) == 1 and "checkpoint" in model
    }
    recipe = RECIPE | {"models": RECIPE["models"] | models}
    if where == "models":
        recipe["models"]["assistant-long"] = {"train": {"base": "assistant", "corpus": "long", "overrides": options}}
    else:
        recipe["arms"] = {"mid": {"corpus": "mid", "overrides": options}}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError) as error:
        run_recipe(loader.load(Recipe, file), file, folder / "run")
    assert str(error.value).startswith(message)
    assert not (folder / "run").exists()
