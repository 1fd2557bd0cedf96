"""Models that are too large for the GPUs: the table of the docs and the variants of the recipes are computed."""

import re
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import RECIPES
from micota_fast.planning.plan import make_plan

sys.path.insert(0, str(ROOT / "scripts"))

import memory_table


def test_the_table_of_the_docs_is_what_the_script_prints() -> None:
    assert memory_table.table() in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["micota-qwen2.5-3b", "micota-qwen2.5-7b"])
def test_the_variant_for_four_gpus_of_40_gb_fits(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    comment = path.read_text(encoding="utf-8").partition("# Four GPUs of 40 GB")[2].partition("# data_dir")[0]
    arguments = re.findall(r"--set (?!data_dir)(\S+)", comment)
    assert "launch.nproc=4" in arguments

    def too_big(*overrides: str) -> list[str]:
        recipe = loader.load(Recipe, path, ("claims=null", *overrides))
        made = make_plan(recipe, path, Path("/nowhere/run"), gpu="a100-40gb", gpus=4)
        return [cost.stage for cost in made.costs if cost.too_big]

    assert too_big("launch.nproc=4")
    assert too_big(*arguments) == []
