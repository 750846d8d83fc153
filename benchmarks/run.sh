#!/usr/bin/env bash
# benchmarks/run.sh [options of step.py]: the step benchmark on this machine; leave it alone meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh dev
export OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python benchmarks/step.py --model models/SmolLM2-135M-Instruct \
    --output "benchmarks/results/step-$(date +%Y-%m-%d).json" "$@"
