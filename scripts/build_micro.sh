#!/usr/bin/env bash
# Makes what the micro world ships, from nothing: problems, tokenizer and the three pre-trained models, with the
# production trainer. What was tried, and how long it takes: micota_fast/micro/README.md. Arguments go to the program.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment report
cd "$ROOT"
.venv/bin/python -m micota_fast.micro.build "$@" || fail "the build stopped; run the same command to resume"
