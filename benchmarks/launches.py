"""What a layer's share of an optimiser step launches on a GPU, counted where there is none.

    python benchmarks/launches.py --output launches.json

A stack of equal layers steps under torch's fake tensor mode, on a device of which there is only the name: every
operator takes the way that it takes on a GPU and computes nothing. Counted are operators that launch a kernel: not
views, not allocations. An operator over a list of tensors counts as one where CUDA has a kernel for many (which it
launches for some hundreds at a time), else as one a tensor.
Beside them stands how often the step waits for the device. PEFT's layers (over bitsandbytes' Linear4bit; AdamW fused)
are not possible without values: they are counted on the CPU, where the same operators are called.

`qdora-norm-in-forward` is the way that was not taken: row norms from the weight that the forward has dequantised
anyhow, in each micro-batch, instead of a refresh after each update.

Ends with status 1 where a layer launches more than `MOST` says: a change that adds launches has to change that, too.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance
from simulate import simulated_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qdora import nf4
from qdora.adapter import operator
from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.refresh import Refresher
from qdora.config import OptimConfig
from qdora.optim import build_optimizer

ARMS = ("peft-qlora", "peft-qdora", "qlora", "qdora", "qdora-norm-in-forward")
LAYERS, WIDTH, TOKENS, RANK, SCALING = 16, 256, 64, 16, 2.0
MOST = {
    "qlora": {"forward": 4, "backward": 7, "optimiser and refresh": 0.5, "waits a step": 0},
    "qdora": {"forward": 4, "backward": 8, "optimiser and refresh": 4.1, "waits a step": 0},
}
"""Launches a layer, and waits a step; what is done once for all layers is a fraction of a launch."""
DTYPE = torch.bfloat16
DEVICE = simulated_device()
aten = torch.ops.aten
FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh",
    "alias", "detach", "split", "split_with_sizes", "unbind", "device", "_record_function_enter_new",
    "_record_function_exit",
}  # fmt: skip
"""Operators without a kernel, beside views."""


class Launches(TorchDispatchMode):
    """Counts by phase and operator; `waits` are reads of a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.counts: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        counts = self.counts.setdefault(self.phase, Counter())
        if operator is aten._local_scalar_dense.default:
            counts["waits"] += args[0].device == DEVICE
            return args[0].dtype != torch.bool  # no row's norm has cancelled
        result = operator(*args, **(kwargs or {}))
        if not (operator.is_view or name in FREE):
            counts[name] += _kernels(name, args)
        return result


def _kernels(name: str, args: Sequence[Any]) -> int:
    """Counts an operator over lists as several where shapes have to be broadcast."""
    lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)]
    shapes = [[tensor.shape for tensor in one] for one in lists]
    return 1 if not name.startswith("_foreach") or all(one == shapes[0] for one in shapes) else len(lists[0])


