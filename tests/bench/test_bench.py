"""The benchmark programs run as their users run them; their rows say what was measured, where, and of which making."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bench_runs import CPU_ALONE, assert_origin, run
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from loss import Race, inputs
from loss_cases import IGNORE_INDEX, MISS_AT, MISS_QUANTILES, Case, grid

from micota_fast.kernels.reference import dense_linear_cross_entropy


@pytest.mark.slow
def test_loss(tmp_path: Path) -> None:
    shown, rows = run("loss.py", tmp_path / "rows.jsonl")
    assert shown.startswith("CPU figures")
    measured = {}
    for row in rows:
        assert_origin(row)
        assert row["device"] == "cpu"
        if row["status"] == "absent":
            assert f"absent: {row['contestant']}: {row['reason']}" in shown
        else:
            measured[row["contestant"], row["masked"], row["top"]] = row
    assert all(row["status"] == "measured" for (name, *_), row in measured.items() if not name.startswith("trl"))
    assert {"bare GEMMs", "micota", "dense torch", "micota, top"} <= {name for name, *_ in measured}
    for (name, masked, top), row in measured.items():
        if row["status"] != "measured":
            continue
        gemms = measured["bare GEMMs", masked, top]
        assert row["of_gemms"] == pytest.approx(row["both_s"] / gemms["both_s"])
        flop = 6 * row["supervised"] * row["hidden_size"] * row["vocab_size"]
        assert row["tflop_per_s"] * row["both_s"] == pytest.approx(flop / 1e12)
        assert row["supervised"] == pytest.approx(row["tokens"] * (1 - masked), rel=0.02)
        if "filter" not in name and name != "bare GEMMs":
            assert max(row["error_loss"], row["error_hidden"], row["error_weight"]) < 1e-4
    # All 256 x 2,000 logits in float32 is what the dense loss holds at least, and more than once.
    assert measured["dense torch", 0, 0]["peak_bytes"] > 2 * 256 * 2000 * 4
    filtered = measured["micota, filter 0.001", 0.3, 0]
    assert measured["micota", 0.3, 0]["error_weight"] < filtered["error_weight"] < 0.1, "nothing was left out"


@pytest.mark.slow
def test_row_filter(tmp_path: Path) -> None:
    shown, rows = run("row_filter.py", tmp_path / "rows.jsonl")
    assert shown.startswith("CPU figures")
    assert {row["model"] for row in rows} == {"micro student", "micro assistant", "micro teacher"}
    for row in rows:
        assert_origin(row)
        assert row["error_hidden"] <= row["bound_hidden"]
        assert row["error_weight"] <= row["bound_weight"]
        if row["row_filter"] == 0:
            assert row["share_left_out"] == row["error_weight"] == 0
        if row["row_filter"] == 1e-2:
            assert row["share_left_out"] > 0.5, "trained models are sure of most tokens of their own world"
            assert row["error_weight"] > 0


@pytest.mark.slow
def test_merge(tmp_path: Path) -> None:
    shown, rows = run("merge.py", tmp_path / "rows.jsonl")
    assert shown.startswith("absent: mergekit: no --mergekit-python\n")
    assert (rows[0]["contestant"], rows[0]["status"]) == ("mergekit", "absent")
    assert [(row["method"], row["contestant"]) for row in rows[1:]] == [
        (method, contestant) for method in ("ties", "dare_ties") for contestant in ("micota", "cp", "read, write")
    ]
    for row in rows[1:]:
        assert_origin(row)
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["of_cp"] > 0
        assert row["peak_own_bytes"] < row["peak_mapped_bytes"] or row["contestant"] != "micota"


@pytest.mark.slow
def test_packing_appends(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"earlier": true}\n')
    _, (earlier, *rows) = run("packing.py", out)
    assert earlier == {"earlier": True}
    for row in rows:
        assert_origin(row)
    assert rows[0]["packs"] >= rows[0]["least_possible"] > 0


def test_a_contestant_that_raises_is_a_row_and_the_others_go_on() -> None:
    def out_of_memory(given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("of 80 GiB")

    def broken(given: Any) -> torch.Tensor:
        raise ValueError("no such shape\nand more")

    race = Race({"large": out_of_memory, "broken": broken, "sound": lambda given: torch.ones(())})
    race.each(lambda name, forward: {"loss": float(forward(None))})  # type: ignore[arg-type]
    assert race.rows == {
        "large": {"status": "out of memory"},
        "broken": {"status": "failed", "reason": "ValueError: no such shape"},
        "sound": {"status": "measured", "loss": 1.0},
    }
    assert list(race.running) == ["sound"]


@pytest.mark.parametrize("logits", MISS_QUANTILES)
def test_trained_like_logits_have_the_measured_quantiles(logits: str) -> None:
    given = inputs(Case("small", 1024, logits=logits, dtype=torch.float32), "cpu")
    with torch.no_grad():
        nll_N = dense_linear_cross_entropy(
            given.hidden.double(), given.weight.double(), given.targets, reduction="none"
        )
    got = torch.quantile(-torch.expm1(-nll_N), torch.tensor(MISS_AT, dtype=torch.float64)).log()
    # The other logits are as large as chance has it; a third up or down is far less than what sets models apart.
    torch.testing.assert_close(got, torch.tensor(MISS_QUANTILES[logits]).double().log(), rtol=0, atol=math.log(1.33))


def test_masked_tokens_are_runs() -> None:
    given = inputs(Case("tiny", 4096, masked=0.7, dtype=torch.float32), "cpu")
    masked = given.targets == IGNORE_INDEX
    assert given.n_supervised == int((~masked).sum())
    assert int((masked[1:] & ~masked[:-1]).sum()) < 64  # documents, not single tokens
    assert bool(masked[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_cases_cover_every_axis(device: str) -> None:
    chosen, every = grid(device, quick=False, full=False), grid(device, quick=False, full=True)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) < set(every)
    for axis in ("model", "tokens", "masked", "logits", "dtype", "top"):
        assert {getattr(case, axis) for case in chosen} == {getattr(case, axis) for case in every}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so the script would run all of it")
def test_the_gpu_script_refuses_without_a_gpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "bench_gpu.sh")]
    done = subprocess.run(command, env={**CPU_ALONE, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no NVIDIA GPU seen" in done.stderr
    assert done.stdout == ""
