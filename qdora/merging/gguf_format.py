"""GGUF, the file of llama.cpp: what its convert_hf_to_gguf.py would make of a checkpoint, written a piece at a time.

    name        model.layers.3.self_attn.q_proj.weight is blk.3.attn_q.weight (the tables of the gguf package)
    q and k     of Llama and Mistral: llama.cpp rotates neighbouring values, transformers the two halves of a head,
                so the rows 0, 1, 2, ... of a head are its rows 0, half, 1, half + 1, ...
    norms       of Gemma: llama.cpp multiplies by the stored weight, transformers by 1 + weight
    type        norms and vectors stay in float32; with q4_0 the embedding and the head are q8_0

Where GGUF cannot say what a config asks for, llama.cpp would compute something else: such a model is refused.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as TensorType
from torch import Tensor
from transformers import AutoConfig

from qdora.config import GgufType
from qdora.errors import ModelError
from qdora.merging.gguf_tokenizer import write_tokenizer
from qdora.model.companions import Stored, copy_companions, write_template
from qdora.model.writer import Job, Layout, Place, Rows

FILE = "model.gguf"
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
BLOCK = 32
"""Values that share a scale in q8_0 and q4_0; a row has a whole number of them."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What llama.cpp takes for granted of a `model_type`."""

    architecture: gguf.MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    """Whether it rotates neighbouring values of q and k."""
    shifted_norms: bool = False
    """Whether it multiplies by the norm's weight where transformers multiplies by 1 + weight."""
    global_every: int | None = None
    """The last of so many layers attends to everything, the others to a window."""


