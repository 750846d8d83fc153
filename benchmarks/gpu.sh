#!/usr/bin/env bash
# benchmarks/gpu.sh OUTPUT [options of session.py]: what is to be known of one GPU, in twelve minutes, into
# OUTPUT/session.json. PYTHON chooses the interpreter. WHEELS is a folder of wheels that it lacks, installed beside it
# without a network: `pip download --no-deps -d WHEELS bitsandbytes hydra-core omegaconf antlr4-python3-runtime==4.9.3`
# on a machine that has one.
set -euo pipefail
output="$(realpath -m "${1:?give a folder}")"
shift
WHEELS="${WHEELS:+$(realpath "$WHEELS")}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
if [[ -n "$WHEELS" ]]; then
    site="$(mktemp -d)"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # where qdora is not installed
exec "$PYTHON" benchmarks/session.py "$output" "$@"
