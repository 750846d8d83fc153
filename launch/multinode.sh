#!/usr/bin/env bash
# launch/multinode.sh [overrides]: `qdora train` over several machines. The same command on each of them, with
#   HEAD=HOST[:PORT]  the one at which they meet: a name or address by which all reach it; port 29400 if none is given
#   RUN_ID=NAME       the run, and its folder outputs/NAME, which has to lie on a file system that all of them share
#   NNODES=N          how many machines, 2 if not given; MIN:MAX goes on with MIN while others are missing
#   NODE=I            0 on HEAD; only where its address does not tell, such as behind a translation of addresses
#   NPROC=N           ranks of this machine: its GPUs, or 2 where it has none
#   MAX_RESTARTS=N    how often failing ranks are started again, 3 if not given, from the run's last checkpoint
# A machine that was lost comes back with the same command. Exit status 75: saved, the same command on each goes on.
set -euo pipefail

complain() {
    echo "qdora: $1" >&2
    exit 2
}
nnodes="${NNODES:-2}"
[[ -n "${HEAD:-}" ]] || complain "HEAD is not set: give the name or address of the first machine, the same on each"
[[ -n "${RUN_ID:-}" ]] || complain "RUN_ID is not set: give the run a name, the same on each machine"
[[ "$RUN_ID" =~ ^[A-Za-z0-9._-]+$ ]] || complain "RUN_ID=$RUN_ID: a name has letters, digits, dots, - and _ only"
[[ "$nnodes" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || complain "NNODES=$nnodes is not a number of machines, nor MIN:MAX"
[[ "${NODE:-0}" =~ ^[0-9]+$ ]] || complain "NODE=$NODE is not the number of this machine: 0 on HEAD, 1 or more elsewhere"
[[ "${MAX_RESTARTS:-3}" =~ ^[0-9]+$ ]] || complain "MAX_RESTARTS=$MAX_RESTARTS is not a number of restarts"

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# torchrun's own store outlives a restart, which its machines may count differently: each start gets one of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # else a warning for each address without a name
exec "$python" -m qdora.commands.launch \
    --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" \
    ${NODE:+--rdzv-conf "is_host=$((NODE == 0))"} \
    -m qdora train "run_id=$RUN_ID" "$@"
