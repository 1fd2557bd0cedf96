"""The soak, ten seconds of it: nothing is lost and /health answers; whether memory is flat takes ten minutes to see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    row = tmp_path / "row.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--seconds", "10", "--json", str(row)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert row.is_file(), done.stderr[-2000:]
    found = json.loads(row.read_text())
    assert (found["lost"], found["first_lost"]) == (0, [])
    assert all(sum(counts.values()) > 0 for kind, counts in found["outcomes"].items() if kind != "hostile")
    assert found["health_probes"] > 0
    # How quick /health is, and whether memory is flat, is for a quiet machine to say.
    assert found["passed"] == (done.returncode == 0)
