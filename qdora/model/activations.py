"""How a block computes: compiled or not, and what of it is recomputed in the backward.

Recomputed is all of it (`full`), or all but matrix products and attention (`selective`).
"""

import functools
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qdora.config import ActivationCheckpointing
from qdora.errors import ConfigError

RECOMPILE_LIMIT = 64
KEPT_OPERATORS = {
    torch.ops.qdora.adapted_linear.default,
    torch.ops.qdora.frozen_linear.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks: Sequence[nn.Module], kind: ActivationCheckpointing) -> None:
    """Makes each block's forward keep less for its backward; mutates the blocks.

    The forward itself is replaced, inside FSDP2's hooks and under the same module names.
    """
    assert kind is not ActivationCheckpointing.auto, "chosen by qdora.training.memory before"
    if kind is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind is ActivationCheckpointing.selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = functools.partial(_forward, block.forward, options)  # type: ignore[method-assign]


def _forward(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **options, **kwargs)


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Makes each block's forward (and backward) one compiled graph, inside FSDP2's hooks; mutates the blocks.

    Compilation happens at the first call of each kind (training, evaluation) and once more where the number of tokens
    changes, after which it is dynamic. Blocks that are alike share it.

    Raises:
        ConfigError: on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise ConfigError(
            f"train.compile=true needs a C++ compiler on a CPU, and there is no {compiler}: install it, name another "
            "in CXX, or set train.compile=false"
        )
    # Blocks share their code, and each kind of block, call and shape is a graph of it: 8 are too few.
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for block in blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
