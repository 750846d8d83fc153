"""DoRA (arXiv:2402.09353, sections 4.1 to 4.3) at the price of LoRA.

    y = g * (W x + s B A x) + bias        g = m / n,   n = || W + s B A || per output row, detached (section 4.3)

    W  (out, in)    frozen, NF4 or model dtype      s  alpha / rank, or alpha / sqrt(rank)
    A  (rank, in)   `lora_a`, random at first       m  (out,) `magnitude`, the row norm of W at first
    B  (out, rank)  `lora_b`, zero at first         g  (out,) `gain`, float32, one at first: step 0 is the base model

Folding. g has one number a row of W and a row holds whole NF4 blocks, so g folds into the block scales: dequantising
with g[:, None] * absmax emits g * W, and with B' = s g B the layer is y = W' x + B' (A x), which is QLoRA's arithmetic.
Over an unquantised W the product of both is scaled instead. Backward, with y before the bias:

    dx = W'^T dy + A^T (B'^T dy)    dA = (B'^T dy) x^T    dB = s g * (dy (A x)^T)    dm = sum over tokens of dy * y / m

so x, A x and y are kept, and W' is dequantised again into the same buffer.

Norm. n depends on W, A and B only: it is computed once an optimiser step, on each rank's own rows, without forming B A:

    n^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

in float32, |W|^2 once at load. Where this cancels (n^2 < 1e-3 |W|^2) the row is computed densely. A row of zeros gets a
floor. `gain` is stored as its four bytes, so that it travels in the block's gather without being rounded to bfloat16:
g - 1 is about 0.0015.

Departures from the paper: the norm is per output row (as in the authors' code and PEFT; the paper writes columns of the
transposed weight), and the norm of the *dequantised* weight starts m. LoRA (arXiv:2106.09685) is the same layer with
g = 1 and no m; VeRA and DVoRA (`vera.py`) are both with another A and B.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdora import nf4
from qdora.adapter.operator import adapted_linear
from qdora.sharding import gather_rows, own_rows

NORM_FLOOR = 1e-6
"""Smallest row norm: real checkpoints have rows of zeros, where m / n would be 0 / 0."""
CANCELLATION = 1e-3
"""Below this share of |W|^2 the expanded norm has lost half of float32's digits: the row is computed densely."""
CHUNK_NUMEL = 2**24
"""Values of W dequantised to float32 at a time while norms are computed (64 MiB)."""
REFRESHED_NUMEL = 2**24
"""Values of A gathered, of whole blocks, before a refresh waits for what it has computed of them."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a DoRA or LoRA adapter; replaces an `nn.Linear`, same input and output dtype.

    Built on the current default device (usually meta). `reset` starts the adapter; `refresh` must follow any change of
    `lora_a`, `lora_b` or `magnitude` (the optimiser's post-step hook does it in training).
    """

    FACTORS: tuple[str, str] = ("lora_a", "lora_b")
    """The parameters that A and B are made of."""

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

    def start(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform as in LoRA, the same on any number of ranks, and B zero."""
        a, b = self.trained_factors()
        bound = self.in_features**-0.5
        whole = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        own, first = own_rows(a)
        own.copy_(whole[first : first + own.shape[0]])
        own_rows(b)[0].zero_()

    def base_tensors(self) -> list[Tensor]:
        """What `nf4.weight_from` needs, as they are now."""
        return self.base.tensors() if isinstance(self.base, nf4.NF4Linear) else [self.base.weight]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off:
            return self.base(x)  # type: ignore[no-any-return]
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if self.dropout > 0 and self.training:
            return self._forward_with_dropout(x, bias)
        y: Tensor
        factors = self.factors(*self.trained_factors(), x.dtype)
        rows = x.reshape(-1, self.in_features)
        base = self.base_tensors()
        nothing = [None] * (4 - len(base))
        y, _ = adapted_linear(rows, *base, *nothing, self.gain, *factors, self.magnitude, self.scaling)
        y = y.view(*x.shape[:-1], self.out_features)
        # Outside: dm wants y without it, and subtracting a large bias from a rounded y loses the rest.
        return y if bias is None else y + bias

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
        """Computes |W|^2 of the own rows; once, after the base weight is loaded."""
        squares = [rows.square().sum(1) for _, rows in self._own_weight(device)]
        self.base_norm_squared = torch.cat(squares) if squares else torch.empty(0, device=device)

    def weight_norm(self, trained_a: Tensor) -> Tensor:
        """n of the own rows, (own rows,) float32. `trained_a` is all that A is made of, as the forward rounds it."""
        return _weight_norms([self], [trained_a])[0]

    @torch.no_grad()
    def expanded_norm(self, trained_a: Tensor) -> tuple[Tensor, Tensor]:
        """|W|^2 + 2 s W A . B + s^2 |B A|^2 of the own rows, and which of them have lost their digits to it."""
        assert self.base_norm_squared is not None, "measure() comes first"
        a, b = self._own_factors(trained_a)
        products = torch.empty_like(b)
        for first, rows in self._own_weight(a.device):
            torch.mm(rows, a.T, out=products[first : first + rows.shape[0]])
        products.mul_(2 * self.scaling).addmm_(b, a @ a.T, alpha=self.scaling**2)
        squared = self.base_norm_squared + products.mul_(b).sum(1)
        return squared, squared < CANCELLATION * self.base_norm_squared

    @torch.no_grad()
    def replace_lost(self, trained_a: Tensor, squared: Tensor, lost: Tensor) -> None:
        """Computes the rows that `lost` names from W + s B A itself; mutates `squared`."""
        a, b = self._own_factors(trained_a)
        for first, rows in self._own_weight(a.device):
            some = slice(first, first + rows.shape[0])
            dense = rows[lost[some]] + self.scaling * (b[some][lost[some]] @ a)
            squared[some] = squared[some].masked_scatter(lost[some], dense.square().sum(1))

    def _own_factors(self, trained_a: Tensor) -> tuple[Tensor, Tensor]:
        """A, and B of the own rows, as the forward rounds them, in float32."""
        own, first_row = own_rows(self.trained_factors()[1])
        own = own.to(trained_a.device, trained_a.dtype)
        a, b = self.factors(trained_a, own, trained_a.dtype, first_row)
        return a.float(), b.float()

    def _own_weight(self, device: torch.device) -> Iterable[tuple[int, Tensor]]:
        """This rank's rows of W in float32, some at a time, each with its place among the own rows."""
        step = max(1, CHUNK_NUMEL // self.in_features)
        if isinstance(self.base, nf4.NF4Linear):
            packed, first_row = own_rows(self.base.packed)
            absmax, _ = own_rows(self.base.absmax)
            for first in range(0, packed.shape[0], step):
                some = slice(first, first + step)
                scales = nf4.unnest(
                    absmax[some].to(device), self.base.absmax_scale, self.base.absmax_mean, first_row + first
                )
                yield first, nf4.dequantize(packed[some].to(device), scales, torch.float32)
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
def refresh(blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Recomputes every DoRA layer's gain from its magnitude, A, B and W, on each rank's own rows. *Collective*.

    Must follow every change of those: the optimiser's step, a load, a switch of adapters. One collective a block.

    Args:
        blocks: the modules to go through, the same on all ranks.
        dtype: compute dtype, to which the forward rounds A and B.
    """
    layers: list[AdaptedLinear] = []
    trained: list[Tensor] = []
    for block in blocks:
        own = [layer for layer in adapted_layers(block).values() if layer.gain is not None]
        if own:
            layers += own
            trained += gather_rows([layer.trained_factors()[0] for layer in own], dtype, device)
        if sum(a.numel() for a in trained) > REFRESHED_NUMEL:
            _write_gains(layers, trained, device)
            layers, trained = [], []
    _write_gains(layers, trained, device)


def _write_gains(layers: Sequence[AdaptedLinear], trained: Sequence[Tensor], device: torch.device) -> None:
    for layer, norm in zip(layers, _weight_norms(layers, trained), strict=True):
        magnitude = own_rows(layer.magnitude)[0]  # type: ignore[arg-type]
        own_rows(layer.gain)[0].copy_((magnitude.to(device) / norm)[:, None].view(torch.uint8))  # type: ignore[arg-type]


@torch.no_grad()
def _weight_norms(layers: Sequence[AdaptedLinear], trained: Sequence[Tensor]) -> list[Tensor]:
    """n of the own rows of each layer; see `AdaptedLinear.weight_norm`. Waits for a GPU once, unless rows are lost."""
    expanded = [layer.expanded_norm(trained_a) for layer, trained_a in zip(layers, trained, strict=True)]
    if expanded and torch.stack([lost.any() for _, lost in expanded]).any():
        for layer, trained_a, (squared, lost) in zip(layers, trained, expanded, strict=True):
            if lost.any():
                layer.replace_lost(trained_a, squared, lost)
    return [squared.clamp_(min=0).sqrt_().clamp_(min=NORM_FLOOR) for squared, _ in expanded]


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
