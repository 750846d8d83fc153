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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdora import nf4
from qdora.adapter.operator import Factors, adapted_linear, scaled_factors
from qdora.sharding import is_sharded, own_rows

NORM_FLOOR = 1e-6
"""Smallest row norm: real checkpoints have rows of zeros, where m / n would be 0 / 0."""
CHUNK_NUMEL = 2**24
"""Values of W dequantised to float32 at a time while norms are computed (64 MiB)."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a DoRA or LoRA adapter; replaces an `nn.Linear`, same input and output dtype.

    Built on the current default device (usually meta). `reset` starts the adapter; `refresh.Refresher` must be called
    after any change of `lora_a`, `lora_b` or `magnitude` (the optimiser's post-step hook does it in training).
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
        a, b = self.FACTORS
        return self._parameters[a], self._parameters[b]  # type: ignore[return-value]

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
        made = Factors(*[self._buffers[name] for name in Factors._fields])  # type: ignore[arg-type]
        return made if made.lora_a_rounded.dtype == dtype else None

    def give_factors(self, factors: Factors) -> None:
        """Takes the buffers that `mark_rounded` says to be written."""
        for name, buffer in zip(Factors._fields, factors, strict=True):
            setattr(self, name, buffer)

    def mark_rounded(self, a: Tensor, b: Tensor) -> None:
        """Says that the buffers have been made of A and B, the trained factors, as they are now."""
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
        y = adapted_linear(x, self.base_tensors(), self.gain, *self._forward_factors(x.dtype), self.magnitude)
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

    def project(self, a: Tensor, out: Tensor) -> None:
        """W A^T of the own rows into `out`, all float32."""
        for first, rows in self._own_weight(a.device):
            torch.mm(rows, a.t(), out=out if rows.shape[0] == out.shape[0] else out[first : first + rows.shape[0]])

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
        tensors = self.base_tensors()
        if not is_sharded(tensors[0]) and tensors[0].shape[0] <= step:
            yield 0, nf4.weight_from(tensors, torch.float32)
        elif isinstance(self.base, nf4.NF4Linear):
            (packed, first_row), (absmax, _) = map(own_rows, tensors[:2])
            for first in range(0, packed.shape[0], step):
                some = slice(first, first + step)
                own = [packed[some].to(device), absmax[some].to(device), *tensors[2:]]
                yield first, nf4.weight_from(own, torch.float32, first_row=first_row + first)
        else:
            weight, _ = own_rows(tensors[0])
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
