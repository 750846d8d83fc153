#!/usr/bin/env bash
# benchmarks/study.sh NAME DATA [options of qdora study]: a study of benchmarks/results, in outputs/study-NAME; the same
# command goes on. NAME is commonsense, math or operations (conf/study/smollm2_NAME.yaml); DATA has train_mix (.jsonl or
# .jsonl.gz), test/ and maybe val_mix: launch/commonsense_data.py makes it of the first, word_problems.py of the last.
# PYTHON chooses the interpreter. Afterwards weights.py looks at what was learned.
set -euo pipefail
name="${1:?give commonsense, math or operations}" data="$(realpath "${2:?give the folder of the data}")"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
python="${PYTHON:-.venv/bin/python}" output="outputs/study-$name"

# Rows that find the learning rates: some of val_mix, or a twentieth of train_mix, which is then not trained on.
mkdir -p "$output-data"
train="$output-data/train.jsonl" tune="$output-data/tune.jsonl"
files=("$data"/train_mix.jsonl*)
((${#files[@]} == 1)) || { echo "$0: one train_mix, please: ${files[*]}" >&2; exit 2; }
gzip -dcf "${files[0]}" >"$output-data/all.jsonl"
if compgen -G "$data/val_mix.jsonl*" >/dev/null; then
    mv "$output-data/all.jsonl" "$train"
    gzip -dcf "$data"/val_mix.jsonl* | awk 'NR % 10 == 1' >"$tune"
else
    awk 'NR % 20 == 1' "$output-data/all.jsonl" >"$tune"
    awk 'NR % 20 != 1' "$output-data/all.jsonl" >"$train"
    rm "$output-data/all.jsonl"
fi
"$python" -m qdora study "+study=smollm2_$name" model.path=models/SmolLM2-135M-Instruct parallel=none \
    data.train="$train" data.eval="$tune" tasks_path="$data/test" output_dir="$output" \
    "launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=2']" "$@"
"$python" -m qdora report study="$output"
