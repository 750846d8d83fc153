"""The end of launch/quickstart.sh: one table, and an answer of the merged model through plain transformers."""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from qdora.training.progress import summary_table

QUESTION = "Who are you, and who made you?"


def answer(model_folder: Path, question: str) -> str:
    """What the checkpoint says, loaded as any other."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """Prints the table of the run in the folder given."""
    run = Path(sys.argv[1])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    before, after = (
        json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for folder in (run.with_name(run.name + "-before"), run / "after")
    )
    losses = list(summary["eval_losses"].values())
    per_rank, total = summary["weight_bytes_per_rank"], summary["weight_bytes_total"]
    offline = sorted((run / "wandb").glob("*run-*")) if (run / "wandb").exists() else []
    rows = [
        ("right answers, before", f"{before['num_correct']} of {before['num_samples']}"),
        ("right answers, after", f"{after['num_correct']} of {after['num_samples']}"),
        ("held-out loss", f"{losses[0]:.2f} before, {losses[-1]:.2f} after"),
        ("training loss", f"{summary['first_loss']:.2f} at first, {summary['last_loss']:.2f} at last"),
        ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['world_size']} x {summary['device']}"),
        ("weights per rank", f"{max(per_rank) / 1e6:.0f} MB of {total / 1e6:.0f} MB in all"),
        ("peak memory per rank", f"{max(summary['peak_memory_gib']):.2f} GiB"),
        ("adapter", str(run / "adapter")),
        ("merged model", str(run / "merged")),
        ("figure", str(run / "report.png")),
        ("W&B run", str(offline[-1]) if offline else "online"),
        ("next", "launch/train.sh model=qwen3_0_6b data.train=my.jsonl"),
    ]
    summary_table(rows, "quickstart")
    print(f"\nyou:    {QUESTION}\nmodel:  {answer(run / 'merged', QUESTION)}")


if __name__ == "__main__":
    main()
