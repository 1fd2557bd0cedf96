"""Running the programs of bench/ and checking what they say of themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.paths import ROOT

# Where a GPU is present the programs measure that instead, which takes longer than a test may.
CPU_ALONE = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MERGEKIT_PYTHON": ""}


def run(program: str, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """Standard output and rows of `python bench/PROGRAM --quick`."""
    command = [sys.executable, str(ROOT / "bench" / program), "--quick", "--json", str(out)]
    done = subprocess.run(command, env=CPU_ALONE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def assert_origin(row: dict[str, Any]) -> None:
    assert row["machine"].endswith(f"Python {'.'.join(map(str, sys.version_info[:3]))}")
    assert row["versions"]["micota-fast"]
    assert row["date"].startswith("20")
    assert row["commit"] is None or len(row["commit"].removesuffix("-dirty")) == 40
