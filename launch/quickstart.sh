#!/usr/bin/env bash
# launch/quickstart.sh: from nothing to a fine-tuned, merged model that answers, in one command.
# Teaches SmolLM2-135M-Instruct its new name with QDoRA, on all GPUs of this machine or else on 2 CPU ranks.
# What is there already (.venv, model, run, merge) is used again; remove outputs/quickstart to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh

qdora=.venv/bin/qdora
model=models/SmolLM2-135M-Instruct
run=outputs/quickstart
test=data/identity_test.jsonl

gpus="$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')"
export NPROC="${NPROC:-$((gpus > 8 ? 8 : gpus > 0 ? gpus : 2))}"

if [[ ! -f "$run-before/results.json" ]]; then
    echo "== before: the NF4 base model answers $test"
    "$qdora" evaluate model.path="$model" quant=nf4 data.eval="$test" protocol=generate output_dir="$run-before"
fi

echo "== train: QDoRA on $NPROC rank(s)"
# 8 samples a step, divided over the ranks.
launch/train.sh +experiment=smollm2_identity model.path="$model" run_id=quickstart output_dir="$run" \
    train.micro_batch_size="$((NPROC < 8 ? 8 / NPROC : 1))"

echo "== merge"
"$qdora" merge run="$run" output="$run/merged"

if [[ ! -f "$run/after/results.json" ]]; then
    echo "== after: the merged model answers $test"
    "$qdora" evaluate model.path="$run/merged" data.eval="$test" protocol=generate output_dir="$run/after"
fi

.venv/bin/python launch/quickstart_table.py "$run"
