#!/usr/bin/env bash
# Makes the micro world's problems, tokenizer and pre-trained models from nothing (see micota_fast/micro/README.md), and
# puts them where they ship. One thread, no network. Stopped half-way, the same command goes on from there.
#   bash scripts/build_micro.sh [--out DIR] [--work DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || { echo "no .venv here: run scripts/quickstart.sh or scripts/test.sh first" >&2; exit 1; }
OMP_NUM_THREADS=1 exec "$python" -m micota_fast.micro.build "$@"
