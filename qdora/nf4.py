"""4-bit NormalFloat weights as plain, row-aligned parameters.

A weight W (out, in) is cut into blocks of 64 values along its rows (QLoRA, arXiv:2305.14314, section 3). With block b
of row o, the scale a_ob = max |W_ob| and the 16-value NF4 code book q,

    W_oj ~ a_ob * q[c_oj],        c_oj in 0..15,

and with double quantisation the scales themselves are stored in 8 bits, 256 of them (in row-major order over the whole
tensor) sharing one float32: a = scale * code + mean.

    name           shape                            dtype    memory
    packed         (out, in / 2)                    uint8    two codes a byte, the first in the high half
    absmax         (out, in / 64)                   uint8    8-bit codes (double_quant)
                   (out, in / 64 * 4)               uint8    the bytes of float32 scales (otherwise)
    absmax_scale   (ceil(out * in / 64 / 256),)     float32  replicated on every rank, 0.05 % of the weight
    absmax_mean    ()                               float32  replicated

Row o of W is row o of `packed` and `absmax`, so FSDP2 shards both on dim 0 without knowing what they are. An embedding
is stored the same way, a row a token; a head that is tied to it has the very same parameters. The float32 scales travel
as bytes because a mixed-precision policy would round them to bfloat16. The values are bit-identical to
`bitsandbytes.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")` on the whole tensor, whatever the number of
ranks. Both directions run in bitsandbytes' kernels, but for a GPU's dequantisation (`triton_kernels.py`, the same bits)
and a CPU's quantisation.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qdora.kernels import bnb, lib, tried

BLOCK_SIZE = 64
"""Values a block; bitsandbytes' CPU kernels are wrong for rows that do not hold whole blocks."""
NESTED_BLOCK_SIZE = 256
"""Scales that share one float32 under double quantisation."""
STORED, NESTED = ("packed", "absmax"), ("absmax_scale", "absmax_mean")
"""Names of an NF4 weight's parameters and of its buffers."""
MOST_VIEWS = 64
"""Shapes whose view of the buffer is kept: layers have a few, embeddings one for each number of tokens."""

_GRID_CELLS = 4096
"""Far more than codes: no cell has two borders."""
_QUANTISE_NUMEL = 2**18
"""Values that a CPU quantises at a time, so that temporaries stay in its cache."""
PART_NUMEL = {"cpu": 2**24, "cuda": 2**26}
"""Values of a head's weight that are dequantised at a time: no more than a linear layer of a block has."""
_CPU_KERNELS = {
    torch.bfloat16: "cdequantize_blockwise_cpu_nf4_bf16",
    torch.float32: "cdequantize_blockwise_cpu_nf4_fp32",
}


@cache
def _cpu_kernel(name: str, num_pointers: int, num_sizes: int) -> Callable[..., None]:
    """A function of bitsandbytes' library, called with addresses and sizes; its operators cost ten times the call."""
    function = getattr(lib, name)
    if not hasattr(function, "argtypes"):  # there is no library: bitsandbytes says so when it is called
        return function  # type: ignore[no-any-return]
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * num_pointers, *[ctypes.c_longlong] * num_sizes)(address)


