# Sourced by train.sh and train_multinode.sh, after environment.sh: torchrun, such that a signal to the script (SIGTERM,
# SIGUSR1, Ctrl-C) becomes a checkpoint after the step at hand, however long that takes, and the exit status 0.
#
# torchrun itself dies of SIGUSR1, gives its workers 30 s after a SIGTERM that it has passed on, and ends with status 1
# then, whatever they returned. So here it and what it starts ignore these signals (the trainers handle them once they
# can), and the script signals the trainers itself, again each second until all have ended: one that came while they were
# starting is not lost.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-$VENV/bin/python}"
trap 'echo "stopped before training started"; exit 0' TERM USR1

require_trainer() {
    "$python" -c 'import micota_fast.config.loader, importlib.util; assert importlib.util.find_spec("torch")' 2>/dev/null ||
        fail "$python cannot import torch and micota_fast; bash scripts/train.sh makes .venv if it is missing, and" \
            "PYTHON=/path/to/python names another interpreter"
}

# $NPROC, or one for each GPU, or one where torch sees none.
count_processes() {
    echo "${NPROC:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
}

# run_torchrun ARGUMENT...: torchrun with these; returns its status, 130 after Ctrl-C.
run_torchrun() {
    local agent="" status=0 asked=""
    trap 'asked="${asked:-TERM}"' TERM USR1
    trap 'if [ "$asked" = INT ]; then kill -KILL "$agent"; fi; asked=INT' INT # the second one ends it at once
    echo "\$ $python -m torch.distributed.run $*"
    (
        trap '' TERM USR1 INT # what is ignored here stays so in what is started
        # The trainers end with their torchrun, however it ends. Of the signals that it would handle, SIGQUIT is left.
        MICOTA_DIE_WITH_PARENT=1 PET_SIGNALS_TO_HANDLE=SIGQUIT exec "$python" -m torch.distributed.run "$@"
    ) &
    agent=$!
    wait "$agent" || true
    while kill -0 "$agent" 2>/dev/null; do # so a signal has ended the wait
        signal_children_of "$agent"
        sleep 1
    done
    wait "$agent" || status=$? # bash remembers it
    trap - TERM USR1 INT
    [ "$asked" != INT ] || status=130
    return "$status"
}

signal_children_of() {
    local children=()
    read -r -a children < "/proc/$1/task/$1/children" || true
    [ ${#children[@]} = 0 ] || kill -USR1 "${children[@]}" 2>/dev/null || true
}
