"""What `scripts/bench_gpu.sh` measures runs as on a machine with a GPU, as far as it needs no values from it.

`bench/train.py` starts trainers in processes of their own, which are not given the fake device: it is not run here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_cuda.start import needs_compiler
from helpers.paths import ROOT

pytestmark = [pytest.mark.slow, needs_compiler]


def bench(program: str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "fake_cuda.interpreter", f"bench/{program}", "--quick", "--json", str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows_of(program: str, out: Path) -> list[dict[str, object]]:
    done = bench(program, out)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    rows: list[dict[str, object]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["device"] for row in rows} == {"NVIDIA H100 80GB HBM3"}
    return rows


def test_the_loss_bench_writes_a_row_for_each_contestant(tmp_path: Path) -> None:
    rows = rows_of("loss.py", tmp_path / "loss.jsonl")
    assert [row for row in rows if row["status"] == "failed"] == []
    measured = {row["contestant"] for row in rows if row["status"] == "measured"}
    assert {"micota", "dense torch", "liger"} <= measured
    assert all(row["peak_bytes"] for row in rows if row["contestant"] == "micota")


def test_the_row_filters_bench_writes_a_row_for_each_model_and_filter(tmp_path: Path) -> None:
    rows = rows_of("row_filter.py", tmp_path / "rows.jsonl")
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert len({(row["model"], row["row_filter"]) for row in rows}) == len(rows) == 3 * 4


def test_no_figure_of_the_fake_device_is_kept() -> None:
    out = ROOT / "bench" / "results" / "loss-nvidia-h100-80gb-hbm3.jsonl"
    done = bench("loss.py", out)
    assert done.returncode == 1
    assert "figures of a device that is not there do not belong in" in done.stderr
    assert not out.exists()
