#!/usr/bin/env bash
# benchmarks/study.sh DATA [OUTPUT]: the study of benchmarks/results, hours on 2 CPU cores; the same command goes on.
# DATA holds train_mix, val_mix (.jsonl or .jsonl.gz) and test/, as launch/commonsense_data.py makes them. Then four
# runs with checkpoints, whose weights are analysed. Ends with what is kept in benchmarks/results.
set -euo pipefail
data="$(realpath "${1:?give the folder of the data}")"
output="${2:-outputs/study-commonsense}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
qdora=.venv/bin/qdora
model=models/SmolLM2-135M-Instruct
train="$(ls "$data"/train_mix.jsonl*)"

mkdir -p "$output-data"
gzip -dcf "$data"/val_mix.jsonl* | awk 'NR % 10 == 1' >"$output-data/tune.jsonl"  # 80 of the 800 rows
"$qdora" study +study=smollm2_commonsense model.path="$model" parallel=none data.train="$train" \
    data.eval="$output-data/tune.jsonl" tasks_path="$data/test" output_dir="$output" \
    "launcher=['hydra/launcher=joblib','hydra.launcher.n_jobs=2']"
"$qdora" report study="$output"

# Each at the learning rate that the study found best for it at rank 4.
.venv/bin/python - "$output/study.json" >"$output-data/arms" <<'PYTHON'
import json
import sys

adapters = {"full": "none none", "lora": "lora none", "dora": "dora none", "qdora": "dora nf4"}
for arm in json.load(open(sys.argv[1]))["arms"]:
    if arm["method"] in adapters and arm["rank"] in (None, 4):
        print(arm["method"], adapters[arm["method"]], arm["learning_rate"])
PYTHON
while read -r name adapter quant rate; do
    "$qdora" train model.path="$model" adapter="$adapter" quant="$quant" adapter.rank=4 optim.learning_rate="$rate" \
        parallel=none tracker=none data.train="$train" data.max_length=512 optim.schedule=linear \
        optim.warmup_ratio=0.1 train.num_steps=40 train.micro_batch_size=2 train.num_accumulation_steps=1 \
        train.checkpoint_every=8 train.keep_checkpoints=5 output_dir="$output-weights/$name"
    [[ -f "$output-weights/$name/analysis/analysis.json" ]] || "$qdora" analyze run="$output-weights/$name"
done <"$output-data/arms"
