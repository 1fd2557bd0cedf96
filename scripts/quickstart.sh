#!/usr/bin/env bash
# From a fresh clone to the report of a whole MiCoTA run (recipe `micro`), on a CPU. Arguments go to `micota run micro`.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment report
"$VENV/bin/micota" run micro --out "$ROOT/runs/micro" "$@" ||
    fail "the run stopped; the message is above. Run the same command to resume"