@contextmanager
def nothing_computed(launches: Launches) -> Iterator[None]:
    """Tensors have a device and a size, and no values."""

    def dequantize(*_: Any) -> None:
        launches.counts.setdefault(launches.phase, Counter())["dequantize_nf4"] += 1

    def magnitude_gradient(dy: Tensor, y: Tensor, inverse_m: Tensor) -> Tensor:
        launches.counts.setdefault(launches.phase, Counter())["magnitude_gradient"] += 1
        return torch.empty_like(inverse_m)

    with (
        patch.object(nf4, "_kernel", lambda _: dequantize),  # of Triton, which wants a device
        patch.object(operator, "_magnitude_kernel", lambda _: magnitude_gradient),
        patch.object(operator, "_multiplies_to_float32", lambda _: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


class NormInForward(AdaptedLinear):
    """DoRA whose forward computes its own row norms, with as few launches as PyTorch's operators allow."""

    def forward(self, x: Tensor) -> Tensor:
        return _NormInForward.apply(x, self.lora_a, self.lora_b, self.magnitude, self)  # type: ignore[no-any-return]


class _NormInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, lora_b, magnitude, layer):  # type: ignore[no-untyped-def, override]
        made, s = layer.rounded(DTYPE), layer.scaling
        a, b = made.lora_a_rounded, made.scaled_b  # here s B
        weight = nf4.weight_from(layer.base_tensors(), DTYPE)
        products = operator._product(weight, a.t(), torch.float32)
        products.addmm_(b.float(), operator._product(a, a.t(), torch.float32), beta=2)
        squared = products.mul_(b).sum(1).add_(layer.base_norm_squared)
        gain = magnitude / squared.clamp_(min=0).sqrt_()
        y, xa = torch.mm(x, weight.t()), torch.mm(x, a.t())
        y.addmm_(xa, b.t()).mul_(gain)
        ctx.layer, ctx.s = layer, s
        ctx.save_for_backward(x, xa, y, a, b, gain, made.inverse_m)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x, xa, y, a, b, gain, inverse_m = ctx.saved_tensors
        dm = operator.magnitude_gradient(dy, y, inverse_m)
        scaled = torch.mul(dy, gain, out=torch.empty_like(dy))
        dxa = torch.mm(scaled, b)
        da = operator._product(dxa.t(), x, torch.float32)
        db = operator._product(scaled.t(), xa, torch.float32).mul_(ctx.s)
        dx = torch.mm(scaled, nf4.weight_from(ctx.layer.base_tensors(), DTYPE)).addmm_(dxa, a)
        return dx, da, db, dm, None


def ours(name: str) -> tuple[nn.Module, Callable[[], torch.optim.Optimizer]]:
    """Layers in a row, and how their optimiser is made."""
    kind, dora = (NormInForward if name.endswith("norm-in-forward") else AdaptedLinear), "dora" in name
    layers = []
    with DEVICE:
        for _ in range(LAYERS):
            base = nf4.NF4Linear(WIDTH, WIDTH, bias=False, double_quant=True, dtype=DTYPE)
            layer = kind(
                base, in_features=WIDTH, out_features=WIDTH, rank=RANK, scaling=SCALING, dropout=0.0, dora=dora
            )
            layer.measure(DEVICE)
            layers.append(layer)
    model = nn.Sequential(*layers)

    refresh = Refresher([model], DTYPE)

    @torch.no_grad()
    def round_factors() -> None:
        (batch,) = refresh._batches
        made = batch._round([layer.trained_factors() for layer in layers])
        made.scaled_b.mul_(SCALING)
        made.inverse_m.copy_(operator.inverse(torch.cat([layer.magnitude for layer in layers])))
        for layer in layers:
            layer.mark_rounded(*layer.trained_factors())

    def optimizer() -> torch.optim.Optimizer:
        built = build_optimizer(model, OptimConfig())
        norm_in_forward = kind is NormInForward
        built.register_step_post_hook(lambda *_: round_factors() if norm_in_forward else refresh(DEVICE, defer=True))
        return built

    refresh(DEVICE)
    return model, optimizer


def theirs(dora: bool) -> tuple[nn.Module, Callable[[], torch.optim.Optimizer]]:
    """The same of PEFT."""
    base = nn.Sequential(
        *(
            bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=DTYPE, quant_type="nf4")
            for _ in range(LAYERS)
        )
    ).to("cpu")  # which quantises
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    names = [str(index) for index in range(LAYERS)]
    config = LoraConfig(r=RANK, lora_alpha=round(SCALING * RANK), target_modules=names, use_dora=dora)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False).to(DTYPE)  # type: ignore[arg-type]
    model.train()
    return model, lambda: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def count(name: str) -> dict[str, Any]:
    """Launches a layer of the third step, by phase; and the operators of each."""
    launches, is_peft = Launches(), name.startswith("peft")
    device = torch.device("cpu") if is_peft else DEVICE
    with nullcontext() if is_peft else nothing_computed(launches), launches:
        model, make_optimizer = theirs("dora" in name) if is_peft else ours(name)
        optimizer = make_optimizer()
        for _ in range(3):  # AdamW's moments are there by the second
            x = torch.randn(TOKENS, WIDTH, dtype=DTYPE, device=device, requires_grad=True)
            upstream = torch.randn(TOKENS, WIDTH, dtype=DTYPE, device=device)
            launches.counts.clear()
            launches.phase = "forward"
            y = model(x)
            launches.phase = "backward"
            torch.autograd.backward(y, upstream)
            launches.phase = "optimiser and refresh"
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    waits = sum(counts.pop("waits", 0) for counts in launches.counts.values())
    phases = {phase: sum(counts.values()) / LAYERS for phase, counts in launches.counts.items()}
    operators = {phase: dict(counts.most_common()) for phase, counts in launches.counts.items()}
    return {"a layer": sum(phases.values()), **phases, "waits a step": waits, "operators of all layers": operators}


def main() -> None:
    """Counts and writes JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    record = provenance() | {"layers": LAYERS, "arms": {name: count(name) for name in ARMS}}
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    arms: dict[str, Any] = record["arms"]
    for name, found in arms.items():
        print(f"{name:12}", *(f"{what} {value:.1f}" for what, value in found.items() if not isinstance(value, dict)))
    more = [
        f"{name}: {what} {arms[name][what]:.2f}, not {most:g}"
        for name, limits in MOST.items()
        for what, most in limits.items()
        if arms[name][what] > most
    ]
    if more:
        sys.exit("more launches than there were: " + "; ".join(more))


if __name__ == "__main__":
    main()
