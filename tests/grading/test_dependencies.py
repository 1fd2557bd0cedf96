"""What pyproject.toml asks for can be installed next to what people already have."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import latex2sympy2_extended
import pytest
from packaging.requirements import Requirement

from helpers.paths import ROOT

ASKED = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]


@pytest.mark.parametrize(
    ("runtime", "fits"),
    [
        ("4.9.3", True),  # hydra-core, omegaconf
        ("4.11.0", True),  # lm-eval[math]
        ("4.13.2", True),
        ("4.9.2", False),
        ("4.10", False),
        ("4.11.1", False),
        ("4.12.0", False),
        ("4.13.1", False),
        ("4.13.3", False),
    ],
)
def test_every_antlr_runtime_that_has_a_parser_and_no_other_is_taken(runtime: str, fits: bool) -> None:
    (antlr,) = [asked for asked in ASKED if asked.name == "antlr4-python3-runtime"]
    assert antlr.specifier.contains(runtime) is fits
    grammars = Path(latex2sympy2_extended.__file__).parent / "gen"
    if fits and grammars.is_dir():
        major = runtime.replace(".", "_")
        assert any(major in path.name for path in grammars.iterdir()), "the installed version has a parser for it"


def test_the_runtime_that_is_installed_is_one_of_them() -> None:
    (antlr,) = [asked for asked in ASKED if asked.name == "antlr4-python3-runtime"]
    assert antlr.specifier.contains(version("antlr4-python3-runtime"))
