"""Which linear layers of a model get an adapter, and putting it there."""

import re
from collections.abc import Mapping

from torch import nn

from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.vera import VeraLinear, share_projections
from qdora.config import AdapterConfig
from qdora.errors import AdapterError, nearest
from qdora.nf4 import NF4Linear

ALL_LINEAR = "all-linear"


def select(names: Mapping[str, nn.Module], targets: list[str]) -> list[str]:
    """The layers that `targets` match: `all-linear`, a name or its last parts (`q_proj`), or a regular expression.

    Args:
        names: candidate linear layers by their full name, the head excluded.

    Raises:
        AdapterError: a target matches no layer.
    """
    selected: dict[str, None] = {}
    for target in targets:
        pattern = re.compile(target)
        found = [
            name
            for name in names
            if target == ALL_LINEAR or name == target or name.endswith("." + target) or pattern.fullmatch(name)
        ]
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise AdapterError(
                f"adapter.target_modules: {target!r} matches no linear layer{nearest(target, [*leaves, ALL_LINEAR])}; "
                f"this model has {', '.join(leaves)}; or give all-linear."
            )
        selected.update(dict.fromkeys(found))
    return [name for name in names if name in selected]


def inject(model: nn.Module, names: list[str], config: AdapterConfig) -> None:
    """Replaces each named linear layer by an `AdaptedLinear` around it and freezes everything else; mutates `model`."""
    model.requires_grad_(False)
    layer_class = VeraLinear if config.method.is_vera else AdaptedLinear
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = parent.get_submodule(leaf)
        assert isinstance(base, nn.Linear | NF4Linear), f"{name} is a {type(base).__name__}"
        rank, scaling = config.shape_of(name)
        adapted = layer_class(
            base,
            in_features=base.in_features,
            out_features=base.out_features,
            rank=rank,
            scaling=scaling,
            dropout=config.dropout,
            dora=config.method.has_magnitude,
        )
        setattr(parent, leaf, adapted)
    if config.method.is_vera:
        share_projections(model, config.projection_key)
