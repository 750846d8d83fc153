"""The arithmetic of an adapted layer, forward and backward; dora.py has the formulas.

Eagerly a layer is a plain `torch.autograd.Function`. Inside `nf4.opaque_layers` that function calls one operator a
direction, for modes that keep or count what operators return. Under torch.compile the operator has an autograd of its
own, which takes longer: a compiler must not see, and move, reads of the buffer that weights are dequantised into.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qdora import nf4
from qdora.kernels import tried


class Factors(NamedTuple):
    """What the layer computes with, of A, B, g and m; a rank that holds them whole makes it once a step."""

    lora_a_rounded: Tensor
    """A, (rank, in), in the compute dtype."""
    scaled_b: Tensor
    """B' = s g B, (out, rank), in the compute dtype."""
    row_scale: Tensor
    """s g, (out, 1) or (1, 1) float32; of LoRA s alone."""
    inverse_m: Tensor | None = None
    """1 / m, (out,) float32, or 0 where m is 0; None for LoRA."""


def scaled_factors(
    lora_a: Tensor,
    lora_b: Tensor,
    gain: Tensor | None,
    magnitude: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> Factors:
    """A and B rounded to `dtype`, the compute dtype, and what else a call needs; without gradients.

    Args:
        gain: (out, 4) uint8, the bytes of g; None for LoRA, as is `magnitude`.
    """
    a, b = lora_a.detach().to(dtype), lora_b.detach().to(dtype)
    if gain is None or magnitude is None:
        row_scale, inverse_m = torch.full((1, 1), scaling, device=b.device), None
    else:
        row_scale, inverse_m = gain.view(torch.float32) * scaling, inverse(magnitude.detach().float())
    return Factors(a, torch.mul(b, row_scale, out=torch.empty_like(b)), row_scale, inverse_m)


def inverse(magnitude: Tensor) -> Tensor:
    """1 / m, or 0: a row with m = 0 (zeros, from another tool) leaves nothing in y to find its gradient by."""
    return magnitude.reciprocal().masked_fill_(magnitude == 0, 0.0)


def adapted_linear(
    x: Tensor,
    base: list[Tensor],
    gain: Tensor | None,
    factors: Factors,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
) -> Tensor:
    """y before the bias (..., out) of x (..., in); see dora.py's docstring.

    Args:
        base: the frozen weight's tensors, as `nf4.weight_from` takes them.
        gain: (out, 4) uint8, the bytes of g; None for LoRA.
        lora_a, lora_b, magnitude: only receive gradients, in their own dtypes.
    """
    y: Tensor
    if torch.compiler.is_compiling():
        y, _ = opaque_adapted_linear(x, lora_a, lora_b, magnitude, *_padded(base), gain, *factors)
    else:
        y = _AdaptedLinear.apply(x, lora_a, lora_b, magnitude, base, gain, factors)
    return y


def _padded(base: list[Tensor]) -> list[Tensor | None]:
    """Returns `base` with None for what `nf4.weight_from` takes and it has not."""
    return [*base, *[None] * (4 - len(base))]


def _forward(x: Tensor, base: list[Tensor], gain: Tensor | None, factors: Factors) -> tuple[Tensor, Tensor]:
    """y (..., out) and A x (tokens, rank) of x (..., in)."""
    quantised = len(base) > 1
    g = None if gain is None else gain.view(torch.float32)
    y = x.new_empty(*x.shape[:-1], factors.scaled_b.shape[0])  # itself no view: models may write to it in place
    rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    xa = torch.mm(rows, factors.lora_a_rounded.t())
    torch.mm(rows, nf4.weight_from(base, x.dtype, g if quantised else None).t(), out=y_rows)
    if g is not None and not quantised:
        y_rows.mul_(g.t())
    y_rows.addmm_(xa, factors.scaled_b.t())
    return y, xa


def _backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    base: list[Tensor],
    gain: Tensor | None,
    factors: Factors,
    dtype: torch.dtype,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """dx, dA and dB in `dtype`, and dm in float32; None for dx or dm where it is not wanted.

    dy, x, y and dx as in `_forward`, A x (tokens, rank).
    """
    dx, dm, shape = None, None, x.shape
    dy, x = dy.reshape(-1, dy.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1])
    if factors.inverse_m is not None and y is not None:
        dm = magnitude_gradient(dy, y.view(dy.shape), factors.inverse_m)
    dxa = torch.mm(dy, factors.scaled_b)
    da = _product(dxa.t(), x, dtype).to(dtype)
    db = _product(dy.t(), xa, dtype)
    db = torch.mul(db, factors.row_scale, out=db if db.dtype is dtype else torch.empty_like(db, dtype=dtype))
    if need_dx:
        g = None if gain is None else gain.view(torch.float32)
        if len(base) == 1 and g is not None:
            dx = torch.mm(torch.mul(dy, g.t(), out=torch.empty_like(dy)), nf4.weight_from(base, dy.dtype))
        else:
            dx = torch.mm(dy, nf4.weight_from(base, dy.dtype, g))
        dx = dx.addmm_(dxa, factors.lora_a_rounded).view(shape)
    return dx, da, db, dm


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, in `dtype` where the device multiplies bfloat16 to float32, else in the dtype of the two."""
    if dtype is torch.float32 and a.dtype is torch.bfloat16 and _multiplies_to_float32(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return torch.mm(a, b)


@cache
def _multiplies_to_float32(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return bool(torch.mm(ones, ones, out_dtype=torch.float32).eq(16).all())  # type: ignore[call-overload]
    except RuntimeError:  # torch's build, or the device, has it not
        return False


def magnitude_gradient(dy: Tensor, y: Tensor, inverse_m: Tensor) -> Tensor:
    """dm, the sum over tokens of dy * y / m, (out,) float32; of dy and y (tokens, out), and 1 / m (out,).

    By PyTorch's operators products round to the dtype of dy, and a CPU, which would copy them to float32 for such a
    sum, rounds that once more.
    """
    kernel = _magnitude_kernel(dy.device)
    if kernel is not None:
        return kernel(dy, y, inverse_m)
    return ((dy * y).sum(0) if dy.is_cpu else (dy * y).sum(0, dtype=torch.float32)) * inverse_m


MagnitudeKernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def _magnitude_kernel(device: torch.device) -> MagnitudeKernel | None:
    """What does `magnitude_gradient` in one launch; None where there is none."""
    return working_magnitude_kernel(device) if device.type == "cuda" else None


def working_magnitude_kernel(device: torch.device) -> MagnitudeKernel | None:
    """Triton's kernel if it has the values of PyTorch's operators on this device; else None and a warning."""
    generator = torch.Generator().manual_seed(0)
    dy, y = (torch.randn(300, 200, generator=generator).to(device) for _ in range(2))
    inverse_m = torch.rand(200, generator=generator).to(device)

    def trial() -> MagnitudeKernel:
        from qdora import triton_kernels

        for dtype in (torch.float32, torch.bfloat16):
            left, right = dy.to(dtype), y.to(dtype)
            found = triton_kernels.magnitude_gradient(left, right, inverse_m)
            expected = (left.float() * right.float()).sum(0) * inverse_m
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        return triton_kernels.magnitude_gradient

    return tried(trial, device, "the gradients of magnitudes take three launches")


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, x: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, base, gain, factors
    ) -> Tensor:
        y: Tensor
        if nf4.is_opaque():
            y, xa = opaque_adapted_linear(x, lora_a, lora_b, magnitude, *_padded(base), gain, *factors)
        else:
            y, xa = _forward(x, base, gain, factors)
        # Frozen parameters are there anyhow; what may be made for a call is saved, so that recomputation frees it.
        ctx.base, ctx.gain = base, gain
        ctx.dtype, ctx.dtype_m = lora_a.dtype, None if magnitude is None else magnitude.dtype
        ctx.save_for_backward(x, xa, None if magnitude is None else y, *factors)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def, override]
        x, xa, y, *factors = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx: Tensor | None
        dm: Tensor | None
        if nf4.is_opaque():
            others = (*_padded(ctx.base), ctx.gain, *factors)
            dx, da, db, dm = opaque_adapted_linear_backward(dy, x, xa, y, *others, ctx.dtype, need_dx)
            dx, dm = dx if need_dx else None, None if y is None else dm
        else:
            dx, da, db, dm = _backward(dy, x, xa, y, ctx.base, ctx.gain, Factors(*factors), ctx.dtype, need_dx)
        return dx, da, db, None if dm is None else dm.to(ctx.dtype_m), None, None, None


# The same as two operators. No lists among their arguments: autograd takes a tenth of a millisecond a call for one.


@torch.library.custom_op("qdora::adapted_linear", mutates_args=())
def opaque_adapted_linear(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_mean: Tensor | None,
    gain: Tensor | None,
    lora_a_rounded: Tensor,
    scaled_b: Tensor,
    row_scale: Tensor,
    inverse_m: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and A x; `adapted_linear` as one operator."""
    base = _without_none(weight, absmax, absmax_scale, absmax_mean)
    return _forward(x, base, gain, Factors(lora_a_rounded, scaled_b, row_scale, inverse_m))


