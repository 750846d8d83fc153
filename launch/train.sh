#!/usr/bin/env bash
# launch/train.sh [overrides]: `qdora train` on all GPUs of this machine, or on 2 CPU ranks where there is none.
# NPROC=N chooses the number of ranks. Ctrl-C saves a checkpoint; the same command with output_dir=... goes on.
# -m makes a sweep of it: optim.learning_rate=1e-4,3e-4 trains with the one, then with the other.
set -euo pipefail

threads="${OMP_NUM_THREADS:-}"
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

for argument in "$@"; do
    if [[ "$argument" == -m || "$argument" == --multirun ]]; then
        # Each run of the sweep comes back here, in a process of its own: on another machine, or beside others.
        [[ -n "$threads" ]] || unset OMP_NUM_THREADS
        QDORA_TRAIN="$root/launch/train.sh" exec "$python" -m qdora train "$@"
    fi
done

if ((nproc == 1)); then
    exec "$python" -m qdora train "$@"
fi
exec "$python" -m qdora.commands.launch --standalone --nproc-per-node "$nproc" -m qdora train "$@"
