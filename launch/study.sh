#!/usr/bin/env bash
# launch/study.sh: a 10-minute version of the study of benchmarks/results, from nothing, on 2 CPU cores or on GPUs.
# Trains LoRA and DoRA (rank 4) over SmolLM2-135M and over its NF4 form, two seeds each at one learning rate, on the
# commonsense mix; scores 60 questions; writes outputs/study/report.html. It shows how a study works, not who wins:
# 6 steps teach the form of an answer. What is there already is used again; remove outputs/study to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh sweep

data=outputs/study-data
if [[ ! -f "$data/small/openbookqa.jsonl" ]]; then
    .venv/bin/python launch/commonsense_data.py "$data"
    mkdir -p "$data/small"
    awk 'NR % 20 == 1' "$data/val_mix.jsonl" >"$data/tune.jsonl"
    head -n 60 "$data/test/openbookqa.jsonl" >"$data/small/openbookqa.partial"
    mv "$data/small/openbookqa.partial" "$data/small/openbookqa.jsonl"
fi

launcher=()
if .venv/bin/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; then  # two at a time on CPU cores
    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
    launcher=("launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=2']")
fi
rates=()
for method in lora dora qlora qdora; do
    rates+=("methods.$method.learning_rates=[3e-3]")
done
.venv/bin/qdora study +study=smollm2_commonsense '~methods.full' '~methods.full_nf4' "${rates[@]}" \
    ranks='[4]' seeds='[0,1]' train.num_steps=6 model.path=models/SmolLM2-135M-Instruct parallel=none \
    data.train="$data/train_mix.jsonl" data.eval="$data/tune.jsonl" tasks_path="$data/small" output_dir=outputs/study \
    "${launcher[@]}"
.venv/bin/qdora report study=outputs/study
