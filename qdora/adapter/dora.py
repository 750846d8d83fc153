"""DoRA (arXiv:2402.09353, sections 4.1 to 4.3) at the price of LoRA.

    y = g * (W x + s B A x) + bias        g = m / n,   n = || W + s B A || per output row, detached (section 4.3)

    W  (out, in)    frozen, NF4 or model dtype      s  alpha / rank, or alpha / sqrt(rank)
    A  (rank, in)   `lora_a`, random at first       m  (out,) `magnitude`, the row norm of W at first
    B  (out, rank)  `lora_b`, zero at first         g  (out,) `gain`, float32, one at first: step 0 is the base model

Folding. g has one number a row of W and a row holds whole NF4 blocks, so g folds into the block scales: dequantising
with g[:, None] * absmax emits g * W, and with B' = s g B the layer is y = W' x + B' (A x), which is QLoRA's arithmetic.
Over an unquantised W the rows of W x are scaled instead. Backward, with y before the bias:

    dx = W'^T dy + A^T (B'^T dy)    dA = (B'^T dy) x^T    dB = s g * (dy (A x)^T)    dm = sum over tokens of dy * y / m

so x, A x and y are kept, and W' is dequantised again into the same buffer.

Norm. n depends on W, A and B only: it is computed once an optimiser step, on each rank's own rows, without forming B A:

    n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

in float32, |W|^2 once at load. Where this cancels (n^2 < 1e-3 |W|^2) the row is computed densely. A row of zeros gets a
floor. `gain` is stored as its four bytes, so that it travels in the block's gather without being rounded to bfloat16:
g - 1 is about 0.0015. A and B that are whole on the rank are rounded, and B' is made of them, at the same time.

Departures from the paper: the norm is per output row (as in the authors' code and PEFT; the paper writes columns of the
transposed weight), and the norm of the *dequantised* weight starts m. LoRA (arXiv:2106.09685) is the same layer with
g = 1 and no m; VeRA and DVoRA (`vera.py`) are both with another A and B.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from qdora import nf4
from qdora.adapter.operator import Factors, adapted_linear, inverse, scaled_factors
from qdora.sharding import gather_rows, is_sharded, own_rows

NORM_FLOOR = 1e-6
"""Smallest row norm: real checkpoints have rows of zeros, where m / n would be 0 / 0."""
CANCELLATION = 1e-3
"""Below this share of |W|^2 the expanded norm has lost half of float32's digits: the row is computed densely."""
CHUNK_NUMEL = 2**24
"""Values of W dequantised to float32 at a time while norms are computed (64 MiB)."""
REFRESHED_NUMEL = 2**22
"""Values of A and of the own rows of B, of whole blocks, that a refresh computes with at a time."""
REFRESHED_BYTES = 14
"""Bytes that such a value takes at most: as it is, rounded, in float32, and for B its product with A."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a DoRA or LoRA adapter; replaces an `nn.Linear`, same input and output dtype.

    Built on the current default device (usually meta). `reset` starts the adapter; `refresh` must follow any change of
    `lora_a`, `lora_b` or `magnitude` (the optimiser's post-step hook does it in training).
    """

    FACTORS: tuple[str, str] = ("lora_a", "lora_b")
    """The parameters that A and B are made of."""
    are_factors_computed = False
    """Whether A and B are more than those parameters, so that autograd has to go through what makes them."""
    lora_a_rounded: Tensor
    scaled_b: Tensor
    row_scale: Tensor
    inverse_m: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float,
        dora: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        for name, shape in zip(self.FACTORS, self.factor_shapes(), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.magnitude = nn.Parameter(torch.empty(out_features, dtype=torch.float32)) if dora else None
        gain = torch.empty(out_features, 4, dtype=torch.uint8)
        self.gain = nn.Parameter(gain, requires_grad=False) if dora else None
        self.base_norm_squared: Tensor | None = None
        """(own rows,) float32: |W|^2 of this rank's rows, set by `measure`."""
        self.is_whole = False
        """Whether the rank holds all of A and B; set by `measure`."""
        for name in Factors._fields:
            self.register_buffer(name, None, persistent=False)
        self._rounded_from: tuple[Tensor, int, Tensor, int] | None = None
        """A and B of which those buffers were made, each with torch's count of what was written into it."""
        self.is_off = False
        """Whether the base computes alone; see `switched_off`."""

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the trained parameters."""
        return (self.rank, self.in_features), (self.out_features, self.rank)

    def trained_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that A and B are made of, or what FSDP2 has gathered of them."""
        return getattr(self, self.FACTORS[0]), getattr(self, self.FACTORS[1])

    def factors(self, a: Tensor, b: Tensor, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor]:
        """A (rank, in) and rows of B (rows, rank) of the whole trained `a` and of `b`'s rows from `first` on.

        Args:
            dtype: compute dtype, to which whatever is computed here is rounded.
        """
        return a, b

    def factor_numel(self) -> int:
        """Values of A, and of B's own rows."""
        return self.rank * (self.in_features + own_rows(self.trained_factors()[1])[0].shape[0])

    def start(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform as in LoRA, the same on any number of ranks, and B zero."""
        a, b = self.trained_factors()
        bound = self.in_features**-0.5
        whole = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        own, first = own_rows(a)
        own.copy_(whole[first : first + own.shape[0]])
        own_rows(b)[0].zero_()

    def rounded(self, dtype: torch.dtype) -> Factors | None:
        """What the last refresh made for the forwards, unless A or B is another or was written since.

        A refresh must follow a write through `.data`, which torch does not count, and any where blocks are compiled:
        they do not ask, as they would be compiled anew each time.
        """
        if self._rounded_from is None:
            return None
        if not torch.compiler.is_compiling():
            (a, b), (made_of_a, version_a, made_of_b, version_b) = self.trained_factors(), self._rounded_from
            if a is not made_of_a or b is not made_of_b or a._version != version_a or b._version != version_b:
                return None
        made = Factors(self.lora_a_rounded, self.scaled_b, self.row_scale, self.inverse_m)
        return made if made.lora_a_rounded.dtype == dtype else None

    def mark_rounded(self) -> None:
        """Says that the buffers have been made of A and B as they are now."""
        a, b = self.trained_factors()
        self._rounded_from = (a, a._version, b, b._version)

    def base_tensors(self) -> list[Tensor]:
        """What `nf4.weight_from` needs, as they are now."""
        return self.base.tensors() if isinstance(self.base, nf4.NF4Linear) else [self.base.weight]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off:
            return self.base(x)  # type: ignore[no-any-return]
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if self.dropout > 0 and self.training:
            return self._forward_with_dropout(x, bias)
        rows = x.reshape(-1, self.in_features)
        y = adapted_linear(rows, self.base_tensors(), self.gain, *self._forward_factors(x.dtype), self.magnitude)
        y = y.view(*x.shape[:-1], self.out_features)
        # Outside: dm wants y without it, and subtracting a large bias from a rounded y loses the rest.
        return y if bias is None else y + bias

    def _forward_factors(self, dtype: torch.dtype) -> tuple[Factors, Tensor, Tensor]:
        """What the forward computes with, and the A and B that its gradients reach."""
        rounded = self.rounded(dtype)
        if rounded is not None:
            return rounded, *self.trained_factors()
        a, b = self.factors(*self.trained_factors(), dtype)
        return scaled_factors(a, b, self.gain, self.magnitude, self.scaling, dtype), a, b

    def _forward_with_dropout(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """PEFT's semantics: y = W x + (g - 1) W drop(x) + g s B A drop(x), unfused: three more passes over y."""
        dropped = nn.functional.dropout(x, self.dropout)
        lora_a, lora_b = self.factors(*self.trained_factors(), x.dtype)
        update = dropped @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T * self.scaling
        y: Tensor = nf4.frozen_linear(x, self.base_tensors())
        if self.gain is None or self.magnitude is None:
            y = y + update
        else:
            # The quotient is 1; it carries dg/dm = 1 / n = g / m without a gradient to the norm.
            g = self.gain.view(torch.float32).squeeze(1) * (self.magnitude / self.magnitude.detach()).float()
            from_base = nf4.frozen_linear(dropped, self.base_tensors())
            y = y + ((g - 1) * from_base + g * update).to(y.dtype)
        return y if bias is None else y + bias

    @torch.no_grad()
    def measure(self, device: torch.device) -> None:
        """Computes |W|^2 of the own rows; once, after the base weight is loaded and the model sharded."""
        self.is_whole = not is_sharded(self.trained_factors()[0])
        squares = [rows.square().sum(1) for _, rows in self._own_weight(device)]
        self.base_norm_squared = torch.cat(squares) if squares else torch.empty(0, device=device)

    def own_factors(self, trained_a: Tensor) -> tuple[Tensor, Tensor]:
        """A, and B of the own rows, which the forward rounds to the dtype of `trained_a`, all that A is made of."""
        own, first_row = own_rows(self.trained_factors()[1])
        return self.factors(trained_a, own.to(trained_a.device), trained_a.dtype, first_row)

    @torch.no_grad()
    def project(self, a: Tensor, out: Tensor) -> None:
        """W A^T of the own rows into `out`, all float32."""
        for first, rows in self._own_weight(a.device):
            torch.mm(rows, a.T, out=out[first : first + rows.shape[0]])

    @torch.no_grad()
    def replace_lost(self, a: Tensor, b: Tensor, squared: Tensor, lost: Tensor) -> None:
        """Computes the rows that `lost` names from W + s B A itself; mutates `squared`."""
        for first, rows in self._own_weight(a.device):
            some = slice(first, first + rows.shape[0])
            dense = rows[lost[some]] + self.scaling * (b[some][lost[some]] @ a)
            squared[some] = squared[some].masked_scatter(lost[some], dense.square().sum(1))

    def _own_weight(self, device: torch.device) -> Iterable[tuple[int, Tensor]]:
        """This rank's rows of W in float32, some at a time, each with its place among the own rows."""
        step = max(1, CHUNK_NUMEL // self.in_features)
        if isinstance(self.base, nf4.NF4Linear):
            packed, first_row = own_rows(self.base.packed)
            absmax, _ = own_rows(self.base.absmax)
            for first in range(0, packed.shape[0], step):
                some = slice(first, first + step)
                own = [packed[some].to(device), absmax[some].to(device), *self.base.tensors()[2:]]
                yield first, nf4.weight_from(own, torch.float32, first_row=first_row + first)
        else:
            weight, _ = own_rows(self.base.weight)  # type: ignore[arg-type]
            for first in range(0, weight.shape[0], step):
                yield first, weight[first : first + step].to(device, torch.float32)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Every adapted layer of `model` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes as its base alone, exactly; blocks within each other are allowed."""
    before = [(layer, layer.is_off) for layer in adapted_layers(model).values()]
    for layer, _ in before:
        layer.is_off = True
    try:
        yield
    finally:
        for layer, was_off in before:
            layer.is_off = was_off


@torch.no_grad()
def refresh(
    blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype, *, defer: bool = False
) -> Tensor | None:
    """Recomputes every DoRA layer's gain from its magnitude, A, B and W, on each rank's own rows. *Collective*.

    Must follow every change of those: the optimiser's step, a load, a switch of adapters. One collective a block. Also
    rounds A and B for the forwards until the next change, where they are whole on the rank.

    Args:
        blocks: the modules to go through, the same on all ranks.
        dtype: compute dtype, to which the forward rounds A and B.
        defer: whether a GPU is not waited for. Rows that have cancelled have a wrong gain until a refresh without.

    Returns:
        With `defer`, and if there is a DoRA layer, whether such a row is among the rank's own, () bool on `device`.
    """
    cancelled: list[Tensor] | None = [] if defer else None
    adapted = [list(adapted_layers(block).values()) for block in blocks]
    layers: list[AdaptedLinear] = []
    trained: list[Tensor] = []
    numel = 0
    for own in adapted:
        dora = [layer for layer in own if layer.gain is not None]
        if dora:
            layers += dora
            trained += gather_rows([layer.trained_factors()[0] for layer in dora], dtype, device)
            numel += sum(layer.factor_numel() for layer in dora)
        if numel > REFRESHED_NUMEL:
            _write_gains(layers, trained, device, cancelled)
            layers, trained, numel = [], [], 0
    if layers:
        _write_gains(layers, trained, device, cancelled)
    whole = [layer for own in adapted for layer in own if layer.is_whole and not layer.are_factors_computed]
    if whole:
        _round_factors(whole, dtype)
    if not cancelled:
        return None
    return cancelled[0] if len(cancelled) == 1 else torch.stack(cancelled).any()


def _write_gains(
    layers: Sequence[AdaptedLinear],
    trained: Sequence[Tensor],
    device: torch.device,
    cancelled: list[Tensor] | None,
) -> None:
    # Layers of a shape beside each other, for what is done for them together.
    order = sorted(range(len(layers)), key=lambda index: _likeness(layers[index]))
    layers, trained = [layers[index] for index in order], [trained[index] for index in order]
    norms = row_norms(layers, trained, cancelled)
    magnitudes = torch.cat([own_rows(layer.magnitude)[0] for layer in layers]).to(device)  # type: ignore[arg-type]
    gains = [own_rows(layer.gain)[0].view(torch.float32)[:, 0] for layer in layers]  # type: ignore[arg-type]
    torch._foreach_copy_(gains, (magnitudes / norms).split([gain.numel() for gain in gains]))


def _likeness(layer: AdaptedLinear) -> tuple[float, ...]:
    """The same of layers that have the same shapes, and the same scaling."""
    return layer.in_features, layer.out_features, layer.scaling


@torch.no_grad()
def row_norms(
    layers: Sequence[AdaptedLinear], trained: Sequence[Tensor], cancelled: list[Tensor] | None = None
) -> Tensor:
    """n of the own rows of each layer after the other, (own rows of all,) float32.

    What can be is computed for all layers at once, or for those of a shape that follow each other. Waits for a GPU
    once, unless rows have cancelled; with `cancelled` never.

    Args:
        layers: of one rank r.
        trained: all that A is made of, of each layer, in the dtype to which the forward rounds A and B.
        cancelled: gets whether a row has cancelled, () bool on the device; such rows are wrong then.
    """
    factors = [layer.own_factors(trained_a) for layer, trained_a in zip(layers, trained, strict=True)]
    groups = [list(group) for _, group in groupby(range(len(layers)), lambda index: _likeness(layers[index]))]
    # A of the layers of a group as one tensor, and their B beside each other.
    every_a = [torch.stack([factors[index][0] for index in group]).float() for group in groups]
    own_a = [a for of_group in every_a for a in of_group.unbind()]
    every_b = torch.cat([b for _, b in factors]).to(trained[0].dtype).float()
    sizes = [b.shape[0] for _, b in factors]
    products, own_b = torch.empty_like(every_b), every_b.split(sizes)
    for layer, a, out in zip(layers, own_a, products.split(sizes), strict=True):
        layer.project(a, out)
    rows = [sum(sizes[index] for index in group) for group in groups]
    for group, a, b, out in zip(groups, every_a, every_b.split(rows), products.split(rows), strict=True):
        # 2 s W A^T + s^2 B A A^T, which times B are the norm's sums.
        shape, scaling = (len(group), -1, a.shape[1]), layers[group[0]].scaling
        out.view(shape).baddbmm_(b.view(shape), a @ a.mT, beta=2 * scaling, alpha=scaling**2)
    base = torch.cat([layer.base_norm_squared for layer in layers])  # type: ignore[misc]
    squared = products.mul_(every_b).sum(1).add_(base)
    lost = squared < CANCELLATION * base
    if cancelled is not None:
        cancelled.append(lost.any())
    elif lost.any():
        parts = zip(layers, own_a, own_b, squared.split(sizes), lost.split(sizes), strict=True)
        for layer, a, b, own, of_own in parts:
            if of_own.any():
                layer.replace_lost(a, b, own, of_own)
    return squared.clamp_(min=0).sqrt_().clamp_(min=NORM_FLOOR)


def allocate_factors(layers: Sequence[AdaptedLinear], dtype: torch.dtype) -> None:
    """Gives layers the buffers of `Factors`, empty: of each kind but A one tensor, of which every layer has its rows.

    Args:
        layers: of one rank r, and all of DoRA or all of LoRA.
    """
    device, sizes = layers[0].trained_factors()[1].device, [layer.out_features for layer in layers]
    scaled_b = torch.empty(sum(sizes), layers[0].rank, dtype=dtype, device=device)
    row_scale = torch.empty(sum(sizes), 1, device=device)
    inverse_m = torch.empty(sum(sizes), device=device)
    parts = zip(layers, *(tensor.split(sizes) for tensor in (scaled_b, row_scale, inverse_m)), strict=True)
    for layer, b, scale, inverse_of_own in parts:
        layer.lora_a_rounded = torch.empty(layer.rank, layer.in_features, dtype=dtype, device=device)
        layer.scaled_b, layer.row_scale = b, scale
        layer.inverse_m = None if layer.gain is None else inverse_of_own


def _whole_of(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor whose rows these are, one after the other; None if there is none."""
    whole = None if rows[0] is None else rows[0]._base
    first = 0
    for part in rows:
        if whole is None or part is None or part._base is not whole or part.storage_offset() != first:
            return None
        first += part.numel()
    return whole if whole is not None and whole.numel() == first else None


def _round_factors(layers: Sequence[AdaptedLinear], dtype: torch.dtype) -> None:
    """Writes the buffers of `Factors` of layers that are whole, in few launches for all; `scaled_factors` is of one."""
    a, b = ([layer.trained_factors()[index].detach() for layer in layers] for index in (0, 1))
    for layer in layers:
        layer._rounded_from = None
    scaled_b = _whole_of([layer.scaled_b for layer in layers])
    if scaled_b is None or scaled_b.dtype != dtype or scaled_b.device != b[0].device:
        with torch.inference_mode(False):  # tensors made in it cannot be saved for a backward
            allocate_factors(layers, dtype)
    scaled_b, row_scale = (_whole_of([getattr(layer, name) for layer in layers]) for name in ("scaled_b", "row_scale"))
    assert scaled_b is not None
    assert row_scale is not None
    scales = [layer.row_scale for layer in layers]
    torch._foreach_copy_([layer.lora_a_rounded for layer in layers], a)
    torch._foreach_copy_([layer.scaled_b for layer in layers], b)
    gains = [layer.gain.view(torch.float32) for layer in layers if layer.gain is not None]
    if gains:
        torch._foreach_copy_(scales, gains)
        inverses = inverse(torch.cat([layer.magnitude for layer in layers]))  # type: ignore[misc]
        for_layers: list[Tensor] = [layer.inverse_m for layer in layers]  # type: ignore[misc]
        torch._foreach_copy_(for_layers, inverses.split([scale.numel() for scale in scales]))
    else:
        row_scale.fill_(1.0)
    torch._foreach_mul_(scales, [layer.scaling for layer in layers])
    scaled_b.mul_(row_scale)
    for layer in layers:
        layer.mark_rounded()


@torch.no_grad()
def reset(model: nn.Module, device: torch.device, seed: int) -> None:
    """Starts every adapter, m at the norm of W. Deterministic in `seed` and the layer's order."""
    for index, layer in enumerate(adapted_layers(model).values()):
        layer.start(torch.Generator().manual_seed(seed * 1_000_003 + index))
        layer.measure(device)
        if layer.magnitude is not None and layer.base_norm_squared is not None:
            norm = layer.base_norm_squared.sqrt().clamp_(min=NORM_FLOOR)
            own_rows(layer.magnitude)[0].copy_(norm)


def magnitude_drift(model: nn.Module) -> dict[str, tuple[float, int]]:
    """Sum over this rank's rows of |m / m_initial - 1|, and their number, a layer: does DoRA train?"""
    names, sums = [], []
    for name, layer in adapted_layers(model).items():
        if layer.magnitude is not None and layer.base_norm_squared is not None:
            own = own_rows(layer.magnitude)[0]
            initial = layer.base_norm_squared.sqrt().clamp_(min=NORM_FLOOR).to(own.device)
            names.append((name, own.numel()))
            sums.append((own / initial - 1).abs().sum())
    values = torch.stack(sums).tolist() if sums else []  # a GPU is waited for once
    return {name: (value, numel) for (name, numel), value in zip(names, values, strict=True)}
