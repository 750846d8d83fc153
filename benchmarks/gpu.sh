#!/usr/bin/env bash
# benchmarks/gpu.sh OUTPUT [options of session.py]: what is to be known of one GPU, in twelve minutes, into
# OUTPUT/session.json. PYTHON chooses the interpreter. WHEELS is a folder of wheels that it lacks, installed beside it
# without a network; on a machine that has one, with PYTHON's version of Python:
#   pip wheel --no-deps -w WHEELS bitsandbytes hydra-core omegaconf antlr4-python3-runtime==4.9.3 gguf
set -euo pipefail
output="$(realpath -m "${1:?give a folder}")"
shift
WHEELS="${WHEELS:+$(realpath "$WHEELS")}"
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
[[ "$PYTHON" == /* || "$PYTHON" != */* ]] || PYTHON="$here/$PYTHON"
if [[ -n "$WHEELS" ]]; then
    site="$(mktemp -d)"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # where qdora is not installed
exec "$PYTHON" benchmarks/session.py "$output" "$@"
