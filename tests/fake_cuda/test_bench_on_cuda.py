"""`scripts/bench_gpu.sh` runs as on a machine with a GPU, as far as it needs no values from it.

Every line of the script is executed: the search for an interpreter, the GPU's tests (those of `model/`, up to the
values that they compare) and each benchmark in its small cases, with the processes it starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_cuda.device import NAME
from fake_cuda.start import needs_compiler
from helpers.executables import executable
from helpers.paths import ROOT

pytestmark = [pytest.mark.slow, needs_compiler]

DEVICE = "nvidia-h100-80gb-hbm3"
TESTED = "model"  # the folder of tests that is collected: the others would take longer than all the rest


def as_on_a_gpu(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which PYTHON sees the fake device and nvidia-smi answers."""
    python = executable(
        tmp_path / "python", f'#!/bin/sh\nFAKE_CUDA_PYTHON="$0" exec {sys.executable} -m fake_cuda.interpreter "$@"\n'
    )
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\necho 0\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    others = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != TESTED]
    plugin = ["-p fake_cuda.up_to_values", "-p no:cacheprovider"]
    return environment | {
        "PYTHON": str(python),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
        "PYTEST_ADDOPTS": " ".join([*plugin, *(f"--ignore={path}" for path in others)]),
    }


def script(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "bench_gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(900)  # a dozen processes in turn, on a machine with other work
def test_the_whole_script_runs_up_to_the_numerics(tmp_path: Path) -> None:
    environment = as_on_a_gpu(tmp_path)
    done = script(environment | {"RESULTS": str(tmp_path / "rows"), "TRL_PYTHON": environment["PYTHON"]}, "--quick")
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout
    rows: dict[str, list[dict[str, object]]] = {
        name: [json.loads(line) for line in (tmp_path / "rows" / f"{name}-{DEVICE}.jsonl").read_text().splitlines()]
        for name in ("loss", "row-filter", "packing", "train")
    }
    assert {row["device"] for name in ("loss", "row-filter", "train") for row in rows[name]} == {NAME}
    assert [row for of_bench in rows.values() for row in of_bench if row.get("status") == "failed"] == []
    measured = {row["contestant"] for row in rows["loss"] if row["status"] == "measured"}
    assert {"micota", "dense torch", "liger"} <= measured
    assert all(row["peak_bytes"] for row in rows["loss"] if row["contestant"] == "micota")
    assert {row["dtype"] for row in rows["row-filter"]} == {"bfloat16"}
    assert len({(row["model"], row["row_filter"]) for row in rows["row-filter"]}) == len(rows["row-filter"]) == 3 * 4
    trained = {row["contestant"]: row for row in rows["train"] if row["status"] == "measured"}
    assert trained.keys() >= {"micota", "plain loop"}
    assert trained["micota"]["attention"] == "varlen"


def test_no_figure_of_the_fake_device_is_kept(tmp_path: Path) -> None:
    out = ROOT / "bench" / "results" / f"loss-{DEVICE}.jsonl"
    command = [as_on_a_gpu(tmp_path)["PYTHON"], "bench/loss.py", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=as_on_a_gpu(tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert "figures of a device that is not there do not belong in" in done.stderr
    assert not out.exists()


def test_the_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = script(dict(os.environ), "--fast")
    assert done.returncode == 1
    assert done.stderr == "error: unknown arguments: --fast; usage: bash scripts/bench_gpu.sh [--quick]\n"
