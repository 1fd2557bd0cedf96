#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: the tests that need one, then the benchmarks, whose rows are
# appended to bench/results/NAME-DEVICE.jsonl.
#
#     bash scripts/bench_gpu.sh [--quick]
#
# --quick measures small cases, in a few minutes: a check that everything runs here before the full measurement.
# RESULTS=DIR writes the rows there instead of to bench/results.
# Runs .venv/bin/python where its torch sees a GPU, else python3; PYTHON=/path/to/python names another. It needs what
# `pip install -e ".[gpu,test]"` installs; cut-cross-entropy, quack-kernels and trl are measured as well where they are
# installed (TRL_PYTHON=/path/to/python names the interpreter of an environment of its own that has trl).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Contestants of very different sizes take turns; without it they pay for the return of each other's cached memory.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

fail() { echo "error: $*" >&2; exit 1; }

[ $# -eq 0 ] || [ "$*" = --quick ] || fail "unknown arguments: $*; usage: bash scripts/bench_gpu.sh [--quick]"
results="${RESULTS:-bench/results}"

gpu_of() { "$1" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null; }

candidates=(.venv/bin/python python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for python in "${candidates[@]}"; do
    gpu="$(gpu_of "$python")" && break
    gpu=""
done
[ -n "$gpu" ] || fail "no NVIDIA GPU seen by torch in ${candidates[*]}; nothing was run. nvidia-smi shows whether the" \
    "driver sees one; PYTHON=/path/to/python names an interpreter whose torch is built for CUDA"
device="$(tr -cs 'a-z0-9\n' - <<< "${gpu,,}")"
mkdir -p "$results"
echo "$gpu, $("$python" --version), $(command -v "$python")"

"$python" -m pytest -m gpu tests/ || fail "the GPU tests did not pass (above); a wrong answer's speed is not measured"

# measure NAME [ARGUMENT...]: bench/NAME.py
measure() {
    local name="$1"
    shift
    "$python" "bench/$name.py" --json "$results/${name//_/-}-$device.jsonl" "$@" || fail "bench/$name.py; see above"
}
measure loss "$@"
measure row_filter "$@"
measure packing "$@"
measure train "$@" ${TRL_PYTHON:+--trl-python "$TRL_PYTHON"}
echo "Rows are in $results/*-$device.jsonl; done in $((SECONDS / 60)) min $((SECONDS % 60)) s."
