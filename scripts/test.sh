#!/usr/bin/env bash
# Linters, types and the test suite. Arguments go to pytest: scripts/test.sh -k packing
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff format --check --quiet . || fail "ruff format would change files: .venv/bin/ruff format ."
.venv/bin/ruff check --quiet . || fail "ruff found the above"
.venv/bin/mypy --no-error-summary || fail "mypy found the above"
.venv/bin/python -m pytest -n 2 --dist loadfile "$@" || fail "tests failed; see above"