class _Scratch:
    """One reused output buffer a device, dtype and (on a CPU) thread.

    On a CPU a fresh buffer costs four times the dequantisation itself (page faults); on a GPU one buffer bounds the
    memory of dequantised weights to the largest layer. Its content is valid until the next call.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._views: dict[tuple[torch.device, torch.dtype, int], dict[tuple[int, ...], Tensor]] = {}

    def get(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        # A merge works in several threads. On a GPU, where a backward has a thread of its own, all share the stream.
        key = (device, dtype, threading.get_ident() if device.type == "cpu" else 0)
        views = self._views.setdefault(key, {})
        view = views.get(shape)
        if view is None:
            numel = shape[0] * shape[1]
            is_large_enough = key in self._buffers and self._buffers[key].numel() >= numel
            if not is_large_enough or len(views) == MOST_VIEWS:
                views.clear()
            with torch.inference_mode(False):  # what is made in it cannot be written outside
                if not is_large_enough:
                    self._buffers.pop(key, None)  # first: there is no room for both
                    self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
                view = views[shape] = self._buffers[key][:numel].view(shape)
        return view

    def buffers(self) -> list[Tensor]:
        """All that there are."""
        return [*self._buffers.values()]


scratch = _Scratch()


@cache
def nested_code(device: torch.device) -> Tensor:
    """The 256 values (float32, sorted) that 8-bit scale codes stand for."""
    values: Tensor = bnb.create_dynamic_map()
    return values.to(device)


@cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 values (float32, sorted) that codes stand for."""
    values: Tensor = bnb.get_4bit_type("nf4", device="cpu")
    return values.to(device)


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `packed` (rows, in / 2) uint8 and block scales (rows, in / 64) float32 of `rows` (rows, in)."""
    out, width = rows.shape
    if not out:  # a rank that holds no row: the kernels refuse an empty tensor
        return rows.new_empty(0, width // 2, dtype=torch.uint8), rows.new_empty(0, width // BLOCK_SIZE).float()
    if rows.device.type == "cpu":
        return _quantize_on_cpu(rows)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(rows.contiguous(), BLOCK_SIZE, "nf4", torch.uint8)
    return packed.view(out, width // 2), absmax.view(out, width // BLOCK_SIZE)


def _quantize_on_cpu(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bit for bit what bitsandbytes 0.50.2 makes, 8 times as fast: there a binary search for each value.

    A value's cell of a grid knows its code, up to the one border between two codes that may lie in that cell.
    """
    below, border = _code_grid()
    blocks = rows.reshape(-1, BLOCK_SIZE)
    packed = torch.empty(blocks.shape[0], BLOCK_SIZE // 2, dtype=torch.uint8)
    absmax = torch.empty(blocks.shape[0], dtype=torch.float32)
    step = _QUANTISE_NUMEL // BLOCK_SIZE
    for first in range(0, blocks.shape[0], step):
        some = slice(first, first + step)
        values = blocks[some].float()
        torch.amax(values.abs(), 1, out=absmax[some])
        values = values.mul(absmax[some].clamp(min=1e-38).reciprocal_()[:, None]).flatten()
        cells = torch.add(values, 1).mul_(_GRID_CELLS / 2).int().clamp_(0, _GRID_CELLS)  # also what is not finite
        codes = below.index_select(0, cells)
        codes += values > border.index_select(0, cells)
        pairs = codes.view(torch.int16)  # little-endian: the first code is the low byte
        packed[some] = ((pairs & 15) << 4 | pairs >> 8).to(torch.uint8).view(-1, BLOCK_SIZE // 2)
    return packed.view(rows.shape[0], -1), absmax.view(rows.shape[0], -1)


@cache
def _code_grid() -> tuple[Tensor, Tensor]:
    """For each cell of a grid over -1..1: how many borders between codes lie below it, and the one inside, or inf."""
    values = nf4_code(torch.device("cpu"))
    borders = (values[:-1] + values[1:]) / 2
    cells = torch.add(borders, 1).mul_(_GRID_CELLS / 2).int()
    below = torch.searchsorted(cells, torch.arange(_GRID_CELLS + 1, dtype=torch.int32)).to(torch.uint8)
    inside = torch.full((_GRID_CELLS + 1,), torch.inf)
    inside[cells] = borders
    return below, inside


def nest(
    absmax: Tensor, num_rows: int, first_row: int = 0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of this rank's block scales: own codes, the whole tensor's `absmax_scale`, `absmax_mean`.

    *Collective* over `group`: the statistics need every rank's scales (1/64 of the values).

    Args:
        absmax: (own rows, in / 64) float32; ranks hold ceil(num_rows / ranks) rows each, the last ones fewer or none.
        num_rows: rows of the whole weight; `first_row` is the place of the first own one.
    """
    whole = absmax
    if group is not None and dist.get_world_size(group) > 1:
        padded = absmax.new_zeros(-(-num_rows // dist.get_world_size(group)), absmax.shape[1])
        padded[: absmax.shape[0]] = absmax
        shares = padded.new_empty(dist.get_world_size(group), *padded.shape)
        dist.all_gather(list(shares), padded, group=group)
        whole = shares.flatten(0, 1)[:num_rows]
    mean = whole.mean()
    codes, state = bnb.quantize_blockwise((whole - mean).flatten(), blocksize=NESTED_BLOCK_SIZE)
    own = codes.view_as(whole)[first_row : first_row + absmax.shape[0]]
    return own, state.absmax, mean


def unnest(absmax: Tensor, absmax_scale: Tensor | None, absmax_mean: Tensor | None, first_row: int = 0) -> Tensor:
    """Float32 block scales (rows, in / 64) of the stored `absmax`.

    Args:
        absmax: the stored rows, uint8; `first_row` is their place in the whole weight.
        absmax_scale: the whole weight's, or None where `absmax` holds the bytes of float32 scales.
    """
    if absmax_scale is None or absmax_mean is None:
        return absmax.view(torch.float32)
    first, skipped = divmod(first_row * absmax.shape[1], NESTED_BLOCK_SIZE)
    codes, code = absmax.contiguous(), nested_code(absmax.device)
    if skipped:  # the kernels want whole blocks in front
        codes = torch.cat([codes.new_zeros(skipped), codes.flatten()])
    scales = absmax_scale[first:] if first else absmax_scale
    if absmax.device.type == "cpu":
        values = torch.empty(codes.shape, dtype=torch.float32)
        addresses = code.data_ptr(), codes.data_ptr(), scales.data_ptr(), values.data_ptr()
        _cpu_kernel("cdequantize_blockwise_cpu_fp32", 4, 2)(*addresses, NESTED_BLOCK_SIZE, codes.numel())
    else:
        values = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, code, NESTED_BLOCK_SIZE, torch.float32)
    return (values[skipped:].view(absmax.shape) if skipped else values).add_(absmax_mean)


def dequantize(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantises into the reused buffer of the device and dtype; valid until the next call.

    Args:
        packed: (rows, in / 2) uint8.
        absmax: (rows, in / 64) float32, for example row-scaled by DoRA's g.

    Returns:
        (rows, in) of `dtype` (bfloat16 or float32).
    """
    shape = (packed.shape[0], packed.shape[1] * 2)
    out = scratch.get(shape, dtype, packed.device)
    if packed.device.type == "cpu":
        packed, absmax = packed.contiguous(), absmax.contiguous()
        addresses = packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        _cpu_kernel(_CPU_KERNELS[dtype], 3, 3)(*addresses, BLOCK_SIZE, *shape)
    else:
        torch.ops.bitsandbytes.dequantize_4bit.out(
            packed, absmax.contiguous(), BLOCK_SIZE, "nf4", shape, dtype, out=out
        )
    return out


Kernel = Callable[[list[Tensor], Tensor | None, int, Tensor, Tensor, Tensor], None]
"""Takes `tensors`, `row_scale` and `first_row` of `weight_from`, what it writes into, and the values of both codes."""


@cache
def _kernel(device: torch.device) -> Kernel | None:
    """What does in one launch what `unnest` and `dequantize` do in four; None where there is none."""
    return working_kernel(device) if device.type == "cuda" else None


def working_kernel(device: torch.device) -> Kernel | None:
    """Triton's kernel if it makes of a small weight what bitsandbytes does on this device; else None and a warning."""
    generator, first = torch.Generator().manual_seed(0), 5
    packed, absmax = quantize(torch.randn(97, 192, generator=generator).to(device))
    codes, absmax_scale, absmax_mean = nest(absmax, packed.shape[0])
    some = [packed[first:], codes[first:], absmax_scale, absmax_mean]
    scales = unnest(codes, absmax_scale, absmax_mean)[first:]
    row_scale = torch.rand(scales.shape[0], 1, generator=generator).to(device)

    def trial() -> Kernel:
        from qdora.triton_kernels import dequantize_nf4

        for dtype, scale, tolerance in ((torch.float32, None, 0.0), (torch.bfloat16, row_scale, 2**-7)):
            found = torch.empty(scales.shape[0], 192, dtype=dtype, device=device)
            dequantize_nf4(some, scale, first, found, nested_code(device), nf4_code(device))
            expected = dequantize(some[0], scales if scale is None else scales * scale, dtype)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0)
        return dequantize_nf4

    return tried(trial, device, "weights are dequantised in four launches")


class NF4Weight(nn.Module):
    """A frozen NF4 matrix (`num_rows`, `width`); see the module's docstring for the parameters.

    Built empty (on the current default device, usually meta); `qdora.model` fills it with the rank's rows.
    """

    absmax_scale: Tensor | None
    absmax_mean: Tensor | None

    def __init__(self, num_rows: int, width: int, double_quant: bool) -> None:
        super().__init__()
        assert width % BLOCK_SIZE == 0, f"rows of {width} values are not whole blocks of {BLOCK_SIZE}"
        self.num_rows, self.width, self.double_quant = num_rows, width, double_quant
        blocks = width // BLOCK_SIZE
        self.packed = _frozen(torch.empty(num_rows, width // 2, dtype=torch.uint8))
        self.absmax = _frozen(torch.empty(num_rows, blocks if double_quant else blocks * 4, dtype=torch.uint8))
        if double_quant:
            num_scales = -(-num_rows * blocks // NESTED_BLOCK_SIZE)
            self.register_buffer("absmax_scale", torch.empty(num_scales, dtype=torch.float32))
            self.register_buffer("absmax_mean", torch.empty((), dtype=torch.float32))
        else:
            self.register_buffer("absmax_scale", None)
            self.register_buffer("absmax_mean", None)

    def tensors(self) -> list[Tensor]:
        """What `weight_from` needs, as they are now (gathered inside a forward, this rank's rows outside)."""
        tensors = *map(self._parameters.get, STORED), *map(self._buffers.get, NESTED)
        return [tensor for tensor in tensors if tensor is not None]

    def share(self, other: "NF4Weight") -> None:
        """Takes the very parameters of `other`: a head that is tied to its embedding."""
        self.packed, self.absmax = other.packed, other.absmax
        self.absmax_scale, self.absmax_mean = other.absmax_scale, other.absmax_mean

    def extra_repr(self) -> str:
        return f"num_rows={self.num_rows}, width={self.width}, double_quant={self.double_quant}"


class NF4Linear(NF4Weight):
    """A frozen `nn.Linear` whose weight is NF4."""

    def __init__(self, in_features: int, out_features: int, bias: bool, double_quant: bool, dtype: torch.dtype) -> None:
        super().__init__(out_features, in_features, double_quant)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = frozen_linear(x, self.tensors())
        return y if self.bias is None else y + self.bias


class NF4Head(NF4Linear):
    """An `NF4Linear` that dequantises some rows of its weight at a time: a vocabulary is taller than any layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([frozen_linear(x, part) for _, part in row_parts(self.tensors())], -1)
        return y if self.bias is None else y + self.bias


class NF4Embedding(NF4Weight):
    """A frozen `nn.Embedding` whose table is NF4; only the rows that are looked up are dequantised."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, double_quant: bool, dtype: torch.dtype, scale: float | None
    ) -> None:
        """`scale`: what the rows are multiplied by, as Gemma does; None for nothing."""
        super().__init__(num_embeddings, embedding_dim, double_quant)
        self.num_embeddings, self.embedding_dim, self.dtype, self.scale = num_embeddings, embedding_dim, dtype, scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., embedding_dim) of (...) token ids."""
        ids = input_ids.flatten()
        absmax = self.absmax[ids]
        if self.absmax_scale is None or self.absmax_mean is None:
            scales = absmax.view(torch.float32)
        else:  # as `unnest`, for rows that do not follow each other
            places = ids[:, None] * absmax.shape[1] + torch.arange(absmax.shape[1], device=ids.device)
            scales = nested_code(ids.device)[absmax.int()].mul_(self.absmax_scale[places // NESTED_BLOCK_SIZE])
            scales.add_(self.absmax_mean)
        rows = dequantize(self.packed[ids], scales, self.dtype).clone().view(*input_ids.shape, -1)
        return rows if self.scale is None else rows.mul_(torch.tensor(self.scale).to(self.dtype))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def weight_from(
    tensors: list[Tensor], dtype: torch.dtype, row_scale: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """The weight that `tensors` stand for, each row times `row_scale`; valid until the next call.

    Args:
        tensors: `NF4Linear.tensors()`, of the first two all rows or some; or `[weight]` of a layer that is not
            quantised.
        row_scale: (out, 1) float32 or None. Of an unquantised weight it is not applied here.
        first_row: place of the first row in the whole weight.

    Returns:
        (out, in) of `dtype`.
    """
    if len(tensors) == 1:
        assert row_scale is None, "the rows of an unquantised weight are scaled at its output"
        return tensors[0].to(dtype)
    packed, absmax, *nested = tensors
    kernel = _kernel(packed.device)
    if kernel is not None:
        out = scratch.get((packed.shape[0], packed.shape[1] * 2), dtype, packed.device)
        kernel(tensors, row_scale, first_row, out, nested_code(packed.device), nf4_code(packed.device))
        return out
    absmax_scale, absmax_mean = nested or (None, None)
    scales = unnest(absmax, absmax_scale, absmax_mean, first_row)
    if row_scale is not None:
        # Out of place without double quantisation: `scales` is then a view of the stored parameter.
        scales = scales.mul_(row_scale) if nested else scales * row_scale
    return dequantize(packed, scales, dtype)


def row_parts(tensors: list[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """A weight as slices of its rows, each with what `weight_from` needs of it: about `PART_NUMEL` values at a time.

    Args:
        tensors: as `weight_from` takes them; a weight that is not quantised comes in one piece.
    """
    if len(tensors) == 1:
        yield slice(0, tensors[0].shape[0]), tensors
        return
    packed, absmax, *nested = tensors
    absmax_scale, absmax_mean = nested or (None, None)
    step = max(1, PART_NUMEL[packed.device.type] // (packed.shape[1] * 2))
    for first in range(0, packed.shape[0], step):
        rows = slice(first, min(first + step, packed.shape[0]))
        scales = unnest(absmax[rows], absmax_scale, absmax_mean, first)
        yield rows, [packed[rows], scales.view(torch.uint8)]


class _Opaque:
    depth = 0
    """How many `opaque_layers` are open. Of the process: a backward on CUDA recomputes in a thread of its own."""


@contextmanager
def opaque_layers() -> Iterator[None]:
    """Inside the block a frozen or adapted layer calls one operator, below autograd, that does all it does.

    For a `TorchDispatchMode` that keeps or counts what operators return: inside a layer, results are overwritten in
    the reused buffer.
    """
    _Opaque.depth += 1
    try:
        yield
    finally:
        _Opaque.depth -= 1


def is_opaque() -> bool:
    """Returns whether a layer is to call one operator."""
    return _Opaque.depth > 0


def frozen_linear(x: Tensor, base: list[Tensor]) -> Tensor:
    """x W^T (..., out) of a frozen weight, given as `weight_from` takes it, which the backward dequantises again."""
    function: Callable[..., Tensor] = _FrozenLinear.apply
    return opaque_frozen_linear(x, base) if torch.compiler.is_compiling() else function(x, *base)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *base: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(*base)
        if is_opaque():
            return opaque_frozen_linear(x, [*base])  # type: ignore[no-any-return]
        return torch.nn.functional.linear(x, weight_from([*base], x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def, override]
        base = [*ctx.saved_tensors]
        if is_opaque():
            return opaque_frozen_linear_backward(dy, base), *[None] * len(base)
        return dy @ weight_from(base, dy.dtype), *[None] * len(base)


@torch.library.custom_op("qdora::frozen_linear", mutates_args=())
def opaque_frozen_linear(x: Tensor, base: list[Tensor]) -> Tensor:
    """`frozen_linear` as one operator."""
    return torch.nn.functional.linear(x, weight_from(base, x.dtype))


@torch.library.custom_op("qdora::frozen_linear_backward", mutates_args=())
def opaque_frozen_linear_backward(dy: Tensor, base: list[Tensor]) -> Tensor:
    """dy W."""
    return dy @ weight_from(base, dy.dtype)


@opaque_frozen_linear.register_fake
def _(x, base):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], base[0].shape[0])


@opaque_frozen_linear_backward.register_fake
def _(dy, base):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:-1], base[0].shape[1] * (1 if len(base) == 1 else 2))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1])


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    base = list(ctx.saved_tensors)
    return opaque_frozen_linear_backward(dy.contiguous(), base), [None] * len(base)


opaque_frozen_linear.register_autograd(_backward, setup_context=_setup_context)