_LLAMA = _Family(gguf.MODEL_ARCH.LLAMA, interleaved=True)
_GELU = "gelu_pytorch_tanh"
_FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Family(gguf.MODEL_ARCH.QWEN3),
    "gemma2": _Family(gguf.MODEL_ARCH.GEMMA2, _GELU, shifted_norms=True, global_every=2),
    "gemma3_text": _Family(gguf.MODEL_ARCH.GEMMA3, _GELU, shifted_norms=True, global_every=6),
}
_TYPES = {
    GgufType.f16: (TensorType.F16, gguf.LlamaFileType.MOSTLY_F16),
    GgufType.bf16: (TensorType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    GgufType.q8_0: (TensorType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    GgufType.q4_0: (TensorType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_DTYPES = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}
_MOST_LAYERS = {gguf.MODEL_ARCH.GEMMA2: 46, gguf.MODEL_ARCH.GEMMA3: 62}
"""Gemma 27B, by whose number of layers llama.cpp knows that queries are scaled by another width than a head's."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    job: Job
    type: TensorType
    shape: tuple[int, ...]
    """Values, where the job's may be bytes."""


def gguf_layout(
    jobs: list[Job],
    base: Path,
    kind: GgufType,
    name: str,
    adapter: Path | None = None,
    template: Stored | None = None,
) -> Layout:
    """The file `model.gguf` of a model whose tensors `jobs` give in float32 under their names in the checkpoint `base`.

    Config and tokenizer are those of `base`, but for a tokenizer that the folder `adapter` has of its own, and for a
    `template`. A head that is tied there is not written. Prints what is not as asked: a tensor that is kept in f16, a
    tokenizer that GGUF cannot express.

    Raises:
        ModelError: a family, an option of its config or a tensor that has no counterpart in llama.cpp.
    """
    config, family = _read_config(base)
    _check(config, family)
    tensors = _tensors(jobs, config, family, kind)
    num_tokens = next(tensor.shape[0] for tensor in tensors if tensor.job.name == "token_embd.weight")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
        for tensor in tensors:
            writer.add_tensor_info(tensor.job.name, tensor.shape, None, tensor.job.num_bytes, raw_dtype=tensor.type)
        _write_general(writer, base, kind, name)
        _write_shape(writer, config, family, num_tokens)
        _write_rope(writer, config)
        whole = Path(folder) / "companions"
        copy_companions(base, whole, adapter)
        if template is not None:
            write_template(whole, template)
        write_tokenizer(writer, whole, num_tokens)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % ALIGNMENT)
    places, offset = [], len(header)
    for tensor in tensors:
        places.append(Place(tensor.job, FILE, offset))
        offset += tensor.job.num_bytes + -tensor.job.num_bytes % ALIGNMENT
    return Layout({FILE: header}, places)


def _read_config(base: Path) -> tuple[Any, _Family]:
    model_type = json.loads((base / "config.json").read_bytes()).get("model_type")
    if model_type not in _FAMILIES:
        raise ModelError(
            f"format=gguf: {base} is a {model_type} model; supported are {', '.join(_FAMILIES)}. Merge with format=hf "
            "and convert that folder with llama.cpp's own convert_hf_to_gguf.py"
        )
    return AutoConfig.from_pretrained(base), _FAMILIES[model_type]


def _rope(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rotary parameters of the layers that attend to everything, and of the others where they differ."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters), parameters.get("sliding_attention")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check(config: Any, family: _Family) -> None:
    """Raises `ModelError` where llama.cpp would compute something else and no key could say so."""
    architecture = family.architecture
    is_gemma = family.global_every is not None
    activation = config.hidden_activation if is_gemma else config.hidden_act
    rope, local_rope = _rope(config)
    rope_types = {"default", "linear", "yarn"} | ({"llama3"} if architecture == gguf.MODEL_ARCH.LLAMA else set())
    found: dict[str, tuple[Any, set[Any]]] = {
        "activation": (activation, {family.activation}),
        "rope_type": (rope["rope_type"], rope_types),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), {1.0}),
        "rope_type of sliding attention": ((local_rope or {}).get("rope_type", "default"), {"default"}),
    }
    if family.global_every is not None:
        largest = config.num_hidden_layers == _MOST_LAYERS[architecture]
        width = config.hidden_size // config.num_attention_heads if largest else _head_dim(config)
        found["query_pre_attn_scalar"] = (config.query_pre_attn_scalar, {width})
        kinds = ["sliding_attention"] * (family.global_every - 1) + ["full_attention"]
        pattern = tuple(kinds[layer % len(kinds)] for layer in range(config.num_hidden_layers))
        found["layer_types"] = (tuple(config.layer_types), {pattern})
        # Its Gemma 2 always caps both, its Gemma 3 never the attention.
        capped = (bool(getattr(config, "attn_logit_softcapping", None)), bool(config.final_logit_softcapping))
        known = {(True, True)} if architecture == gguf.MODEL_ARCH.GEMMA2 else {(False, True), (False, False)}
        found["softcapping (attention, final)"] = (capped, known)
    for option, (given, allowed) in found.items():
        if given not in allowed:
            raise ModelError(
                f"format=gguf: llama.cpp cannot run this {config.model_type} model: {option} is {given}, it knows "
                f"{', '.join(map(str, sorted(allowed, key=str)))}. Use format=hf"
            )
    if not is_gemma and getattr(config, "sliding_window", None):
        print(
            f"GGUF: llama.cpp lets every token attend to all before it, where this model's window is "
            f"{config.sliding_window}: longer texts come out different"
        )


def _write_general(writer: gguf.GGUFWriter, base: Path, kind: GgufType, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    licence = gguf.Metadata.load_model_card(base).get("license")
    if isinstance(licence, str):
        writer.add_license(licence)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_shape(writer: gguf.GGUFWriter, config: Any, family: _Family, num_tokens: int) -> None:
    head_dim = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(num_tokens)
    if family.interleaved:
        writer.add_rope_dimension_count(head_dim)
    if family.global_every is not None:
        writer.add_sliding_window(config.sliding_window)
        if family.architecture == gguf.MODEL_ARCH.GEMMA2:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope, local = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        optional = {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for key, add in optional.items():
            if rope.get(key) is not None:
                add(rope[key])


def _tensors(jobs: list[Job], config: Any, family: _Family, kind: GgufType) -> list[_Tensor]:
    names = gguf.get_tensor_name_map(family.architecture, config.num_hidden_layers)
    tensors = []
    rope = _rope(config)[0]
    if rope["rope_type"] == "llama3":
        factors = _llama3_factors(rope, _head_dim(config))
        job = Job("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: _rows_of(factors))
        tensors.append(_tensor(job, job.name, kind))
    for job in jobs:
        if job.name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and job.name == "lm_head.weight"):
            continue
        name = names.get_name(job.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"format=gguf: {job.name} has no counterpart in llama.cpp's {config.model_type}. Use format=hf"
            )
        tensors.append(_tensor(job, name, kind, _change(job, config, family)))
    written = {tensor.job.name for tensor in tensors}
    for name in ["token_embd.weight"] + ([] if config.tie_word_embeddings else ["output.weight"]):
        if name not in written:
            tied = str(bool(config.tie_word_embeddings)).lower()
            raise ModelError(f"format=gguf: the model has no {name}, and its config says tie_word_embeddings={tied}")
    kept = [tensor for tensor in tensors if tensor.type is TensorType.F16]
    if kept and kind is not GgufType.f16:
        print(
            f"GGUF: {len(kept)} tensors stay in f16, because their rows are no multiple of {BLOCK} values: "
            f"{kept[0].job.name} has {kept[0].shape[-1]}"
        )
    return tensors


def _tensor(job: Job, name: str, kind: GgufType, change: Callable[[Rows], Rows] = lambda rows: rows) -> _Tensor:
    type_ = _TYPES[kind][0]
    if len(job.shape) == 1 or name.endswith("_norm.weight"):
        type_ = TensorType.F32
    elif type_ is TensorType.Q4_0 and name in ("token_embd.weight", "output.weight"):
        type_ = TensorType.Q8_0
    if type_ in (TensorType.Q8_0, TensorType.Q4_0) and job.shape[-1] % BLOCK:
        type_ = TensorType.F16
    if type_ in _DTYPES:
        shape, dtype = job.shape, _DTYPES[type_]
    else:
        shape, dtype = gguf.quant_shape_to_byte_shape(job.shape, type_), torch.uint8

    def encode(values: Tensor) -> Tensor:
        if dtype is not torch.uint8:
            return values.to(dtype)
        return torch.from_numpy(gguf.quants.quantize(values.contiguous().numpy(), type_))

    def start() -> Rows:
        rows = change(job.start())
        return lambda first, last: encode(rows(first, last))

    return _Tensor(Job(name, shape, dtype, start), type_, job.shape)


def _change(job: Job, config: Any, family: _Family) -> Callable[[Rows], Rows]:
    """From the rows of the checkpoint to those of llama.cpp."""
    module = job.name.split(".")[-2]
    if family.interleaved and module in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        return lambda rows: _interleaved(rows, job.shape[0] // heads)
    if family.shifted_norms and job.name.endswith("norm.weight"):
        return lambda rows: lambda first, last: rows(first, last) + 1
    return lambda rows: rows


def _interleaved(rows: Rows, head_dim: int) -> Rows:
    """The two halves of each head's rows, one row of each in turn."""

    def reordered(first: int, last: int) -> Tensor:
        start = first // head_dim * head_dim
        whole = rows(start, -(-last // head_dim) * head_dim)
        halves = whole.reshape(-1, 2, head_dim // 2, *whole.shape[1:])
        ordered: Tensor = halves.transpose(1, 2).reshape(whole.shape)
        return ordered[first - start : last - start]

    return reordered


def _rows_of(tensor: Tensor) -> Rows:
    return lambda first, last: tensor[first:last]


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """(head_dim / 2,) what llama.cpp divides each rotary frequency by.

    Long waves are stretched by `factor`, short ones are kept, those between are mixed (Llama 3.1's model card).
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / (kept + (1 - kept) / rope["factor"])
    return factors.float()
