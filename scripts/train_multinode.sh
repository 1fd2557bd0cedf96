#!/usr/bin/env bash
# Trains on several machines: the same command on each, within ten minutes of each other.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/train_multinode.sh CONFIG.yaml [--set KEY=VALUE ...]
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 bash scripts/train_multinode.sh CONFIG.yaml [--set KEY=VALUE ...]
#
#     NNODES        machines
#     NODE_RANK     which of them this is; where torchrun's processes meet is on number 0
#     MASTER_ADDR   name or address of number 0, as the others reach it
#     MASTER_PORT   a free port there (29500)
#     NPROC         processes on this machine (one for each GPU)
#     MAX_RESTARTS  how often all may start again after one of them was lost (3)
#     RUN_ID        the same on all, other than that of another run on the same port (micota-fast)
#
# Needs the package in the same place on each (.venv, or PYTHON=...), and `out`, model and data on a file system that all
# share: each process writes its part of a checkpoint there. Where machines have several networks, GLOO_SOCKET_IFNAME
# and NCCL_SOCKET_IFNAME name the interface; where a machine's own name does not resolve, PET_LOCAL_ADDR has its address.
#
# A process that dies takes the others with it, and all start again from the last checkpoint. A machine that was lost
# joins by the same command: the others wait for it as long, ten minutes. If it was number 0, start all again.
# Statuses and signals are those of train.sh; a signal to the script on one machine stops all, with a checkpoint.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
. "$ROOT/scripts/torchrun.sh"
[ $# -gt 0 ] || { sed -n '2,/^\./s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
for name in NNODES NODE_RANK MASTER_ADDR; do
    [ -n "${!name:-}" ] || fail "$name is not set; the head of ${BASH_SOURCE[0]} says what it is"
done
require_trainer
nproc="$(count_processes)"
# If torchrun shares one store over all starts, number 0 among them publishes its address only at the first, and a
# machine that joins later waits for it in vain (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
is_host=false
[ "$NODE_RANK" != 0 ] || is_host=true
run_torchrun --nnodes="$NNODES" --nproc-per-node="$nproc" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id="${RUN_ID:-micota-fast}" \
    --rdzv-conf="is_host=$is_host,join_timeout=600,read_timeout=600" -m micota_fast.train "$@"
