"""Cross entropy without the (tokens x vocabulary) logits.

Only positions that have a label reach the head, some at a time. The gradient of the hidden states is computed in the
forward, from logits that are at hand (as in Liger-Kernel, arXiv:2410.10989, section 3.2), so none is kept. A head in
NF4 is dequantised some rows at a time, for the logits and once more for that gradient.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from qdora.errors import ModelError
from qdora.model import varlen
from qdora.nf4 import NF4Head, row_parts, weight_from
from qdora.parallel import World, all_sum, arm_watchdog, to_device
from qdora.sharding import reshard

CHUNK_NUMEL = {"cpu": 2**24, "cuda": 2**26}
"""Logits alive at a time: 64 MiB in float32; on a GPU more tokens, for which reading the head's weight pays."""
IGNORED = -100
"""Label of a position without a target."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits: `cap * tanh(scale * z / cap)` (Gemma 2: cap; Cohere, Granite: scale)."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        text = config.get_text_config()
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        return cls(scale, getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed: Tensor) -> Tensor | float | None:
        """d transformed / d z, given what `__call__` returned; None where it is one."""
        if self.cap is not None:
            return (transformed / self.cap).square_().mul_(-self.scale).add_(self.scale)
        return None if self.scale == 1.0 else self.scale


def _chunk_rows(weight: Tensor) -> int:
    """How many positions meet the head (vocabulary, ...) at a time."""
    return max(1, CHUNK_NUMEL[weight.device.type] // weight.shape[0])


def _logits(hidden: Tensor, weight: list[Tensor], bias: Tensor | None) -> Tensor:
    """(positions, vocabulary), in the dtype of `hidden`."""
    if len(weight) == 1:
        return nn.functional.linear(hidden, weight[0], bias)
    logits = hidden.new_empty(hidden.shape[0], weight[0].shape[0])
    for rows, part in row_parts(weight):
        own = None if bias is None else bias[rows]
        logits[:, rows] = nn.functional.linear(hidden, weight_from(part, hidden.dtype), own)
    return logits


def _hidden_gradient(d_logits: Tensor, weight: list[Tensor], out: Tensor) -> None:
    """d_logits W into `out`; of several parts, added up in float32."""
    if len(weight) == 1:
        torch.mm(d_logits, weight[0], out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for rows, part in row_parts(weight):
        total += d_logits[:, rows] @ weight_from(part, d_logits.dtype)
    out.copy_(total)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        counts: Tensor | None,
        transform: LogitTransform,
        *tensors: Tensor,
    ) -> Tensor:
        weight, parts = tensors[0], list(tensors)
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        step = _chunk_rows(weight)
        # One buffer for all chunks and everything in place: fresh memory costs a CPU more than the arithmetic on it.
        buffer = torch.empty(min(step, hidden.shape[0]), weight.shape[0], dtype=torch.float32, device=hidden.device)
        for first in range(0, hidden.shape[0], step):
            some, targets = hidden[first : first + step], labels[first : first + step, None]
            count = None if counts is None else counts[first : first + step, None]
            rounded = _logits(some, parts, bias)
            logits = transform(buffer[: some.shape[0]].copy_(rounded))
            slope = transform.slope(logits) if need_hidden or need_weight else None
            highest = logits.amax(1, keepdim=True)
            total += _counted_sum(highest - logits.gather(1, targets), count)
            exponentials = logits.sub_(highest).exp_()
            normaliser = exponentials.sum(1, keepdim=True)
            total += _counted_sum(normaliser.log(), count)
            if not (need_hidden or need_weight):
                continue
            d_logits = exponentials.div_(normaliser)
            d_logits.scatter_add_(1, targets, torch.full_like(normaliser, -1.0))
            if slope is not None:
                d_logits.mul_(slope)
            if count is not None:
                d_logits.mul_(count)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            rounded.copy_(d_logits)
            if d_hidden is not None:
                _hidden_gradient(rounded, parts, d_hidden[first : first + step])
            if d_weight is not None:
                d_weight += rounded.T @ some
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(
            d_hidden,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def, override]
        # In float32: 1 / (label tokens) rounded to bfloat16 would bias every gradient by up to 0.4 %.
        d_hidden, d_bias, d_weight = (
            None if grad is None else (grad.float() * upstream).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return d_hidden, d_bias, None, None, None, d_weight, *[None] * (ctx.num_tensors - 1)


def _counted_sum(values: Tensor, count: Tensor | None) -> Tensor:
    return (values if count is None else values * count).sum()


def label_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where among all positions, one row after the other, a label stands, and which; (label tokens,) int64 each.

    To be asked on the host: a GPU would be waited for.
    """
    labels = labels.flatten()
    places = (labels != IGNORED).nonzero().squeeze(1)
    return places, labels[places]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    places: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    counts: Tensor | None = None,
) -> Tensor:
    """Sum over label tokens of -log p(target), float32, ().

    Args:
        hidden: (..., hidden size) the head's input.
        weight: of the head, (vocabulary, hidden size), as `nf4.weight_from` takes it; may be trained if not in NF4.
        places, targets: as `label_places` makes them.
        counts: (label tokens,) float32, what each is multiplied by; None for one.
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
    return _ChunkedCrossEntropy.apply(rows, bias, targets, counts, transform, *weight)  # type: ignore[no-any-return]


def _head_tensors(head: nn.Module) -> list[Tensor]:
    return head.tensors() if isinstance(head, NF4Head) else [head.weight]  # type: ignore[list-item]


Forward = Callable[[Tensor], Tensor]
"""Of a head, to logits."""


def _head_forward(
    head: Any, forward: Forward, hidden: Tensor, reduce: Callable[[Forward, Tensor], Tensor] | None = None
) -> Tensor:
    """The logits, or what `reduce` makes of them, within one call: a sharded head is gathered for it once."""
    if reduce is not None:
        return reduce(forward, hidden)
    sharded = isinstance(head, FSDPModule) and torch.is_grad_enabled()
    assert not sharded, "a sharded head is freed before a backward of its logits: use token_loss"
    return forward(hidden)


class Rows(NamedTuple):
    """What a loss is asked of, on the device."""

    input_ids: Tensor
    """(rows, length) int64."""
    position_ids: Tensor
    """(rows, length) int64; each sample's begin at 0."""
    places: Tensor
    """(label tokens,) int64, as `label_places` makes them, as are `targets`."""
    targets: Tensor
    bounds: Tensor
    """(samples + 1,) int32, as `varlen.bounds_of` makes them, as is `longest`."""
    longest: int
    counts: Tensor | None = None
    """(label tokens,) float32, how much each label token counts; None for one."""

    @classmethod
    def of(cls, input_ids: Tensor, position_ids: Tensor, labels: Tensor, device: torch.device) -> "Rows":
        """Takes tensors (rows, length) of the host, so that no GPU is waited for."""
        bounds, longest = varlen.bounds_of(position_ids)
        places, targets = label_places(labels)
        ids, positions, places, targets, bounds = (
            to_device(tensor, device) for tensor in (input_ids, position_ids, places, targets, bounds)
        )
        return cls(ids, positions, places, targets, bounds, longest)


