"""What the benchmark compares: the same model, NF4 bytes, adapters and batches, as PEFT and as qdora train them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from provenance import NEEDS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.liger import apply_liger_kernel

from qdora.adapter.dora import adapted_layers
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Attention,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.data import Batch
from qdora.model import load_model
from qdora.model.activations import compile_blocks
from qdora.model.loss import IGNORED
from qdora.optim import build_optimizer, clip_gradients
from qdora.parallel import World, summed, to_device
from qdora.sharding import own_rows
from qdora.training.bound import Work, work_of
from qdora.training.graph import GraphedGradients
from qdora.training.trainer import accumulate_gradients

ARMS = ("peft-lora", "peft-qlora", "peft-qdora", "dora", "qlora", "qdora", "qdora-compiled")
ON_GPU = (*ARMS, "qdora-graph", *NEEDS)
"""With what has nothing to measure elsewhere."""
SAME = (
    ("peft-qlora", "qlora"),
    ("peft-qdora", "qdora", "qdora-compiled", "qdora-graph", "qdora-liger", "peft-qdora-axolotl"),
)
"""Arms that compute the same loss and gradients."""
UNQUANTISED = ("peft-lora", "dora")
QUANTISED = tuple(arm for arm in ARMS if arm not in UNQUANTISED)
LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Case:
    """What a step is: `tokens` a micro-batch of a rank in rows of `length`, `accumulation` micro-batches."""

    tokens: int
    length: int
    rank: int
    recomputation: ActivationCheckpointing
    accumulation: int

    def batches(self, world: World, index: int, vocabulary: int) -> list[Tensor]:
        """This rank's micro-batches of step `index`, (rows, length) int64 each."""
        generator = torch.Generator().manual_seed(index * world.size + world.rank)
        shape = (self.tokens // self.length, self.length)
        return [torch.randint(vocabulary, shape, generator=generator) for _ in range(self.accumulation)]


@dataclass(slots=True)
class Arm:
    """`gradients` of micro-batches leaves the clipped gradients.

    It gives the mean loss a token over all ranks, and the gradients' norm before clipping, on the device.
    """

    gradients: Callable[[list[Tensor]], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    work: Work | None = None
    held_bytes: int = 0
    """Allocated on the GPU when it was built."""
    keeps_gradients: bool = False
    """Whether they are set to zero and not dropped."""
    late: Sequence[Tensor] = ()
    """What is read along with the loss: whether rows have cancelled at the update."""

    def step(self, batches: list[Tensor]) -> tuple[float, float]:
        """One update; returns loss and gradient norm before it. *Collective*."""
        loss, norm = self.gradients(batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        read_loss, read_norm, *cancelled = torch.stack(
            [loss, norm.to(loss), *(one.to(loss) for one in self.late)]
        ).tolist()
        assert not any(cancelled), "a step of the benchmark has no time for rows that cancel"
        return read_loss, read_norm


def build(name: str, folder: Path, case: Case, world: World) -> Arm:
    """The arm `name` of `ON_GPU`. *Collective*."""
    before = torch.cuda.memory_allocated()  # 0 where there is no GPU
    arm = (_theirs if name.startswith("peft") else _ours)(name, folder, case, world)
    arm.held_bytes = torch.cuda.memory_allocated() - before
    return arm


def _initial(name: str, rank: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    """A and B of the layer `name`, the same in every arm; B is not zero, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    a = torch.randn(rank, width, generator=generator) * width**-0.5
    return a.bfloat16(), (torch.randn(out, rank, generator=generator) * 1e-3).bfloat16()


def _ours(name: str, folder: Path, case: Case, world: World) -> Arm:
    """As `qdora train` does a step: float32 master shards, bfloat16 arithmetic."""
    parallel = ParallelConfig(plan=Plan.none if world.size == 1 else Plan.fsdp)
    is_graph = name.endswith("-graph")
    loaded = load_model(
        folder,
        ModelConfig(path=str(folder), attention=Attention.varlen if is_graph else Attention.auto),
        QuantConfig(method=QuantMethod.none if name in UNQUANTISED else QuantMethod.nf4),
        AdapterConfig(method=AdapterMethod.dora if "dora" in name else AdapterMethod.lora, rank=case.rank),
        parallel,
        world,
    )
    for key, layer in adapted_layers(loaded.model).items():
        for parameter, value in zip(
            (layer.lora_a, layer.lora_b),
            _initial(key, case.rank, layer.out_features, layer.in_features),
            strict=True,
        ):
            own, first = own_rows(parameter)
            own.copy_(value[first : first + own.shape[0]])
    loaded.refresh(world.device)
    loaded.recompute(case.recomputation, keep_random_state=not is_graph)
    if name.endswith("-liger"):
        # Of this process: it puts its rotary embedding into transformers' module. The loss is ours.
        kernels = {"rope": True, "rms_norm": True, "swiglu": True}
        apply_liger_kernel(loaded.model, kernels | {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if name.endswith("-compiled"):
        compile_blocks(loaded.blocks, world.device)
    loaded.model.train()
    optimizer = build_optimizer(loaded.model, OptimConfig(learning_rate=LEARNING_RATE))
    late: list[Tensor] = []

    def refresh(*_: Any) -> None:
        cancelled = loaded.refresh(world.device, defer=True)
        late[:] = [] if cancelled is None else [cancelled]

    optimizer.register_step_post_hook(refresh)

    shape = case.tokens // case.length, case.length
    add = GraphedGradients(loaded.model, world, *shape) if is_graph else None

    def gradients(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        loss, _ = accumulate_gradients(loaded.model, [_batch(tokens) for tokens in batches], world, add=add)
        total, norm = clip_gradients(loaded.model, OptimConfig().max_grad_norm, world, loss).unbind()
        return total, norm

    return Arm(gradients, optimizer, work_of(loaded, world, parallel), keeps_gradients=is_graph, late=late)


def _batch(tokens: Tensor) -> Batch:
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :-1] = tokens[:, 1:]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Batch(tokens, positions, labels, tokens.numel() - tokens.shape[0], tokens.numel())


def _theirs(name: str, folder: Path, case: Case, world: World) -> Arm:
    """PEFT, over bitsandbytes' Linear4bit or bfloat16, adapters in bfloat16; on several ranks under `fully_shard`."""
    quantised, dora = name not in UNQUANTISED, "dora" in name
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization if quantised else None,
        dtype=torch.bfloat16,
        device_map={"": world.device},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks its weights in place at the first evaluation, which breaks PEFT's DoRA.
            module.support_avx512bf16_for_cpu = False
    if quantised:
        model.is_loaded_in_4bit = True  # without it PEFT adapts the layers as if they were not quantised
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
    )
    peft_model: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    kinds = {type(module).__module__ for module in peft_model.modules() if hasattr(module, "lora_A")}
    wanted = "peft.tuners.lora.bnb" if quantised else "peft.tuners.lora.layer"
    assert kinds == {wanted}, f"PEFT's layers are {kinds}, not {wanted}"
    for key, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            shape = (module.out_features, module.in_features)
            a, b = _initial(key.removeprefix("base_model.model."), case.rank, *shape)
            module.lora_A["default"].weight.data = a.to(world.device)
            module.lora_B["default"].weight.data = b.to(world.device)
            if dora:  # m starts as the norm of W alone, as in qdora
                vector = module.lora_magnitude_vector["default"]
                vector.weight.data = vector.weight.data.bfloat16()
    if case.recomputation is not ActivationCheckpointing.none:
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    if name.endswith("-axolotl"):
        _take_axolotls_kernels(peft_model, folder)
    peft_model.train()
    if world.size > 1:
        _shard_plainly(peft_model, world)
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]

    def gradients(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=world.device)
        for index, on_host in enumerate(batches):
            tokens = to_device(on_host, world.device)
            if world.size > 1:
                peft_model.set_requires_gradient_sync(index == len(batches) - 1)
            loss = peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(batches)
            loss.backward()
            total += loss.detach()
        norm: Any = nn.utils.clip_grad_norm_(parameters, OptimConfig().max_grad_norm)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return summed(world, total)[0] / world.size, whole

    return Arm(gradients, torch.optim.AdamW(parameters, LEARNING_RATE, fused=True))


def _take_axolotls_kernels(peft_model: Any, folder: Path) -> None:
    """Gives the layers of `peft_model`, and those of no other arm, axolotl's fused functions of LoRA and DoRA."""
    kernels, dictionary = (import_module(f"axolotl.{name}") for name in ("monkeypatch.lora_kernels", "utils.dict"))
    asked = dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), True)
    config = dictionary.DictDefault({"base_model": str(folder), **asked})
    layers = [block.self_attn for block in peft_model.get_base_model().model.layers]
    kind = type(layers[0])
    plain = kind.forward
    kernels.patch_self_attn_lora(config)  # of the class, which other arms have, too
    fused, kind.forward = kind.forward, plain
    kernels.apply_lora_kernel_patches(peft_model, config)
    for layer in layers:
        layer.forward = MethodType(fused, layer)


def _shard_plainly(model: Any, world: World) -> None:
    """`fully_shard` as it comes, block by block; bitsandbytes' 4-bit weights stay whole on every rank."""
    whole = {parameter for parameter in model.parameters() if parameter.dtype == torch.uint8}
    for block in model.get_decoder().layers:
        fully_shard(block, mesh=world.mesh, ignored_params=whole)
    fully_shard(model, mesh=world.mesh, ignored_params=whole)
