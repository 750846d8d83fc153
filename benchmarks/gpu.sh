#!/usr/bin/env bash
# benchmarks/gpu.sh OUTPUT STAGE...: what is measured on a GPU, some minutes a stage; JSON and logs land in OUTPUT.
#   tests    tests/gpu, several at a time; what the planner said and a run took are properties in tests.xml
#   capped   40 of 70B's 80 layers, as one of two ranks holds them, under a cap of 24 GiB
#   steps    the step benchmark, two cases a shape
#   study    word problems: six methods at two ranks; DATA is a folder as benchmarks/study.sh takes it
#   weights  runs of it with checkpoints, analysed
# PYTHON chooses the interpreter.
set -euo pipefail
output="$(realpath "${1:?give a folder}")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON="${PYTHON:-.venv/bin/python}" PYTHONPATH="$PWD" WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

kept() {  # NAME: what is small of outputs/study-math*
    (cd outputs && tar -czf "$output/$1.tar.gz" --exclude=checkpoints --exclude='*.safetensors' study-math*)
}

for stage in "$@"; do
    started=$SECONDS
    case "$stage" in
        tests) "$PYTHON" -m pytest tests/gpu -v -n 6 --session-timeout="${LIMIT:-600}" \
            --junitxml="$output/tests.xml" -o junit_family=xunit1 ;;
        capped)
            "$PYTHON" benchmarks/capped.py benchmarks/shapes/llama3_3_70b --layers 40 --gib 24 \
                data.max_length=2048 train.num_accumulation_steps=2 quant.embeddings=true parallel=none \
                parallel.offload_activations=true --output "$output/capped.json" ;;
        steps) "$PYTHON" benchmarks/run.py --short --repeats 1 --output "$output/step" ;;
        study)
            # Steps of some 4,000 tokens; a GPU of a data centre has room for many runs of this size at once.
            benchmarks/study.sh math "${DATA:?give DATA}" train.micro_batch_size=8 train.num_steps="${STEPS:-100}" \
                tasks='[gsm8k,svamp,addsub,multiarith,mawps]' batch_size=64 ranks='[4]' \
                "launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=14']"
            kept study ;;
        weights)
            "$PYTHON" benchmarks/weights.py outputs/study-math --output outputs/study-math-weights --jobs 4
            kept weights ;;
        *) echo "$stage: no such stage" >&2 && exit 2 ;;
    esac
    echo "$stage: $((SECONDS - started)) s"
done
