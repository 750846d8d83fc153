#!/usr/bin/env bash
# benchmarks/merges.sh RESULT.json: README's run of twelve steps, merged in every format; what each verification measures.
set -euo pipefail
result="$(realpath -m "${1:?benchmarks/merges.sh RESULT.json}")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh dev
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
run="$work/identity"
launch/train.sh +experiment=smollm2_identity model.path=models/SmolLM2-135M-Instruct train.num_steps=12 \
    tracker=none output_dir="$run"

merge() {  # merge NAME [options]; exit status 3 is a result, too
    local name="$1" status=0
    shift
    .venv/bin/qdora merge run="$run" output="$work/merges/$name" "$@" || status=$?
    ((status == 0 || status == 3)) || exit "$status"
}
merge hf
merge hf-original base=original
merge hf-auto base=auto
merge gguf-q8_0 format=gguf gguf.type=q8_0
merge gguf-q4_0 format=gguf gguf.type=q4_0
merge lora format=lora
merge nf4 format=nf4
merge nf4-original format=nf4 base=original

PYTHONPATH=benchmarks .venv/bin/python - "$work/merges" "$result" <<'PYTHON'
import json
import sys
from pathlib import Path

from provenance import provenance

merges = {
    folder.name: {file: json.loads((folder / f"{file}.json").read_text()) for file in ("merge", "verification")}
    for folder in sorted(Path(sys.argv[1]).iterdir())
}
for merge in merges.values():
    merge["merge"].pop("base")  # a path of this machine
Path(sys.argv[2]).write_text(json.dumps(provenance() | {"merges": merges}, indent=2) + "\n")
PYTHON
echo "written to $result"
