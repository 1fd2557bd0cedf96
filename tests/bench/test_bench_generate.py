"""bench/generate.py: every contestant does the whole of its work, and the rows say what was measured."""

import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.bench_runs import assert_origin, run
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import generate as bench


@pytest.mark.slow
def test_all_parts(tmp_path: Path) -> None:
    shown, rows = run("generate.py", tmp_path / "rows.jsonl")
    assert shown.startswith("median of 1 runs")
    for row in rows:
        assert_origin(row)
    by_part: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in rows:
        by_part.setdefault(row["part"], {})[row["contestant"], row.get("samples")] = row
    assert list(by_part["client"]) == [("micota", 1), ("micota", 4), ("bare aiohttp", 1)]
    for row in by_part["client"].values():
        assert row["requests"] == 1000
        assert 0 < row["per_s"]["median"] <= row["per_cpu_s"]["median"] * 1.05  # one thread but for the tokenizer's
    assert by_part["client"]["bare aiohttp", 1]["per_cpu_s"]["min"] > by_part["client"]["micota", 1]["per_cpu_s"]["max"]
    [long] = by_part["long"].values()
    assert long["share_of_core"]["median"] > 0
    servers = {name: row for (name, _), row in by_part["server"].items()}
    assert list(servers) == [
        "micota, all at once",
        "micota, one at a time",
        "transformers, batches of 8",
        "transformers, batches of 2",
    ]
    assert {row["answers"] for row in servers.values()} == {8, 2}
    for row in servers.values():
        assert row["as_transformers"] == row["answers"]


def test_the_client_and_its_floor_ask_for_the_same(tmp_path: Path) -> None:
    for name in ("micota", "bare aiohttp"):
        figures = bench.measure_client(name, tmp_path, 50, 2, 8, 20, 0.01)
        assert figures["requests"] == 100
        assert figures["wall_s"] > 100 / 8 * 0.01
