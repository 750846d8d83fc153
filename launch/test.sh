#!/usr/bin/env bash
# launch/test.sh [pytest arguments]: the tests, or with `-m soak` those that take long. Sets up .venv and the model first,
# if need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh dev
if (($# == 0)); then
    if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        .venv/bin/python -m pytest tests/gpu
    fi
    # Two at a time, the files with the short tests last; what fails is tried once more by itself.
    again() { (($? == 1)) && .venv/bin/python -m pytest --last-failed --last-failed-no-failures none -m "$1"; }
    beside="not soak and not alone" alone="not soak and alone"
    .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 40 -m "$beside" || again "$beside"
    .venv/bin/python -m pytest -m "$alone" || again "$alone"
    exit
fi
exec .venv/bin/python -m pytest "$@"
