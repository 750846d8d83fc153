# shellcheck shell=bash
# Sourced by train.sh and multinode.sh. Sets root, python and nproc, the ranks of this machine (NPROC, else one for each
# GPU, else 2), and exports what threads and the allocator of a rank need.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -x "$python" ]] || python="$(command -v python3)"

trap 'exit 130' INT
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)"
trap - INT
nproc="${NPROC:-$((gpus > 0 ? gpus : 2))}"
if [[ ! "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "qdora: NPROC=$nproc is not a number of ranks: give 1 or more" >&2
    exit 2
fi

if ((gpus == 0)); then
    cores="$(nproc)"
    # One thread a core and rank: threads of several ranks on the same cores cost ten times the work.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
else
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
fi