def _token_loss(self: Any, rows: Rows) -> Tensor:
    decoder, head = self.get_decoder(), self.get_output_embeddings()
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "position_ids": rows.position_ids}
    if self.config._attn_implementation in (varlen.NAME, "flash_attention_2"):
        # As a lone row, of which transformers separates the samples also where a model does not pass on their bounds.
        inputs = {name: tensor.view(1, -1) for name, tensor in inputs.items()}
        for side in ("q", "k"):
            inputs |= {f"cu_seq_lens_{side}": rows.bounds, f"max_length_{side}": rows.longest}
    hidden = decoder(**inputs, use_cache=False).last_hidden_state

    def loss(_: Forward, hidden: Tensor) -> Tensor:
        transform = LogitTransform.of(self.config)
        return chunked_cross_entropy(
            hidden, _head_tensors(head), head.bias, rows.places, rows.targets, transform, rows.counts
        )

    return head(hidden, reduce=loss)  # type: ignore[no-any-return]


@torch.no_grad()
def _log_likelihoods(
    self: Any, input_ids: Tensor, position_ids: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> Tensor:
    decoder, head = self.get_decoder(), self.get_output_embeddings()
    hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    transform = LogitTransform.of(self.config)

    def each_log_p(forward: Forward, hidden: Tensor) -> Tensor:
        step, found = _chunk_rows(_head_tensors(head)[0]), []
        for some, wanted in zip(hidden.split(step), targets.split(step), strict=True):
            logits = transform(forward(some).float())
            found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
        return torch.cat(found)

    return head(hidden[rows, columns], reduce=each_log_p)  # type: ignore[no-any-return]


def attach_losses(model: Any) -> None:
    """Gives the model two ways to be asked; after sharding, so that FSDP2 gathers for them too.

    - `token_loss(rows)`; the result is `chunked_cross_entropy`'s.
    - `log_likelihoods(input_ids, position_ids, rows, columns, targets)`: log p(target) after the token at each (row,
      column), (targets,) float32; these three are (targets,) int64.

    Both are *collective* if the model is sharded. No attention mask is passed: transformers separates the samples of a
    row where `position_ids` restarts, and padding comes last.
    """
    model.token_loss = _token_loss.__get__(model)
    model.log_likelihoods = _log_likelihoods.__get__(model)
    head = model.get_output_embeddings()
    head.forward = partial(_head_forward, head, head.forward)  # inside FSDP2's hooks, which gather the head for it
    if isinstance(model, FSDPModule):
        for name in ("token_loss", "log_likelihoods"):
            register_fsdp_forward_method(model, name)  # type: ignore[arg-type]


@torch.no_grad()
def check_token_loss(model: Any, device: torch.device, packing: bool) -> None:
    """Compares `token_loss` with the model's own logits on a few tokens, and packed rows with single samples.

    *Collective* if sharded.

    Raises:
        ModelError: the model does something to its logits that `LogitTransform` does not know, or (with `packing`)
            lets the samples of a row see each other.
    """
    name, training = type(model).__name__, model.training
    model.eval()
    first, positions = torch.arange(8)[None] % model.config.get_text_config().vocab_size, torch.arange(8)[None]
    second = first.flip(1)
    alone = [Rows.of(tokens, positions, tokens.roll(-1, 1), device) for tokens in (first, second)]
    ours, other = map(model.token_loss, alone)
    inputs = {"input_ids": alone[0].input_ids, "position_ids": alone[0].position_ids}
    logits = model(**inputs, use_cache=False).logits.float()
    rows = torch.cat([torch.cat([first, second], 1), torch.cat([second, first], 1)])
    labels = torch.cat([part.roll(-1, 1) for part in rows.split(8, 1)], 1)
    packed, single = model.token_loss(Rows.of(rows, positions.repeat(2, 2), labels, device)), 2 * (ours + other)
    model.train(training)
    reshard(model)
    theirs = nn.functional.cross_entropy(logits[0], alone[0].targets, reduction="sum")
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=1e-2):
        raise ModelError(
            f"{name} changes its logits in a way qdora does not know (loss {ours:.4f} against its own "
            f"{theirs:.4f}); please report this model"
        )
    if packing and not torch.allclose(packed, single, rtol=2e-2):
        raise ModelError(
            f"{name} lets samples that share a row see each other (loss {packed:.4f} packed, {single:.4f} alone): "
            "set data.packing=false"
        )


