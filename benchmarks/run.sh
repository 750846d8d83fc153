#!/usr/bin/env bash
# benchmarks/run.sh [options of run.py]: the benchmark on this machine, in benchmarks/results/; leave it alone meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh dev
exec .venv/bin/python benchmarks/run.py "$@"
