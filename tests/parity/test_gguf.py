"""A GGUF file is the model it was made of: read back by plain transformers and by the gguf package, and by its bytes.

transformers' reader knows no rope scaling, attention bias of Llama, query_pre_attn_scalar, nor a head_dim
of Qwen 3 other than 128; what the file says of those is compared with the config or with the stored values instead.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as TensorType
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import gguf_tokenizer_mapping
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qdora.config import GgufType
from qdora.errors import ModelError
from qdora.merging.gguf_format import gguf_layout
from qdora.model import writer
from qdora.model.writer import Job, Layout, write_tensors
from tests.support.models import make_model

IDS = torch.arange(4, 68).view(2, 32)
TOLERANCES = {GgufType.f16: 2e-3, GgufType.bf16: 1e-2, GgufType.q8_0: 4e-2, GgufType.q4_0: 0.5}
"""Relative to the norm of the logits: weights rounded to 11, 8 and about 8 bits, and to 4."""
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 3e4, "rms_norm_eps": 1e-3},
    "llama-tied": {"num_key_value_heads": 4},
    "mistral": {},
    "qwen2": {"rope_theta": 3e4},
    "qwen3": {"rms_norm_eps": 1e-3, "head_dim": 128},
    "gemma3": GEMMA,  # five layers that attend to a window, one to everything
    "gemma2": {**GEMMA, "model_type": "gemma2"},
}
TEXT = "It's 1234.5 naïve cafés — they'LL see 北京 🙂!\n\n\tdef f(x):  return x ** 2   # ok\r\n"
CORPUS = [TEXT, "the quick brown fox jumps over the lazy dog, and the dog sees it", "3 33 333 3333 2024 1999"] * 20


def make(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A float32 model whose norms are not all 1."""
    base = "gemma3" if family == "gemma2" else family
    make_model(folder, base, dtype=torch.float32, **{**MODELS[family], **changes})
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor += 0.3 * torch.randn(tensor.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def jobs_of(folder: Path) -> list[Job]:
    """The checkpoint as it is."""

    def job(name: str, tensor: Tensor) -> Job:
        return Job(
            name, tuple(tensor.shape), torch.float32, lambda: lambda first, last: tensor[first:last].float().clone()
        )

    return [job(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()]


def export(folder: Path, kind: GgufType = GgufType.f16) -> Path:
    """Writes the GGUF file of a checkpoint; returns it."""
    output = folder.with_name(f"{folder.name}-{kind.name}")
    write_tensors(output, gguf_layout(jobs_of(folder), folder, kind, "tiny"), "test", workers=2)
    return output / "model.gguf"


def export_header(folder: Path, layout: Layout) -> Path:
    """The same file with zeros for weights, without the time that those take."""
    folder.mkdir()
    with (folder / "model.gguf").open("wb") as stream:
        stream.write(layout.headers["model.gguf"])
        stream.truncate(layout.sizes()["model.gguf"])
    return folder / "model.gguf"


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def values_of(file: Path) -> dict[str, Tensor]:
    """Every tensor in float32."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(file).tensors
    }


def from_gguf(file: Path) -> Any:
    """What plain transformers makes of a file."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """(rows, length, vocabulary)."""
    logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("family", MODELS)
def test_transformers_reads_back_the_same_model(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", family)
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    errors = {}
    for kind in GgufType:
        errors[kind] = float((logits_of(from_gguf(export(folder, kind))) - wanted).norm() / wanted.norm())
        assert 0 < errors[kind] <= TOLERANCES[kind], f"{kind.name}: {errors[kind]}"
    assert errors[GgufType.f16] < errors[GgufType.bf16]
    assert 3 * errors[GgufType.q8_0] < errors[GgufType.q4_0]


def test_file_has_the_tensors_of_llama_cpp(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", num_hidden_layers=1)
    reader = GGUFReader(export(folder, GgufType.q4_0))
    norm, q4_0, q8_0 = TensorType.F32, TensorType.Q4_0, TensorType.Q8_0
    assert {tensor.name: (tuple(map(int, tensor.shape)), tensor.tensor_type) for tensor in reader.tensors} == {
        "token_embd.weight": ((128, 256), q8_0),
        "blk.0.attn_norm.weight": ((128,), norm),
        "blk.0.attn_q.weight": ((128, 128), q4_0),
        "blk.0.attn_k.weight": ((128, 64), q4_0),
        "blk.0.attn_v.weight": ((128, 64), q4_0),
        "blk.0.attn_output.weight": ((128, 128), q4_0),
        "blk.0.ffn_norm.weight": ((128,), norm),
        "blk.0.ffn_gate.weight": ((128, 192), q4_0),
        "blk.0.ffn_up.weight": ((128, 192), q4_0),
        "blk.0.ffn_down.weight": ((192, 128), q4_0),
        "output_norm.weight": ((128,), norm),
        "output.weight": ((128, 256), q8_0),
    }
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_file_says_what_the_config_says(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", head_dim=64, rope_theta=3e4, rms_norm_eps=1e-3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    fields = fields_of(export(folder, GgufType.q8_0))
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    for name, value in {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 128,
        "llama.feed_forward_length": 192,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 3e4,
        "llama.vocab_size": 256,
    }.items():
        assert fields[name] == value, name


def test_gemma_says_what_its_layers_attend_to(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 2e4}
    folder = make(tmp_path / "model", "gemma3", rope_parameters=rope, final_logit_softcapping=20.0)
    fields = fields_of(export(folder))
    for name, value in {
        "attention.sliding_window": 64,
        "attention.key_length": 256,
        "rope.freq_base": 5e5,
        "rope.freq_base_swa": 2e4,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "final_logit_softcapping": 20.0,
    }.items():
        assert fields[f"gemma3.{name}"] == value, name


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_a_head_alternate_between_its_halves(family: str, tmp_path: Path) -> None:
    changes = {"attention_bias": True} if family == "llama" else {}
    folder = make(tmp_path / "model", family, **changes)
    stored, written = load_file(folder / "model.safetensors"), values_of(export(folder))
    kinds = ["weight", "bias"] if family == "llama" else ["weight"]
    for kind, module, heads in [(kind, module, heads) for kind in kinds for module, heads in (("q", 4), ("k", 2))]:
        before = stored[f"model.layers.1.self_attn.{module}_proj.{kind}"].half().float()
        after = written[f"blk.1.attn_{module}.{kind}"].half().float()
        order = [head * 32 + half * 16 + row for head in range(heads) for row in range(16) for half in range(2)]
        assert torch.equal(after, before[order]), f"{module} {kind}"
        assert not torch.equal(after, before)
    name = "self_attn.v_proj.weight"
    assert torch.equal(written["blk.1.attn_v.weight"], stored[f"model.layers.1.{name}"].half().float())


def test_head_wider_than_its_share_of_the_width_is_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "qwen3", head_dim=64)
    file = export(folder)
    assert fields_of(file)["qwen3.attention.key_length"] == 64
    values, stored = values_of(file), load_file(folder / "model.safetensors")
    assert torch.equal(values["blk.0.attn_q_norm.weight"], stored["model.layers.0.self_attn.q_norm.weight"])
    assert torch.equal(values["blk.0.attn_q.weight"], stored["model.layers.0.self_attn.q_proj.weight"].half().float())


@pytest.mark.parametrize("kind", GgufType)
def test_encoding_is_that_of_the_gguf_package(kind: GgufType, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "qwen2")
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].numpy()
    written = next(t for t in GGUFReader(export(folder, kind)).tensors if t.name == "blk.0.ffn_down.weight")
    assert written.tensor_type is TensorType[kind.name.upper()]
    expected = gguf.quants.quantize(stored, written.tensor_type)
    np.testing.assert_array_equal(written.data.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_small_pieces_give_the_same_file(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", family, head_dim=32, num_hidden_layers=1, query_pre_attn_scalar=32)
    whole = {kind: export(folder, kind).read_bytes() for kind in GgufType}
    # 1 row at a time and, with the first, pieces of 7 rows that end inside a head.
    for numel in (1, 7 * 128):
        monkeypatch.setattr(writer, "CHUNK_NUMEL", numel)
        for kind in GgufType:
            shutil.rmtree(folder.with_name(f"model-{kind.name}"))
            assert export(folder, kind).read_bytes() == whole[kind], f"{kind.name} in pieces of {numel}"


def test_rows_that_are_no_whole_blocks_stay_in_f16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model", intermediate_size=200)
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(export(folder, GgufType.q8_0)).tensors}
    assert types["blk.0.ffn_down.weight"] is TensorType.F16
    assert types["blk.0.ffn_up.weight"] is TensorType.Q8_0
    assert "2 tensors stay in f16" in capsys.readouterr().out


def test_tied_head_is_not_written(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert "output.weight" not in values_of(export(folder, GgufType.q8_0))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "output.weight" not in values_of(export(folder, GgufType.f16))


def test_head_of_its_own_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    jobs = [job for job in jobs_of(folder) if job.name != "lm_head.weight"]
    with pytest.raises(ModelError, match=r"no output\.weight"):
        gguf_layout(jobs, folder, GgufType.f16, "tiny")


def test_tensor_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    extra = Job("model.layers.0.adapter.weight", (4, 4), torch.float32, lambda: lambda first, last: torch.zeros(4, 4))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.adapter\.weight has no counterpart"):
        gguf_layout([*jobs_of(folder), extra], folder, GgufType.f16, "tiny")


def test_other_family_is_refused_and_the_way_round_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "phi3")
    with pytest.raises(ModelError, match=r"phi3 model; supported are llama.*format=hf.*convert_hf_to_gguf\.py"):
        gguf_layout(jobs_of(folder), folder, GgufType.f16, "tiny")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "changes", "option"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
        ("qwen2", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_type is llama3"),
        ("gemma3", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar is 128"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 6}, "layer_types is"),
        ("gemma2", {"attn_logit_softcapping": None}, "softcapping"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(
    family: str, changes: dict[str, Any], option: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in changes:
        config["rope_parameters"] |= changes["rope_scaling"]
    else:
        config |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=option):
        gguf_layout(jobs_of(folder), folder, GgufType.f16, "tiny")


def test_window_that_llama_cpp_does_not_have_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "model", "mistral")
    gguf_layout(jobs_of(folder), folder, GgufType.f16, "tiny")
    assert "window is 64" in capsys.readouterr().out


def test_llama3_scaling_is_written_as_factors(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", head_dim=64, rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=5e4)
    file = export(folder, GgufType.q8_0)
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e4 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = values_of(file)["rope_freqs.weight"]
    torch.testing.assert_close(factors, (plain / scaled).float(), rtol=1e-5, atol=0)
    between = (factors > 1.01) & (factors < 7.9)
    assert factors.min() == 1
    assert factors.max() == 8
    assert between.any()
    assert "llama.rope.scaling.type" not in fields_of(file)


def test_yarn_and_linear_scaling_are_written_as_keys(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
    fields = fields_of(export(make(tmp_path / "yarn", "qwen2", rope_scaling=yarn)))
    keys = ("type", "factor", "original_context_length", "yarn_beta_fast")
    assert [fields[f"qwen2.rope.scaling.{key}"] for key in keys] == ["yarn", 4.0, 128, 16.0]
    linear = make(tmp_path / "linear", rope_scaling={"rope_type": "linear", "factor": 2.0})
    fields = fields_of(export(linear))
    assert [fields[f"llama.rope.scaling.{key}"] for key in ("type", "factor")] == ["linear", 2.0]


def test_tokenizer_that_gguf_cannot_express_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = fields_of(export(make(tmp_path / "model")))
    assert fields["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in fields
    assert "WordLevel vocabulary" in capsys.readouterr().out


def byte_level(*steps: Any, merges_digits: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """A trained byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = CORPUS if merges_digits else ["".join(c for c in text if not c.isnumeric()) for text in CORPUS]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<think>"])
    return fast


def sentence_piece(folder: Path) -> LlamaTokenizer:
    """A trained tokenizer of Llama 2's kind."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def split(pre: str) -> list[Any]:
    """The steps of a tokenizer whose name transformers' reader has a regular expression for."""
    regex = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS[pre]
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL = {
    "llama-bpe": lambda: byte_level(*split("llama-bpe"), ignore_merges=True),
    "smaug-bpe": lambda: byte_level(*split("smaug-bpe")),
    "qwen2": lambda: byte_level(*split("qwen2")),
    "tekken": lambda: byte_level(*split("tekken"), ignore_merges=True),
    "gpt-4o": lambda: byte_level(*split("gpt-4o")),
    "gpt-2": lambda: byte_level(PLAIN),
    "smollm": lambda: byte_level(PLAIN, merges_digits=False),
}


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    """A model with more rows than its tokenizer has tokens; returns its GGUF file."""
    make(folder, vocab_size=len(tokenizer) + 9, pad_token_id=None)
    tokenizer.save_pretrained(folder)
    layout = gguf_layout(jobs_of(folder), folder, GgufType.q8_0, "tiny")
    return export_header(folder.with_name("gguf"), layout)


def assert_encodes_alike(file: Path, tokenizer: Any, text: str = TEXT) -> None:
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert read.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_tokenizer_encodes_alike(pre: str, tmp_path: Path) -> None:
    tokenizer = BYTE_LEVEL[pre]()
    file = with_tokenizer(tmp_path / "model", tokenizer)
    fields = fields_of(file)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", pre)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert {token: id_ for id_, token in enumerate(tokens[: len(tokenizer)])} == tokenizer.get_vocab()
    marks = {"<s>": gguf.TokenType.CONTROL, "<think>": gguf.TokenType.USER_DEFINED, "a": gguf.TokenType.NORMAL}
    assert {token: types[tokens.index(token)] for token in marks} == marks
    assert tokens[len(tokenizer) :] == [f"[PAD{len(tokenizer) + index}]" for index in range(9)]
    assert types[len(tokenizer) :] == [gguf.TokenType.UNUSED] * 9
    if pre != "smollm":  # transformers' reader has no regular expression for it
        assert_encodes_alike(file, tokenizer)
        assert_encodes_alike(file, tokenizer, "<think>so</think><|im_start|>user")


def test_digits_split_off_one_by_one_are_smollms(tmp_path: Path) -> None:
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True), PLAIN)
    assert fields_of(with_tokenizer(tmp_path / "model", tokenizer))["tokenizer.ggml.pre"] == "smollm"


