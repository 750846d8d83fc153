#!/usr/bin/env bash
# benchmarks/gpu.sh OUTPUT STAGE...: what is measured on one GPU; JSON and logs land in OUTPUT. A stage that fails does not
# keep the next one from being tried.
#   tests    tests/gpu, four at a time; what the planner said and a run took are properties in tests.xml
#   capped   40 of 70B's 80 layers, nothing gathered, under a cap of 24 GiB
#   steps    the step benchmark, two cases a shape
#   study    word problems: six methods at rank 4, STEPS steps each (100), or what LIMIT seconds leave room for;
#            DATA is a folder as benchmarks/study.sh takes it
#   weights  runs of it with checkpoints, analysed
# PYTHON chooses the interpreter, LIMIT the seconds of a stage (600).
set -uo pipefail
mkdir -p "${1:?give a folder}"
output="$(realpath "$1")"
shift
DATA="${DATA:+$(realpath "$DATA")}"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHON="${PYTHON:-.venv/bin/python}" PYTHONPATH="$PWD" WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

limited() { timeout --signal=TERM --kill-after=30 "${LIMIT:-600}" "$@"; }

stage() {
    case "$1" in
        tests) "$PYTHON" -m pytest tests/gpu -v -n 4 --session-timeout="${LIMIT:-600}" --junitxml="$output/tests.xml" ;;
        capped)
            limited "$PYTHON" benchmarks/capped.py benchmarks/shapes/llama3_3_70b --layers 40 --gib 24 \
                data.max_length=2048 train.num_accumulation_steps=2 quant.embeddings=true parallel=none \
                parallel.offload_activations=true --output "$output/capped.json" ;;
        steps) limited "$PYTHON" benchmarks/run.py --short --repeats 1 --output "$output/step" ;;
        study)
            # Steps of some 4,000 tokens; a GPU of a data centre has room for many runs of this size at once.
            limited benchmarks/study.sh math "$DATA" train.micro_batch_size=8 train.num_steps="${STEPS:-100}" \
                tasks='[gsm8k,svamp,addsub,multiarith,mawps]' batch_size=64 ranks='[4]' \
                "launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=14']" ;;
        weights)
            limited "$PYTHON" benchmarks/weights.py outputs/study-math --output outputs/study-math-weights --jobs 4 ;;
        *) echo "$1: no such stage" >&2 && return 2 ;;
    esac
}

failed=0
for name in "$@"; do
    started=$SECONDS
    stage "$name" || failed=1
    if [[ "$name" == study || "$name" == weights ]]; then  # what is small of it, also of one that did not end
        (cd outputs && tar -czf "$output/$name.tar.gz" --exclude=checkpoints --exclude='*.safetensors' study-math*) || failed=1
    fi
    echo "$name: $((SECONDS - started)) s"
done
exit "$failed"
