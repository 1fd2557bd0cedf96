"""Configuration: what is read equals what was written, and every error names file, line and key."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from micota_fast.common.importing import imported
from micota_fast.config import loader
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.generation import GenerateConfig
from micota_fast.config.loader import option
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import RECIPES
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.pipeline.stages import VERBS

TRAIN = "model: a\ndata: b\nout: c\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_dump_and_load_agree(tmp_path: Path) -> None:
    text = TRAIN + "lr: 1e-4\nbetas: [0.9, 0.99]\nmax_steps: null\nchat:\n  system: null\n  prompt: 'Q: {problem}'\n"
    loaded = loader.load(TrainConfig, write(tmp_path, text))
    assert (loaded.lr, loaded.betas, loaded.chat.system, loaded.chat.prompt) == (
        1e-4,
        (0.9, 0.99),
        None,
        "Q: {problem}",
    )
    assert loader.load(TrainConfig, write(tmp_path, loader.dump(loaded))) == loaded


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    file = write(tmp_path, TRAIN + "lr: 1e-4\n")
    loaded = loader.load(TrainConfig, file, ["lr=3e-4", "chat.system=null", "seed=7", "data=x=y.jsonl"])
    assert (loaded.lr, loaded.chat.system, loaded.seed, loaded.data) == (3e-4, None, 7, "x=y.jsonl")


@pytest.mark.parametrize(
    ("extra", "overrides", "said"),
    [
        ("lrr: 1\n", [], r"config\.yaml, line 4: `lrr`: unknown key; did you mean `lr`\? Known here: .*lr"),
        ("lr: fast\n", [], r"config\.yaml, line 4: `lr`: must be float, not 'fast'"),
        ("seed: true\n", [], r"line 4: `seed`: must be int"),
        ("seed: 1\nseed: 2\n", [], r"line 5: `seed`: this key is given twice"),
        ("over_length: cut\n", [], r"line 4: `over_length`: must be one of drop, truncate, not 'cut'"),
        ("betas: [0.9]\n", [], r"line 4: `betas`: must have 2 items, not 1"),
        ("chat:\n  prompt: no place\n", [], r"line 5: `chat`: `prompt` must contain \{problem\}"),
        ("lr: [1\n", [], r"config\.yaml, line \d: not valid YAML"),
        ("lr: -1\n", [], r"`lr` must be above 0, not -1"),
        ("max_doc_tokens: 20000\n", [], "`max_doc_tokens` 20000 exceeds `pack_tokens` 16384"),
        ("", ["lr"], "--set lr: expected key=value"),
        ("", ["chat.promp=x"], r"--set chat\.promp=x: `chat\.promp`: unknown key"),
        ("", ["lr=[1]"], r"--set lr=\[1\]: `lr`: must be float"),
    ],
)
def test_errors_say_where(tmp_path: Path, extra: str, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        loader.load(TrainConfig, write(tmp_path, TRAIN + extra), overrides)


def test_an_override_reaches_one_place_of_an_alias(tmp_path: Path) -> None:
    text = "model: m\nproblems: p\nout: o\nstop: &x [a]\nserve:\n  args: *x\n"
    loaded = loader.load(GenerateConfig, write(tmp_path, text), ["serve.args=[b]"])
    assert (loaded.stop, loaded.serve.args) == (["a"], ["b"])


def test_missing_required_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`out`: this key is required"):
        loader.load(TrainConfig, write(tmp_path, "model: a\ndata: b\n"))


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.yaml"):
        loader.load(TrainConfig, tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(InputError, match=r"bytes\.yaml"):
        loader.load(TrainConfig, tmp_path / "bytes.yaml")


def test_no_python_objects_from_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 4"):
        loader.load(TrainConfig, write(tmp_path, TRAIN + "seed: !!python/object/apply:os.getpid []\n"))


def test_defaults_are_not_shared() -> None:
    first, second = (loader.load(GenerateConfig, None, ["model=m", "problems=p", "out=o"]) for _ in range(2))
    first.stop.append("x")
    first.serve.port = 1
    assert second.stop == []
    assert second.serve.port == 0


def test_identity_leaves_out_only_what_cannot_change_the_result() -> None:
    settings = loader.load(EvaluateConfig, None, ["model=m", "out=o", "url=http://x", "concurrency=3"])
    identity = loader.identity(settings)
    assert "url" not in identity
    assert "concurrency" not in identity
    assert identity["serve"]["dtype"] == "auto"
    assert identity["temperature"] == 0.0


def test_every_option_is_documented() -> None:
    for cls in {imported(verb.options) for verb in VERBS.values() if verb.options is not None}:
        for key, _, doc in loader.describe(cls):
            assert doc.strip(), f"{cls.__name__}.{key}"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert loader.load(Recipe, file).name == file.stem


@dataclass(kw_only=True)
class Inner:
    """Options that another one holds."""

    most: int = option(1, doc="a number", alias="limit")


@dataclass(kw_only=True)
class Outer:
    """Options one of which holds others, as they are and by name."""

    inner: Inner | None = option(None, doc="one")
    named: dict[str, Inner] = option({}, doc="many")


def test_an_options_old_name_is_read_with_one_line_of_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "inner: {most: 2}\nnamed:\n  a:\n    limit: 3\n")
    for _ in range(2):
        assert loader.load(Outer, file) == Outer(inner=Inner(most=2), named={"a": Inner(most=3)})
    notice = f"{file}, line 4: `named.a.limit`: now called `most`; the old name will not work in later versions\n"
    assert capsys.readouterr().err == notice


def test_an_override_by_the_old_name_takes_the_place_of_the_new_one_and_the_other_way_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "inner: {most: 2}\nnamed: {a: {limit: 3}}\n")
    loaded = loader.load(Outer, file, ["inner.limit=4", "named.a.most=5"])
    assert loaded == Outer(inner=Inner(most=4), named={"a": Inner(most=5)})
    assert capsys.readouterr().err.startswith("--set inner.limit=4: `inner.limit`: now called `most`")


def test_both_names_of_an_option_are_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "inner:\n  most: 2\n  limit: 2\n")
    with pytest.raises(InputError, match=r"line 3: `inner\.limit`: given twice: `limit` is the old name of `most`"):
        loader.load(Outer, file)


def test_identity_keeps_the_old_name_so_that_finished_stages_stay_done() -> None:
    assert loader.identity(Inner()) == {"limit": 1}
    assert loader.plain(Inner()) == {"most": 1}


@dataclass(kw_only=True)
class Grown:
    limit: int = option(1, doc="it was there when the first runs were made")
    columns: dict[str, str] = option({}, doc="it came later", newer=True)


def test_a_newer_option_at_its_default_leaves_the_identity_of_earlier_runs_as_it_is() -> None:
    assert loader.identity(Grown()) == {"limit": 1}
    assert loader.identity(Grown(columns={"id": "uuid"})) == {"limit": 1, "columns": [["id", "uuid"]]}
