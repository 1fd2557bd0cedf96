"""What `scripts/bench_gpu.sh` measures runs as on a machine with a GPU, as far as it needs no values from it.

`bench/row_filter.py` picks rows by a mask, and `bench/train.py` writes models of gigabytes: they are not run here.
"""

import json
from pathlib import Path

import pytest

from fake_cuda.start import needs_compiler, run_scene

pytestmark = [pytest.mark.slow, needs_compiler]


def test_the_loss_bench_writes_a_row_for_each_contestant(tmp_path: Path) -> None:
    out = tmp_path / "loss.jsonl"
    run_scene("bench", program="loss.py", arguments=["--quick", "--json", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["device"] for row in rows} == {"NVIDIA H100 80GB HBM3"}
    assert [row for row in rows if row["status"] == "failed"] == []
    measured = {row["contestant"] for row in rows if row["status"] == "measured"}
    assert {"micota", "dense torch", "liger"} <= measured
    assert all(row["peak_bytes"] > 0 for row in rows if row["contestant"] == "micota")