def test_unknown_way_of_splitting_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level(pre_tokenizers.Split(Regex("[0-9]|."), "isolated"), split("qwen2")[1])
    assert fields_of(with_tokenizer(tmp_path / "model", tokenizer))["tokenizer.ggml.pre"] == "default"
    assert "no name for how this tokenizer splits" in capsys.readouterr().out


def test_sentencepiece_tokenizer_encodes_alike(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path / "pieces")
    file = with_tokenizer(tmp_path / "model", tokenizer)
    fields = fields_of(file)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert_encodes_alike(file, tokenizer)
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "pieces" / "tokenizer.model"))
    tokens, types, scores = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert tokens[: len(pieces)] == [pieces.id_to_piece(id_) for id_ in range(len(pieces))]
    merged = [id_ for id_ in range(len(pieces)) if pieces.is_byte(id_) is False and len(tokens[id_]) > 1 and id_ > 2]
    assert sorted(merged, key=scores.__getitem__) == sorted(merged, key=pieces.get_score)
    assert types[tokens.index("<0x41>")] == gguf.TokenType.BYTE
    assert types[tokens.index("<unk>")] == gguf.TokenType.UNKNOWN


def test_begin_token_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    tokenizer = byte_level(*split("llama-bpe"), ignore_merges=True)
    file = with_tokenizer(tmp_path / "without", tokenizer)
    fields = fields_of(file)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.bos_token_id"]) == (False, 0)
    shutil.rmtree(file.parent)
    fields = fields_of(with_tokenizer(tmp_path / "with", sentence_piece(tmp_path / "pieces")))
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)


