"""What micro/RULES.md presumes of the shipped checkpoints holds; no student is trained here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from micota_fast.micro import build, world
from micota_fast.micro.skills import LEAST, skills

pytestmark = pytest.mark.slow
STUDENT = Path(build.__file__).parent / "checkpoints" / "student"


def test_the_run_without_arms_reports_that_every_precondition_held(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "micota_fast", "run", "micro", "--out", str(tmp_path / "run"), "--set=arms={}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not (tmp_path / "run" / "student").exists()
    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["preconditions"]
    judged = {row["name"].split()[0]: row["held"] for row in found if row["held"] is not None}
    assert set(judged) == {"P1", "P2", "P3", "P4"}
    assert all(row["held"] is not False for row in found), found


def test_the_untrained_student_has_every_elementary_skill() -> None:
    rates = skills(STUDENT, world.dev())
    poor = {
        (style, kind): rate for style, least in LEAST.items() for kind, rate in rates[style].items() if rate < least
    }
    assert not poor
    assert rates["short"]["leap"] < 0.9  # short is too terse for it
    assert {"check verdict", "restated button", "verify step"} <= rates["long"].keys()
