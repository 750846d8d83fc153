"""What must follow every change of adapters: DoRA's gains, and what forwards take of A and B; dora.py has the formulas.

A step's refresh is many small computations, so that layers are refreshed together, those of like shape beside each
other: what can be is one launch for all of them.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qdora.adapter.dora import NORM_FLOOR, AdaptedLinear, adapted_layers
from qdora.adapter.operator import Factors, inverse
from qdora.sharding import gather_rows, own_rows

CANCELLATION = 1e-3
"""Below this share of |W|^2 the expanded norm has lost half of float32's digits: the row is computed densely."""
REFRESHED_NUMEL = 2**22
"""Values of A and of the own rows of B of DoRA's layers, of whole blocks, that a refresh computes with at a time."""
REFRESHED_BYTES = 10
"""Bytes that such a value takes at most: rounded, in float32, and for B its product with W or A."""


class Refresher:
    """Recomputes every DoRA layer's gain from its magnitude, A, B and W, on each rank's own rows.

    Must be called after every change of those: the optimiser's step, a load, a switch of adapters. Also rounds A and B
    for the forwards until the next change, where they are whole on the rank, into tensors that stay where they are.
    """

    def __init__(self, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """`blocks`: the modules to go through, measured, the same on all ranks.

        Args:
            dtype: compute dtype, to which the forward rounds A and B.
        """
        self._batches: list[_Batch] = []
        of_rank: dict[int, list[list[AdaptedLinear]]] = {}
        numel = 0
        for block in [*blocks, None]:
            if numel > REFRESHED_NUMEL or block is None:
                self._batches += [_Batch(some, dtype) for some in of_rank.values()]
                of_rank, numel = {}, 0
            layers = [] if block is None else adapted_layers(block).values()
            for rank in dict.fromkeys(layer.rank for layer in layers):
                of_rank.setdefault(rank, []).append([layer for layer in layers if layer.rank == rank])
            numel += sum(layer.factor_numel() for layer in layers if layer.gain is not None)

    @torch.no_grad()
    def __call__(self, device: torch.device, *, defer: bool = False) -> Tensor | None:
        """*Collective*: once a block, and each rank r that its layers have.

        Args:
            device: where it is computed.
            defer: whether a GPU is not waited for. Rows that have cancelled have a wrong gain until a call without.

        Returns:
            With `defer`, and if there is a DoRA layer, whether such a row is among the rank's own, () bool on `device`.
        """
        cancelled: list[Tensor] | None = [] if defer else None
        for batch in self._batches:
            batch.refresh(device, cancelled)
        if not cancelled:
            return None
        return cancelled[0] if len(cancelled) == 1 else torch.stack(cancelled).any()


class Together(NamedTuple):
    """Buffers of several layers' `Factors`: of each kind one tensor, or for A one a group, that holds all layers'."""

    a: list[Tensor]
    """Holds A of the layers of a group, (layers, rank, in), in the compute dtype."""
    scaled_b: Tensor
    """(out of all, rank), in the compute dtype."""
    row_scale: Tensor
    """(out of all, 1) float32."""
    inverse_m: Tensor
    """(out of all,) float32; of LoRA unused."""
    of_layers: list[Factors]


class _Batch:
    """Layers that are refreshed together: all of DoRA or all of LoRA, and of one rank r."""

    def __init__(self, blocks: list[list[AdaptedLinear]], dtype: torch.dtype) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.groups = alike(list(chain.from_iterable(blocks)))
        self.layers = list(chain.from_iterable(self.groups))
        assert all(layer.base_norm_squared is not None for layer in self.layers), "not measured"
        self.is_whole = all(layer.is_whole and not layer.are_factors_computed for layer in self.layers)
        self.made: Together | None = None

    def refresh(self, device: torch.device, cancelled: list[Tensor] | None) -> None:
        """See `Refresher`."""
        has_gain = self.layers[0].gain is not None
        if not self.is_whole:
            if has_gain:
                self._write_gains(*self._gather(device), device, cancelled)
            return
        for layer in self.layers:
            layer._rounded_from = None  # until all is written
        trained = [layer.trained_factors() for layer in self.layers]
        made = self._round(trained)
        if has_gain:
            gains, magnitudes = self._write_gains(made.a, made.scaled_b, device, cancelled)
            made.row_scale.copy_(gains[:, None])
            made.inverse_m.copy_(inverse(magnitudes))
        else:
            made.row_scale.fill_(1.0)
        for group, scale in zip(self.groups, made.row_scale.split(_rows(self.groups)), strict=True):
            scale.mul_(group[0].scaling)
        made.scaled_b.mul_(made.row_scale)
        for layer, (a, b) in zip(self.layers, trained, strict=True):
            layer.mark_rounded(a, b)

    def _round(self, trained: Sequence[tuple[Tensor, Tensor]]) -> Together:
        """Writes A and B to the layers' buffers, which are made anew where others have come in their place."""
        made = self.made
        if made is None or any(
            layer.scaled_b is not own.scaled_b for layer, own in zip(self.layers, made.of_layers, strict=True)
        ):
            with torch.inference_mode(False):  # tensors made in it cannot be saved for a backward
                made = self.made = allocate_factors(self.groups, self.dtype)
        torch._foreach_copy_([own.lora_a_rounded for own in made.of_layers], [a for a, _ in trained])
        torch._foreach_copy_([own.scaled_b for own in made.of_layers], [b for _, b in trained])
        return made

    def _gather(self, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """A of each group, and the own rows of all B, as `row_norms` takes them. *Collective*, once a block."""
        trained: dict[AdaptedLinear, Tensor] = {}
        for layers in self.blocks:
            parameters = [layer.trained_factors()[0] for layer in layers]
            trained.update(zip(layers, gather_rows(parameters, self.dtype, device), strict=True))
        factors = {layer: layer.own_factors(trained[layer]) for layer in self.layers}
        every_a = [torch.stack([factors[layer][0] for layer in group]) for group in self.groups]
        return every_a, torch.cat([factors[layer][1] for layer in self.layers]).to(self.dtype)

    def _write_gains(
        self, every_a: Sequence[Tensor], every_b: Tensor, device: torch.device, cancelled: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Writes the gains of the own rows; returns them and their magnitudes, (own rows of all,) on `device`."""
        norms = row_norms(self.groups, every_a, every_b, cancelled)
        magnitudes = torch.cat([own_rows(layer.magnitude)[0] for layer in self.layers]).to(device)  # type: ignore[arg-type]
        gains = magnitudes / norms
        own = [own_rows(layer.gain)[0].view(torch.float32) for layer in self.layers]  # type: ignore[arg-type]
        torch._foreach_copy_(own, gains[:, None].split([len(rows) for rows in own]))
        return gains, magnitudes


def alike(layers: Sequence[AdaptedLinear]) -> list[list[AdaptedLinear]]:
    """The layers by what has to be the same of those that are computed together: their shapes, and the scaling."""

    def likeness(layer: AdaptedLinear) -> tuple[float, ...]:
        return layer.in_features, layer.out_features, layer.scaling

    return [list(group) for _, group in groupby(sorted(layers, key=likeness), likeness)]


def _rows(groups: Sequence[Sequence[AdaptedLinear]]) -> list[int]:
    return [len(group) * group[0].out_features for group in groups]


def allocate_factors(groups: Sequence[Sequence[AdaptedLinear]], dtype: torch.dtype) -> Together:
    """Gives layers, as `alike` groups them, the buffers of `Factors`, empty.

    Args:
        groups: of one rank r, and all of DoRA or all of LoRA; they hold A and B whole.
    """
    layers = list(chain.from_iterable(groups))
    rank, device, sizes = layers[0].rank, layers[0].trained_factors()[1].device, [one.out_features for one in layers]
    every_a = [torch.empty(len(group), rank, group[0].in_features, dtype=dtype, device=device) for group in groups]
    scaled_b = torch.empty(sum(sizes), rank, dtype=dtype, device=device)
    row_scale = torch.empty(sum(sizes), 1, device=device)
    inverse_m = torch.empty(sum(sizes), device=device)
    of_layers = []
    rows = zip(*(tensor.split(sizes) for tensor in (scaled_b, row_scale, inverse_m)), strict=True)
    for layer, a, (b, scale, of_m) in zip(layers, chain.from_iterable(every_a), rows, strict=True):
        of_layers.append(Factors(a, b, scale, None if layer.gain is None else of_m))
        layer.give_factors(of_layers[-1])
    return Together(every_a, scaled_b, row_scale, inverse_m, of_layers)


@torch.no_grad()
def row_norms(
    groups: Sequence[Sequence[AdaptedLinear]],
    every_a: Sequence[Tensor],
    every_b: Tensor,
    cancelled: list[Tensor] | None = None,
) -> Tensor:
    """n of the own rows of each layer after the other, (own rows of all,) float32.

    What can be is computed for all layers at once, or for those of a group. Waits for a GPU once, unless rows have
    cancelled; with `cancelled` never.

    Args:
        groups: layers of one rank r, as `alike` groups them.
        every_a: A of the layers of each group, (layers, r, in), as the forward rounds it.
        every_b: the own rows of B of all layers, (own rows of all, r), as the forward rounds them.
        cancelled: gets whether a row has cancelled, () bool on the device; such rows are wrong then.
    """
    layers = list(chain.from_iterable(groups))
    every_a, every_b = [a.float() for a in every_a], every_b.float()
    base = torch.cat([layer.base_norm_squared for layer in layers])  # type: ignore[misc]
    sizes = [layer.base_norm_squared.numel() for layer in layers]  # type: ignore[union-attr]
    products = torch.empty_like(every_b)
    for layer, a, out in zip(layers, chain.from_iterable(every_a), products.split(sizes), strict=True):
        layer.project(a, out)
    rows = [a.shape[0] * group[0].base_norm_squared.numel() for a, group in zip(every_a, groups, strict=True)]  # type: ignore[union-attr]
    for group, a, b, out in zip(groups, every_a, every_b.split(rows), products.split(rows), strict=True):
        # 2 s W A^T + s^2 B A A^T, which times B are the norm's sums.
        shape, scaling = (len(group), -1, a.shape[1]), group[0].scaling
        out.view(shape).baddbmm_(b.view(shape), a @ a.mT, beta=2 * scaling, alpha=scaling**2)
    squared = products.mul_(every_b).sum(1).add_(base)
    lost = squared < CANCELLATION * base
    if cancelled is not None:
        cancelled.append(lost.any())
    elif lost.any():
        parts = zip(
            layers, chain.from_iterable(every_a), *(t.split(sizes) for t in (every_b, squared, lost)), strict=True
        )
        for layer, a, b, own, of_own in parts:
            if of_own.any():
                layer.replace_lost(a, b, own, of_own)
    return squared.clamp_(min=0).sqrt_().clamp_(min=NORM_FLOOR)
