"""README.md and mergekit_config.yml of a merge: they say how to make it again, and depend on no place."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast.config.merge import MergeConfig
from micota_fast.merge.card import CARD, CONFIG, as_mergekit, card, short_names
from micota_fast.merge.merge import merge
from micota_fast.merge.mergekit import parse_mergekit
from micota_fast.merge.methods import METHODS

TENSORS = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight")
WEIGHT = [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.6}]


def content_of(method: str) -> dict[str, Any]:
    """A file that sets all that a method knows."""
    spec = METHODS[method]
    own: dict[str, Any] = {"weight": WEIGHT, "density": [0.3, 0.6], "gamma": 0.2, "epsilon": 0.1}
    shared: dict[str, Any] = {"normalize": [True, False], "lambda": 0.9, "t": [0.1, 0.7], "int8_mask": True}
    shared["rescale"] = [{"filter": "mlp", "value": ["density", True]}, {"value": False}]
    models = ["org/a"] if spec.one_model else ["org/a", "b"]
    return {
        "merge_method": method,
        "base_model": "org/base",
        "models": [{"model": name, "parameters": {k: own[k] for k in spec.of_models}} for name in models],
        "parameters": {name: shared[name] for name in spec.of_file} | ({} if spec.starts_at_base else {"weight": 0.5}),
        "tokenizer_source": "base",
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_file_makes_the_same_merge(method: str) -> None:
    plan = parse_mergekit(content_of(method), "x")
    names = {"org/base": "org/base", "org/a": "org/a", "b": "b"}
    again = parse_mergekit(yaml.safe_load(as_mergekit(plan, names, "bfloat16")), "y")
    assert (again.method, again.base, again.dtype, again.one_tokenizer) == (method, plan.base, "bfloat16", True)
    assert [entry.model for entry in again.inputs] == [entry.model for entry in plan.inputs]
    for tensor in TENSORS:
        for depth in (0, 0.3, 1):
            assert again.at(tensor, depth) == plan.at(tensor, depth)


def test_names_tell_models_apart_and_no_more(tmp_path: Path) -> None:
    folders = [tmp_path / "run" / name / "model" for name in ("long", "short")]
    folders.append(tmp_path / "student")
    for folder in folders:
        folder.mkdir(parents=True)
    names = short_names([*map(str, folders), "Qwen/Qwen2.5-7B"])
    assert list(names.values()) == ["long/model", "short/model", "student", "Qwen/Qwen2.5-7B"]


def test_the_card_names_method_models_and_configuration() -> None:
    plan = parse_mergekit(content_of("dare_ties"), "x")
    names = {"org/base": "org/base", "org/a": "org/a", "b": "b"}
    text = card(plan, names, as_mergekit(plan, names, None))
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["org/base", "org/a"], "b is a folder, not a model of the hub"
    assert "by [DARE TIES](https://arxiv.org/abs/2311.03099), which starts at `org/base`" in body
    assert "* `org/a`\n* `b`\n" in body
    (shown,) = re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)
    assert shown == as_mergekit(plan, names, None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a")):
        make_checkpoint(folder / name, seed=seed)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_merge_can_be_made_again_from_its_own_file_anywhere(checkpoints: Path, tmp_path: Path) -> None:
    file = {"merge_method": "dare_ties", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    file |= {"parameters": {"density": 0.5}, "out_dtype": "bfloat16"}
    made = []
    for place in ("here", "over there"):
        models = shutil.copytree(checkpoints, tmp_path / place)
        (models / "merge.yaml").write_text(yaml.safe_dump(file))
        merge(MergeConfig(config=str(models / "merge.yaml"), out=str(tmp_path / place / "out"), weights=[0.3, 0.6]))
        made.append(tmp_path / place / "out")
    assert digests(made[0]) == digests(made[1])
    assert {CARD, CONFIG} <= {path.name for path in (made[0] / "weight-0.3").iterdir()}
    for name in (CARD, CONFIG):
        assert str(tmp_path) not in (made[0] / "weight-0.3" / name).read_text()
    shutil.copy(made[0] / "weight-0.3" / CONFIG, models / "again.yaml")
    merge(MergeConfig(config=str(models / "again.yaml"), out=str(tmp_path / "again")))
    assert digests(tmp_path / "again") == digests(made[0] / "weight-0.3")
    assert json.loads((tmp_path / "again" / "merge.json").read_text())["plan"]["inputs"][0]["weight"] == 0.3
