#!/usr/bin/env bash
# launch/test.sh [default|nightly|all] [pytest arguments]: the tests of every change, or those of the night (several
# machines, Slurm, the image, the browser, full matrices, long sweeps), or all. Nightly tests also run if a file changed
# that they name. WORKERS=2 is how many tests run at a time; pytest arguments alone run in one process. Sets up .venv
# and the model first, if need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONDONTWRITEBYTECODE # what tests start again and again is compiled once
launch/setup.sh dev
case "${1:-default}" in
default | nightly | all) tier="${1:-default}" && shift $(($# > 0)) ;;
*) exec .venv/bin/python -m pytest "$@" ;;
esac
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    .venv/bin/python -m pytest tests/gpu
fi
# Files with long tests first, and tests that share a costly run in one worker: see tests/support/tiers.py.
compares_times=tests/e2e/test_merge_size.py # nothing may run beside it
.venv/bin/python -m pytest --tier "$tier" -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations 25 \
    --ignore "$compares_times" "$@"
if [[ "$tier" != default && $# == 0 ]]; then
    .venv/bin/python -m pytest --tier "$tier" "$compares_times"
fi
