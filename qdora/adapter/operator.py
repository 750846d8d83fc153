"""The arithmetic of an adapted layer as two opaque operators, forward and backward; dora.py has the formulas.

Opaque, because a compiler must not see, and move, reads of the buffer that weights are dequantised into.
"""

import torch
from torch import Tensor

from qdora import nf4


@torch.library.custom_op("qdora::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_mean: Tensor | None,
    gain: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y before the bias (tokens, out) and A x (tokens, rank) of x (tokens, in); see dora.py's docstring.

    Args:
        weight, absmax, absmax_scale, absmax_mean: the frozen weight's tensors, as many as `nf4.weight_from` takes; not
            a list, whose autograd costs a tenth of a millisecond a call.
        gain: (out, 4) uint8, the bytes of g; None for LoRA. `magnitude` only receives a gradient.
    """
    quantised = absmax is not None
    g = None if gain is None else gain.view(torch.float32).squeeze(1)
    base = _base_tensors(weight, absmax, absmax_scale, absmax_mean)
    xa = x @ lora_a.to(x.dtype).T
    y = x @ nf4.weight_from(base, x.dtype, g if quantised else None).T
    y.addmm_(xa, _scaled_b(lora_b, g if quantised else None, scaling, x.dtype).T)
    if g is not None and not quantised:
        y.mul_(g)
    return y, xa


@adapted_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, absmax, absmax_scale, absmax_mean, gain, lora_a, lora_b, magnitude, scaling
):
    return x.new_empty(x.shape[0], lora_b.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _scaled_b(lora_b: Tensor, g: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """B' = s g B, rounded once."""
    if g is None:
        return lora_b.to(dtype) * scaling
    return torch.mul(lora_b.to(dtype), (g * scaling)[:, None], out=lora_b.new_empty(lora_b.shape, dtype=dtype))


def _base_tensors(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@torch.library.custom_op("qdora::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    y: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_mean: Tensor | None,
    gain: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dm; dx or dm is empty where it is not wanted."""
    quantised = absmax is not None
    dm = dy.new_empty(0)
    g = None if gain is None else gain.view(torch.float32).squeeze(1)
    if magnitude is not None and y is not None:
        dm = _column_dot(dy, y)
        # A magnitude of exactly 0 (a row of zeros, from another tool) leaves nothing in y to find its gradient by.
        dm = (dm / magnitude).masked_fill(magnitude == 0, 0.0).to(magnitude.dtype)
    if g is not None and not quantised:
        dy = dy * g.to(dy.dtype) if dy.dtype == torch.float32 else (dy * g).to(dy.dtype)
    fold = g if quantised else None
    dxa = dy @ _scaled_b(lora_b, fold, scaling, dy.dtype)
    da = (dxa.T @ x).to(lora_a.dtype)
    db = dy.T @ xa
    db = (db.float() * scaling if fold is None else db * (fold * scaling)[:, None]).to(lora_b.dtype)
    dx = dy.new_empty(0)
    if need_dx:
        dx = dy @ nf4.weight_from(_base_tensors(weight, absmax, absmax_scale, absmax_mean), dy.dtype, fold)
        dx.addmm_(dxa, lora_a.to(dy.dtype))
    return dx, da, db, dm


@adapted_linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, x, xa, y, weight, absmax, absmax_scale, absmax_mean, gain, lora_a, lora_b, magnitude, scaling, need_dx
):
    dx = x.new_empty(x.shape) if need_dx else dy.new_empty(0)
    dm = dy.new_empty(0) if magnitude is None or y is None else torch.empty_like(magnitude)
    return dx, torch.empty_like(lora_a), torch.empty_like(lora_b), dm


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of a * b (rows, columns), float32. Products round to a's dtype and add up in float32.

    A CPU would copy the products to float32 for such a result: there it is rounded once more.
    """
    return (a * b).sum(0, dtype=torch.float32) if a.is_cuda else (a * b).sum(0).float()


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *weights, magnitude, scaling = inputs
    y, xa = output
    ctx.scaling = scaling
    ctx.mark_non_differentiable(xa)
    ctx.save_for_backward(x, xa, None if magnitude is None else y, *weights, magnitude)


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    *saved, magnitude = ctx.saved_tensors
    dx, da, db, dm = adapted_linear_backward(dy.contiguous(), *saved, magnitude, ctx.scaling, ctx.needs_input_grad[0])
    dx, dm = dx if ctx.needs_input_grad[0] else None, None if magnitude is None else dm
    return dx, None, None, None, None, None, da, db, dm, None


adapted_linear.register_autograd(_backward, setup_context=_setup_context)
