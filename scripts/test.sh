#!/usr/bin/env bash
# Linters, types and the tests that are not marked `slow`; with --all, every test. Other arguments go to pytest:
# `scripts/test.sh -k packing`, or `scripts/test.sh tests/merge`, which runs these tests alone, without linters and types.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$ROOT"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
tier=(-m "not slow") whole=yes arguments=()
for argument in "$@"; do
    case "$argument" in
        --all) tier=() ;;
        *) arguments+=("$argument"); [ ! -e "${argument%%::*}" ] || tier=() whole= ;;
    esac
done
if [ -n "$whole" ]; then
    .venv/bin/ruff format --check --quiet . || fail "ruff format would change files: .venv/bin/ruff format ."
    .venv/bin/ruff check --quiet . || fail "ruff found the above"
    .venv/bin/mypy --no-error-summary || fail "mypy found the above"
fi
.venv/bin/python -m pytest -n 2 --dist loadfile "${tier[@]}" "${arguments[@]}" || fail "tests failed; see above"
