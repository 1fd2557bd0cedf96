"""The report that most tests look at, and its inputs."""

import dataclasses
from pathlib import Path

import pytest

from helpers.report_runs import Made, alignment, answered, graded, made, results, written
from micota_fast.config.report import ReportConfig


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    """Inputs of one's own, to change."""
    return written(tmp_path)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """table.md, report.json and report.html of the unchanged inputs."""
    return made(written(tmp_path_factory.mktemp("report")))


@pytest.fixture
def aligned(tmp_path: Path) -> ReportConfig:
    """Four corpora in the order of nobody's learnability; short averages 31.5%, mid 61%, long 15%; alien has no arm."""
    config = written(tmp_path)
    nats = {"long": 400.0, "alien": 20.0, "mid": 90.0, "short": 30.0}
    corpora = {name: {"alignment": alignment(tmp_path / f"{name}.align.json", of)} for name, of in nats.items()}
    alignment(tmp_path / "mid.align.json", nats["mid"], own=0.25)
    long = [results(tmp_path / "long0.json", {"gsm": 200, "aime": 20})]
    return dataclasses.replace(config, corpora=corpora, arms={**config.arms, "long": long})


@pytest.fixture
def paired(tmp_path: Path) -> ReportConfig:
    """Arms whose graded rows are at hand: short, of one seed, and mid, of three."""
    return ReportConfig(
        title="t",
        out=str(tmp_path / "out"),
        base=graded(tmp_path / "base", answered(0, 0.0)),
        arms={
            "short": [graded(tmp_path / "short", answered(1, 0.2))],
            "mid": [graded(tmp_path / f"mid{i}", answered(2 + i, 1.0)) for i in (0, 1, 2)],
        },
    )
