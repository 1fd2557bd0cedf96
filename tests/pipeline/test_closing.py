"""The end of `micota run`: one small table, three lines, read from the report's own numbers."""

import json
from pathlib import Path

import pytest

from helpers.report_runs import written
from micota_fast.errors import InputError
from micota_fast.pipeline.closing import closing
from micota_fast.report.report import run


def reported(folder: Path, trained: bool = True) -> Path:
    """The folder of a run whose report has been made."""
    config = written(folder)
    config.out = str(folder / "report")
    if not trained:
        config.arms, config.training = {}, {}
    run(config)
    return folder


def test_a_run_ends_with_one_small_table_and_three_lines(tmp_path: Path) -> None:
    folder = reported(tmp_path)
    *table, empty, report, answers, following = closing(folder, 7).split("\n")
    assert empty == ""
    assert [row.split() for row in table] == [
        ["arm", "average,", "%", "delta,", "points", "answer,", "tokens"],
        ["base", "30.0", "-", "50.0"],
        ["short", "31.5", "+1.5", *table[2].split()[3:5], "50.0"],
        ["mid", "61.0", "+31.0", *table[3].split()[3:5], "50.0"],
    ]
    numbers = json.loads((folder / "report" / "report.json").read_text())["arms"]["mid"]["delta"]
    assert "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in numbers["interval95"])) in table[3]
    assert len({len(row) for row in table}) == 1, "columns are aligned"
    assert report.split() == ["report:", str(folder / "report" / "report.html")]
    assert answers.split() == ["answers:", str(folder / "report" / "answers.html")]
    assert following.endswith(f"micota serve {folder}/student/mid-seed7/model"), "the best arm's"


def test_without_a_trained_arm_the_next_step_is_to_name_one(tmp_path: Path) -> None:
    told = closing(reported(tmp_path, trained=False), 0)
    assert "`arms`" in told.split("\n")[-1]
    assert "serve" not in told


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"arm_order": ["base"], "arms": {"base": {}}}')
    with pytest.raises(InputError, match=r"report\.json: key 'arms\.base\.average'"):
        closing(tmp_path, 0)