def _without_none(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@opaque_adapted_linear.register_fake
def _(x, lora_a, lora_b, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], lora_b.shape[0]), x.new_empty(prod(x.shape[:-1]), lora_a.shape[0])


@torch.library.custom_op("qdora::adapted_linear_backward", mutates_args=())
def opaque_adapted_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_mean: Tensor | None,
    gain: Tensor | None,
    lora_a_rounded: Tensor,
    scaled_b: Tensor,
    row_scale: Tensor,
    inverse_m: Tensor | None,
    dtype: torch.dtype,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_backward` does; an operator returns no None: dx or dm is empty where it is not wanted."""
    base = _without_none(weight, absmax, absmax_scale, absmax_mean)
    factors = Factors(lora_a_rounded, scaled_b, row_scale, inverse_m)
    gradients = _backward(dy, x, xa, y, base, gain, factors, dtype, need_dx)
    dx, da, db, dm = (dy.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, da, db, dm


@opaque_adapted_linear_backward.register_fake
def _(dy, x, xa, y, weight, absmax, scale, mean, gain, lora_a, scaled_b, row_scale, inverse_m, dtype, need_dx):  # type: ignore[no-untyped-def]
    dx = x.new_empty(x.shape) if need_dx else dy.new_empty(0)
    dm = dy.new_empty(0) if y is None else dy.new_empty(dy.shape[-1], dtype=torch.float32)
    return dx, torch.empty_like(lora_a, dtype=dtype), torch.empty_like(scaled_b, dtype=dtype), dm


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, lora_a, _, magnitude, *others = inputs
    y, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.dtype, ctx.dtype_m = lora_a.dtype, None if magnitude is None else magnitude.dtype
    ctx.save_for_backward(x, xa, None if magnitude is None else y, *others)


def _operator_backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    saved, need_dx = ctx.saved_tensors, ctx.needs_input_grad[0]
    dx, da, db, dm = opaque_adapted_linear_backward(dy, *saved, ctx.dtype, need_dx)
    dm = None if ctx.dtype_m is None else dm.to(ctx.dtype_m)
    return dx if need_dx else None, da, db, dm, *[None] * 9


opaque_adapted_linear.register_autograd(_operator_backward, setup_context=_setup_context)
