"""Products in bfloat16 on a CPU that has no instructions for them: in float32, rounded once.

torch leaves bfloat16 matrices to oneDNN where the CPU has AVX-512, and otherwise multiplies them by loops, which take
up to 70 times as long as float32 (pytorch/pytorch#146508): on most desktops, Zen 1 to 3 and Intel's since the 12th
generation. There `install` puts torch's own float32 product of the same values in their place. What is added up and
rounded is the same: a product of two bfloat16 is exact in float32, sums are in float32, the result is rounded once.

To be removed once torch does this.
"""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

__all__ = ["install"]

TILE = 1024
"""Rows and columns of what is in float32 at a time (4 MiB)."""
FEW_ROWS = 4
"""A product of fewer is left to torch's loop, which is as fast: reading the other factor is what it waits for."""
FEW_PRODUCTS = 1 << 14
"""A product of fewer m k n is left to it, too: it has done them before others have begun."""
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu_backward"


@cache
def install() -> None:
    """Replaces torch's kernels of bfloat16 products on the CPU, for this process, if they are loops."""
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for name in (
            "mm",
            "mm.out",
            "addmm",
            "addmm.out",
            "addmm_",
            "bmm",
            "bmm.out",
            "baddbmm",
            "baddbmm.out",
            "baddbmm_",
        ):
            _replace(name, _in_float32(get_kernel(f"aten::{name}", "CPU"), 3 if "bmm" in name else 2, name[-1] == "_"))
        _replace(ATTENTION, _gradients_of(get_kernel(f"aten::{ATTENTION}", "CPU")))


def _replace(name: str, kernel: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        _library().impl(name, kernel, "CPU", with_keyset=True, allow_override=True)


@cache
def _library() -> Library:
    """Makes the library of this process, kept because its kernels go when it is collected."""
    return Library("aten", "IMPL")


def _in_float32(own: Any, dim: int, in_place: bool) -> Callable[..., Any]:
    """What stands for `own`: mm or addmm (`dim` 2), bmm or baddbmm (3); all but large bfloat16 goes to it."""

    def kernel(keyset: Any, *args: Any, out: Tensor | None = None, **factors: Any) -> Tensor:
        *added, a, b = args
        into, shape = added[0] if in_place else out, (*a.shape[:-1], b.shape[-1])
        misfits = in_place and added[0].shape != shape
        if _is_ours([*args, *([] if into is None else [into])], a, b, dim) and not misfits:
            if into is None:
                into = a.new_empty(shape)
            elif into.shape != shape:
                into.resize_(shape)
            return _multiply(a, b, into, *added, **factors)
        if out is not None:
            factors["out"] = out
        result: Tensor = own.call_boxed(keyset, *args, **factors)
        return result

    return kernel


def _is_ours(tensors: list[Tensor], a: Tensor, b: Tensor, dim: int) -> bool:
    """Whether a product is of bfloat16 and large; torch's own kernels say what is wrong with shapes and dtypes."""
    return (
        all(tensor.dtype is torch.bfloat16 for tensor in tensors)
        and a.dim() == b.dim() == dim
        and a.shape[:-2] == b.shape[:-2]
        and a.shape[-1] == b.shape[-2]
        and a.shape[-2] >= FEW_ROWS
        and a.shape[-2] * a.shape[-1] * b.shape[-1] >= FEW_PRODUCTS
    )


def _multiply(
    a: Tensor, b: Tensor, out: Tensor, added: Tensor | None = None, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`out` (..., m, n) = beta added + alpha a (..., m, k) @ b (..., k, n), rounded once; `added` can be `out`."""
    if added is not None:
        added = added.expand_as(out)
    if a.dim() == 3:
        for index in range(len(a)):
            _multiply(a[index], b[index], out[index], added if added is None else added[index], beta=beta, alpha=alpha)
        return out
    for rows, columns in product(_tiles(a.shape[0]), _tiles(b.shape[1])):
        inner = _tiles(a.shape[1])
        tile = a[rows, inner[0]].float() @ b[inner[0], columns].float()
        for rest in inner[1:]:
            tile.addmm_(a[rows, rest].float(), b[rest, columns].float())
        if alpha != 1:
            tile *= alpha
        if added is not None and beta != 0:
            tile.add_(added[rows, columns], alpha=beta)
        out[rows, columns] = tile
    return out


def _tiles(size: int) -> list[slice]:
    return [slice(first, first + TILE) for first in range(0, size, TILE)]


def _gradients_of(own: Any) -> Callable[..., Any]:
    """What stands for the gradients of attention."""

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        if args[0].dtype is not torch.bfloat16:
            return own.call_boxed(keyset, *args, **options)
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        mask = options.get("attn_mask")
        if mask is not None:
            options["attn_mask"] = mask.float()
        return tuple(gradient.to(args[0].dtype) for gradient in own.call_boxed(keyset, *wide, **options))

    return kernel
