#!/usr/bin/env bash
# launch/test.sh [default|nightly|all|pytest arguments]: the tests of every change, or those of the night (several
# machines, Slurm, the image, the browser, full matrices, long sweeps), or all. Nightly tests also run if a file changed
# that they name. Sets up .venv and the model first, if need be. WORKERS=2 is how many tests run at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh dev
case "${1:-default}" in
default | nightly | all) tier="${1:-default}" && shift $(($# > 0)) ;;
*) exec .venv/bin/python -m pytest "$@" ;;
esac
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    .venv/bin/python -m pytest tests/gpu
fi
# Files with long tests first, and tests that share a costly run in one worker: see tests/support/tiers.py.
exec .venv/bin/python -m pytest --tier "$tier" -n "${WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
    --durations 25 "$@"