class TokenBatch(Protocol):
    """What the loss needs of a micro-batch; `qdora.data.Batch` is one."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def num_label_tokens(self) -> int: ...


def batch_loss(model: Any, batch: TokenBatch, device: torch.device) -> Tensor:
    """Sum over the micro-batch's label tokens of -log p, float32, (). *Collective* if sharded.

    The batch is the host's: a GPU is not waited for.
    """
    return model.token_loss(Rows.of(batch.input_ids, batch.position_ids, batch.labels, device))  # type: ignore[no-any-return]


def backward(model: Any, rows: Rows, num_label_tokens: Tensor, world: World) -> Tensor:
    """Adds the gradients of the loss of `rows` to the parameters'; returns that loss. *Collective* if sharded.

    Args:
        num_label_tokens: (), float32, of the whole step over all ranks, by which the loss is divided. The reduction of
            gradients divides by the ranks too, which is made up for.
    """
    loss: Tensor = model.token_loss(rows) / num_label_tokens
    (loss * world.size).backward()
    return loss.detach()


@torch.no_grad()
def mean_loss(model: Any, steps: Iterable[Iterable[TokenBatch]], world: World) -> float:
    """Mean loss a label token over all micro-batches of all ranks, without dropout. *Collective*."""
    training = model.training
    model.eval()
    total, num_label_tokens = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for batches in steps:
        for batch in batches:
            arm_watchdog(world)
            total += batch_loss(model, batch, world.device)
            num_label_tokens += batch.num_label_tokens
    model.train(training)
    reshard(model)
    loss, count = all_sum(world, float(total), num_label_tokens)
    return loss / max(1.0, count)
