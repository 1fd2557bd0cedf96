#!/usr/bin/env bash
# Trains on this machine, with one process for each GPU (one in all where torch sees none):
#
#     bash scripts/train.sh CONFIG.yaml [--set KEY=VALUE ...] [--profile]
#     NPROC=2 bash scripts/train.sh CONFIG.yaml
#
# Needs .venv with the package (made if it is missing), or another interpreter that can import it: PYTHON=...
# The configuration's keys: .venv/bin/python -m micota_fast.train --help
#
# Ends with status 0 when the run is finished, also if it was finished before, or if SIGTERM or SIGUSR1 ended it
# early with a checkpoint (OUT/summary.json is there only once it is finished); 130 after Ctrl-C, with a checkpoint, too.
# The same command resumes from the last checkpoint, whatever ended the run.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
. "$ROOT/scripts/torchrun.sh"
[ $# -gt 0 ] || { sed -n '2,/^\./s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[ -n "${PYTHON:-}" ] || [ -x "$VENV/bin/python" ] || prepare_environment report
require_trainer
nproc="$(count_processes)"
run_torchrun --standalone --nproc-per-node="$nproc" -m micota_fast.train "$@"
