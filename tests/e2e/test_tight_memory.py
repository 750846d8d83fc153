"""What fits a large model on small cards changes where things are, not what is learned: through a whole run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import QUICK, adapter_of, losses_of, summary_of, train_and_summarise

TIGHT = [
    *("parallel.gather=part", "parallel.offload_activations=true", "parallel.cpu_offload=true"),
    *("adapter.dropout=0.1", "optim.schedule=constant", "optim.warmup_ratio=0", "quant.embeddings=true"),
]
USUAL = [option for option in TIGHT if not option.startswith("parallel.")]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three blocks whose head is a matrix of its own."""
    return make_model(tmp_path_factory.mktemp("untied"), "qwen2", num_hidden_layers=3)


@pytest.fixture(scope="module")
def tight(untied: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run on two ranks with everything, and its options."""
    options = [
        *(f"model.path={untied}", f"data.train={data}", f"data.eval={data}", "data.packing=false"),
        *("data.max_length=64", "adapter.rank=4", "optim.learning_rate=1e-2", "train.num_steps=6"),
        *("train.micro_batch_size=2", "train.num_accumulation_steps=2", "tracker=none", *QUICK, *TIGHT),
    ]
    run = tmp_path_factory.mktemp("tight") / "run"
    summary = train_and_summarise(options, run, 2)
    assert summary["eval_losses"]["6"] < 0.9 * summary["eval_losses"]["0"]
    return run, options


def test_it_is_the_run_that_has_room(tight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Bit for bit, with dropout, whose random numbers the recomputation draws again."""
    run, options = tight
    plain = [option for option in options if option not in TIGHT] + USUAL
    train_and_summarise([*plain, "parallel.activation_checkpointing=none"], tmp_path / "plain", 2)
    assert losses_of(tmp_path / "plain") == losses_of(run)
    theirs = adapter_of(tmp_path / "plain")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter_of(run).items())


@pytest.mark.nightly
def test_it_resumes_bit_for_bit(tight: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, options = tight
    train_and_summarise([*options, "train.num_steps=3"], tmp_path / "run", 2)
    train_and_summarise(options, tmp_path / "run", 2)
    assert losses_of(tmp_path / "run") == losses_of(run)
    theirs = adapter_of(tmp_path / "run")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter_of(run).items())
    other = qdora("train", *options, "quant.embeddings=false", f"output_dir={tmp_path}/run", nproc=2)
    assert other.returncode == 2
    assert "quant.embeddings=true (now false)" in other.stderr


@pytest.mark.nightly
def test_one_rank_trains_from_host_memory_as_without(tight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """In float32: in bfloat16 FSDP2 rounds a gradient that is not rounded where nothing is wrapped."""
    options = [option for option in tight[1] if option not in TIGHT] + USUAL + ["model.dtype=float32"]
    for name, more in {"plain": [], "host": [option for option in TIGHT if option.startswith("parallel.")]}.items():
        train_and_summarise([*options, *more], tmp_path / name, 1)
    assert losses_of(tmp_path / "host") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)


def test_its_result_is_evaluated_and_merged(tight: tuple[Path, list[str]], data: Path, tmp_path: Path) -> None:
    run, _ = tight
    done = qdora("evaluate", f"run={run}", f"data.eval={data}", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    loss = json.loads((tmp_path / "results.json").read_text())["loss"]
    summary = summary_of(run)
    assert loss == pytest.approx(summary["eval_losses"]["6"], rel=1e-3)
    done = qdora("generate", f"run={run}", "prompt=3+3=", "chat_template=false", "max_new_tokens=4")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "options", [["format=hf"], *nightly(["format=hf", "base=original"], ["format=gguf"], ["format=lora"])]
)
def test_its_merge_is_verified(tight: tuple[Path, list[str]], untied: Path, options: list[str], tmp_path: Path) -> None:
    """The dequantised embedding and head are written, or over the original weights those."""
    done = qdora("merge", f"run={tight[0]}", f"output={tmp_path}/merged", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified on" in done.stdout
    if "format=hf" in options:
        merged, base = load_file(tmp_path / "merged" / "model.safetensors"), load_file(untied / "model.safetensors")
        assert merged.keys() == base.keys()
        kept = "base=original" in options
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(merged[name], base[name]) == kept
            assert (merged[name].float() - base[name].float()).norm() < 0.15 * base[name].float().norm()


def test_merge_to_nf4_leaves_embedding_and_head_in_bfloat16(tight: tuple[Path, list[str]], tmp_path: Path) -> None:
    """transformers loads no embedding in 4 bits."""
    done = qdora("merge", f"run={tight[0]}", f"output={tmp_path}/merged", "format=nf4", "verify=false")
    assert done.returncode == 0, done.stderr[-3000:]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    ends = {name: merged[name].dtype for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert set(ends.values()) == {torch.bfloat16}
    assert merged["model.layers.0.mlp.up_proj.weight"].dtype is torch.uint8
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["llm_int8_skip_modules"]
