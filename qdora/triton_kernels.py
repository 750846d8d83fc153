"""What a CUDA device does in one launch where PyTorch's operators take several.

`qdora.nf4` and `qdora.adapter.operator` have the references.

Imported where a CUDA device computes. With `TRITON_INTERPRET=1` kernels run on a CPU, which is how tests run them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024
"""Packed codes that a program dequantises, two values each."""
ALLOW_FMA = False
"""Whether a product and a sum may be rounded once: bitsandbytes rounds each."""
ROWS, COLUMNS, WARPS = 256, 32, 8
"""Rows of dy and y that a program takes at a time, and columns that it adds up: few columns, so that a narrow layer has
programs enough, and many rows, as each time it waits for memory. Not tuned on a GPU."""
BLOCK_BYTES: Any = tl.constexpr(32)
NESTED_BLOCK_SIZE: Any = tl.constexpr(256)
"""Packed codes that share a scale, and scales that share a float32: those of `qdora.nf4`."""


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_nf4(  # type: ignore[no-untyped-def]
    packed, absmax, absmax_scale, absmax_mean, nested_code, nf4_code, row_scale, out, num_bytes, row_bytes, first_block,
    NESTED: tl.constexpr, SCALED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    inside = at < num_bytes
    pair = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // BLOCK_BYTES
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        nested_block = (first_block + block) // NESTED_BLOCK_SIZE
        scale = tl.load(nested_code + code) * tl.load(absmax_scale + nested_block, mask=inside, other=0.0)
        scale += tl.load(absmax_mean)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    if SCALED:
        scale *= tl.load(row_scale + at // row_bytes, mask=inside, other=0.0)
    high, low = tl.load(nf4_code + (pair >> 4)) * scale, tl.load(nf4_code + (pair & 15)) * scale
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    value = tl.arange(0, 2 * BYTES)
    tl.store(out + 2 * first + value, values, mask=first + value // 2 < num_bytes)


def dequantize_nf4(
    tensors: list[Tensor],
    row_scale: Tensor | None,
    first_row: int,
    out: Tensor,
    nested_code: Tensor,
    nf4_code: Tensor,
) -> None:
    """Writes what `qdora.nf4.weight_from` describes into `out` (rows, in), contiguous, bfloat16 or float32.

    Bit for bit what bitsandbytes makes of it where `row_scale` is None or 1: products and sums round one by one, no
    multiply-add is fused.

    Args:
        tensors, row_scale, first_row: as `weight_from` takes them.
        nested_code, nf4_code: (256,) and (16,) float32, the values that codes stand for.
    """
    packed, absmax, *nested = (tensor.contiguous() for tensor in tensors)
    if not packed.numel():
        return
    stored = absmax if nested else absmax.view(torch.float32)
    absmax_scale, absmax_mean = nested or (stored, stored)
    with torch.cuda.device_of(packed):  # Triton launches on the current device
        _dequantize_nf4[(triton.cdiv(packed.numel(), BYTES),)](
            packed, stored, absmax_scale, absmax_mean, nested_code, nf4_code,
            stored if row_scale is None else row_scale.contiguous(), out,
            packed.numel(), packed.shape[1], first_row * absmax.shape[1],
            NESTED=bool(nested), SCALED=row_scale is not None, BYTES=BYTES, enable_fp_fusion=ALLOW_FMA,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _magnitude_gradient(  # type: ignore[no-untyped-def]
    dy, y, inverse_m, out, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    has_column = column < num_columns
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & has_column[None, :]
        at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
        left = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        total += left * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inverse_m + column, mask=has_column, other=0.0)
    tl.store(out + column, tl.sum(total, 0) * scale, mask=has_column)


def magnitude_gradient(dy: Tensor, y: Tensor, inverse_m: Tensor) -> Tensor:
    """As `qdora.adapter.operator.magnitude_gradient`, with products and sums in float32; always in the same order."""
    dy, y = dy.contiguous(), y.contiguous()
    out = torch.empty(dy.shape[1], dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        _magnitude_gradient[(triton.cdiv(dy.shape[1], COLUMNS),)](
            dy, y, inverse_m.contiguous(), out, dy.shape[0], dy.shape[1], ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return out