def test_spaces_of_an_added_token_are_not_marked(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path / "pieces")
    tokenizer.add_tokens(["\N{LOWER ONE EIGHTH BLOCK}" * 7])  # llama.cpp looks for it in the text as it is
    fields = fields_of(with_tokenizer(tmp_path / "model", tokenizer))
    assert fields["tokenizer.ggml.tokens"][len(tokenizer) - 1] == " " * 7
    assert fields["tokenizer.ggml.token_type"][len(tokenizer) - 1] == gguf.TokenType.USER_DEFINED


def test_folder_of_vocabulary_and_merges_alone_is_written(tmp_path: Path) -> None:
    tokenizer = byte_level(PLAIN)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    folder = make(tmp_path / "model", vocab_size=400)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    named = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    layout = gguf_layout(jobs_of(folder), folder, GgufType.q8_0, "tiny")
    fields = fields_of(export_header(tmp_path / "gguf", layout))
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    # The tokenizer's, where the config says 1 and 2.
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's file, without the weights."""
    layout = gguf_layout(jobs_of(smollm2), smollm2, GgufType.q8_0, "SmolLM2")
    return export_header(tmp_path_factory.mktemp("smollm2") / "gguf", layout)


def test_real_tokenizer_is_the_one_it_came_from(smollm2: Path, real: Path) -> None:
    fields = fields_of(real)
    # What the GGUF file says that models/SmolLM2-135M-Instruct was made from.
    for name, value in {
        "model": "gpt2",
        "pre": "smollm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": False,
    }.items():
        assert fields[f"tokenizer.ggml.{name}"] == value, name
    model = json.loads((smollm2 / "tokenizer.json").read_text())["model"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert {token: id_ for id_, token in enumerate(tokens)} == model["vocab"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    control = [tokens[id_] for id_, type_ in enumerate(fields["tokenizer.ggml.token_type"]) if type_ != 1]
    assert control[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(control) == 17
    assert fields["tokenizer.chat_template"] == (smollm2 / "chat_template.jinja").read_text()


@pytest.mark.nightly(paths=["qdora/merging/gguf*.py"])
def test_real_tokenizer_encodes_alike(smollm2: Path, real: Path) -> None:
    assert_encodes_alike(real, AutoTokenizer.from_pretrained(smollm2), f"<|im_start|>user\n{TEXT}<|im_end|>\n")


@pytest.mark.nightly(paths=["qdora/merging/gguf*.py"])
def test_real_model_predicts_alike(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"  # without the tokenizer, which transformers takes 15 s to read several times
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(smollm2 / name)
    file = export(folder, GgufType.f16)
    assert "has no tokenizer" in capsys.readouterr().out
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2).encode(TEXT)])
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), ids)
    difference = logits_of(from_gguf(file), ids) - wanted
    assert difference.norm() <= TOLERANCES[GgufType.f16] * wanted.norm()
