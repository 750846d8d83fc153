"""How a block computes: compiled or not, and what of it is recomputed in the backward.

Recomputed is all of it (`full`), or all but matrix products and attention (`selective`). What `full` keeps, the hidden
states between the blocks, may wait for the backward in host memory.
"""

import functools
import os
import shutil
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qdora.config import ActivationCheckpointing
from qdora.errors import ConfigError
from qdora.nf4 import opaque_layers

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
    torch.ops.aten._flash_attention_forward.default,
}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(
    blocks: Sequence[nn.Module],
    kind: ActivationCheckpointing,
    offload: bool = False,
    keep_random_state: bool = True,
) -> None:
    """Makes each block's forward keep less for its backward; mutates the blocks.

    The forward itself is replaced, inside FSDP2's hooks and under the same module names.

    Args:
        offload: with `full`, whether the hidden states go to host memory.
        keep_random_state: whether the recomputation draws the numbers of the forward again; a CUDA graph cannot ask for
            the state.
    """
    assert kind is ActivationCheckpointing.full or not offload, "the config allows it with full only"
    assert kind is not ActivationCheckpointing.auto, "chosen by qdora.training.memory before"
    if kind is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": keep_random_state}
    if kind is ActivationCheckpointing.selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    host = HostMemory() if offload else None
    for block in blocks:
        computed = block.forward
        if kind is ActivationCheckpointing.selective:  # which keeps what operators return
            computed = functools.partial(_with_opaque_layers, computed)
        forward = functools.partial(_forward, computed, options)
        block.forward = forward if host is None else Offloaded(block.forward, host)  # type: ignore[method-assign]


class _Kept:
    """A hidden state between its forward and its backward."""

    def __init__(self, hidden: Tensor, before: "_Kept | None") -> None:
        self.before = before
        """That of the block before."""
        self.needs_grad, self.device = hidden.requires_grad, hidden.device
        self.on_device: Tensor | None = hidden.detach()
        self.on_host = torch.empty_like(hidden, device="cpu", pin_memory=hidden.is_cuda)
        self.moved: torch.cuda.Event | None = None
        """Recorded when the last copy, in either direction, was."""


class HostMemory:
    """Where the hidden states of a forward wait; the last one stays on the device, its backward comes first.

    On CUDA copies go on a stream of their own: out while the block computes, back while the block after it does. The
    stream of the computation waits for a copy before the memory it came from is given back: however far the CPU runs
    ahead, the device has the hidden states of two blocks at most.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[_Kept] | None = None
        """Of the current forward; not kept alive where no backward follows."""
        self._stream: torch.cuda.Stream | None = None

    def keep(self, hidden: Tensor) -> _Kept:
        """Starts to move `hidden` away; the one before it leaves the device now."""
        before = None if self._last is None else self._last()
        if before is not None:
            self._wait(before)
            before.on_device = None
        kept = _Kept(hidden, before)
        self._copy(kept, hidden.detach(), kept.on_host)
        self._last = weakref.ref(kept)
        return kept

    def load(self, kept: _Kept) -> Tensor:
        """The hidden state on its device, as it was; the one before it begins to come back."""
        self._fetch(kept)
        hidden = kept.on_device
        assert hidden is not None
        self._wait(kept)
        kept.on_device = None
        if kept.before is not None:
            self._fetch(kept.before)
        self._last = None if kept.before is None else weakref.ref(kept.before)
        return hidden.requires_grad_(kept.needs_grad)

    def _fetch(self, kept: _Kept) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
            self._copy(kept, kept.on_host, kept.on_device)

    def _copy(self, kept: _Kept, source: Tensor, target: Tensor) -> None:
        if kept.device.type != "cuda":
            target.copy_(source)
            return
        self._stream = self._stream or torch.cuda.Stream(kept.device)
        self._stream.wait_stream(torch.cuda.current_stream(kept.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            kept.moved = self._stream.record_event()

    def _wait(self, kept: _Kept) -> None:
        if kept.moved is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.moved)


class Offloaded:
    """A block's forward that is recomputed in the backward, its hidden state waiting in host memory."""

    def __init__(self, forward: Any, host: HostMemory) -> None:
        self.forward, self.host = forward, host

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(hidden_states, *args, **kwargs)
        kept, given = self.host.keep(hidden_states), [hidden_states]

        def forward(_: Tensor, *others: Any, **named: Any) -> Any:
            # Not an argument, which would be kept: the recomputation wants the values, no gradient goes through it.
            return self.forward(given.pop() if given else self.host.load(kept), *others, **named)

        # By the devices of its arguments checkpoint knows whose random state dropout needs again.
        return checkpoint(forward, hidden_states.new_empty(0), *args, use_reentrant=False, **kwargs)


def _with_opaque_layers(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    with opaque_layers():
        return forward(*args, **kwargs)


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
    from torch._dynamo import config as dynamo  # takes a second, and is not needed elsewhere

    # Blocks share their code, and each kind of block, call and shape is a graph of it: 8 are too few.
    dynamo.recompile_limit = RECOMPILE_LIMIT
    for block in blocks:
        holder: Any = block.forward if isinstance(block.forward, Offloaded) else block
        holder.forward = torch.compile(holder.forward)
