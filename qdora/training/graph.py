"""A micro-batch's forward and backward as one CUDA graph: the host launches it whole, where it launched each kernel.

A graph has fixed shapes and fixed addresses. A micro-batch is filled up to `micro_batch_size` rows of `max_length`
tokens; what is left over are samples of their own without a label. The numbers of samples and of label tokens are
rounded up, with samples of no token and labels that count for nothing: each pair of such numbers is a graph of its own,
recorded where it is first met. All share their memory. Inputs, the step's number of label tokens and the gradients stay
where they are; weights, gains and rounded factors are written in place by the optimiser and by DoRA's refresh anyhow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qdora.errors import ConfigError, first_line
from qdora.model import varlen
from qdora.model.loss import IGNORED, Rows, TokenBatch, backward
from qdora.nf4 import scratch
from qdora.parallel import World

FEWEST_SAMPLES = 16
"""A graph has room for so many, or a power of two times as many."""
LABEL_SHARES = 8
"""A graph has room for label tokens in eighths of all tokens."""
WARM_UPS = 2
"""Times that it is computed before it is recorded: kernels are chosen and compiled, buffers come to be."""


class _Recorded(NamedTuple):
    rows: Rows
    num_label_tokens: Tensor
    loss: Tensor
    replay: Callable[[], object]


def check_device(world: World) -> None:
    """Raises `ConfigError` where `train.cuda_graph` cannot be had on these ranks; before anything is loaded."""
    if world.device.type != "cuda":
        raise ConfigError("train.cuda_graph=true needs a GPU, and there is none")
    if world.mesh is not None:
        raise ConfigError(
            f"train.cuda_graph=true wants the weights whole on each rank, and {world.size} share them: use parallel=ddp"
        )


def check_model(model: Any) -> None:
    """Raises `ConfigError` where the model's forward asks the GPU for something, which a graph cannot."""
    name = type(model).__name__
    if model.config._attn_implementation != varlen.NAME:
        raise ConfigError(
            f"train.cuda_graph=true needs attention by samples, and {name} has {model.config._attn_implementation}: "
            f"set model.attention={varlen.NAME} and model.dtype=bfloat16, or train.cuda_graph=false"
        )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    if moving := kinds & {"dynamic", "longrope"}:
        raise ConfigError(
            f"train.cuda_graph=true: the {moving.pop()} positions of {name} depend on what the GPU has: set it to false"
        )


def fill_up(batch: TokenBatch, num_rows: int, length: int) -> Rows:
    """The micro-batch as `num_rows` rows of `length` tokens, with room for samples and label tokens; on the host."""
    rows, columns = batch.input_ids.shape
    input_ids = torch.zeros(num_rows, length, dtype=torch.int64)
    labels = torch.full((num_rows, length), IGNORED)
    position_ids = torch.arange(length).repeat(num_rows, 1)
    input_ids[:rows, :columns], labels[:rows, :columns] = batch.input_ids, batch.labels
    position_ids[:rows, :columns] = batch.position_ids
    position_ids[:rows, columns:] = torch.arange(length - columns)
    found = Rows.of(input_ids, position_ids, labels, torch.device("cpu"))
    samples, num_labels = found.bounds.numel() - 1, found.places.numel()
    room = FEWEST_SAMPLES
    while room < samples:
        room *= 2
    share = -(-num_rows * length // LABEL_SHARES)
    more = max(share, -(-num_labels // share) * share) - num_labels
    nothing = found.places.new_zeros(more)
    return found._replace(
        places=torch.cat([found.places, nothing]),
        targets=torch.cat([found.targets, nothing]),
        bounds=torch.cat([found.bounds, found.bounds[-1:].expand(room - samples)]),
        longest=length,
        counts=torch.cat([torch.ones(num_labels), torch.zeros(more)]),
    )


class GraphedGradients:
    """Adds a micro-batch's gradients to the parameters' by replaying a graph; takes the place of `add_gradients`.

    Gradients have to be set to zero after a step, not to None; a parameter that no loss reaches has zeros, too. Without
    a GPU nothing is recorded: what would be a graph computes again.
    """

    def __init__(self, model: Any, world: World, num_rows: int, length: int) -> None:
        """Takes a model whose weights are whole on the rank, with attention by samples (`model.attention=varlen`)."""
        self.model, self.world = model, world
        self.num_rows, self.length = num_rows, length
        self._graphs: dict[tuple[int, int], _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if world.device.type == "cuda" else None
        # One for all: cuBLAS has memory of its own for each.
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self._gradients: dict[torch.nn.Parameter, Tensor] = {}
        self._held: dict[int, Tensor] = {}

    def __call__(self, batch: TokenBatch, num_label_tokens: Tensor) -> Tensor:
        """The micro-batch's loss over `num_label_tokens`, float32, (); valid until the next call."""
        given = fill_up(batch, self.num_rows, self.length)
        for parameter in self.model.parameters() if not self._gradients else ():
            if parameter.requires_grad:
                self._gradients[parameter] = parameter.grad = torch.zeros_like(parameter)
        assert all(parameter.grad is gradient for parameter, gradient in self._gradients.items()), (
            "gradients have moved"
        )
        key = given.bounds.numel(), given.places.numel()
        recorded = self._graphs.get(key) or self._graphs.setdefault(key, self._record(given))
        for there, value in zip(recorded.rows, given, strict=True):
            if isinstance(there, Tensor) and isinstance(value, Tensor):
                there.copy_(value.pin_memory() if there.is_cuda else value, non_blocking=True)
        recorded.num_label_tokens.copy_(num_label_tokens)
        recorded.replay()
        return recorded.loss

    def _record(self, given: Rows) -> _Recorded:
        device = self.world.device
        tensors = {name: value for name, value in given._asdict().items() if isinstance(value, Tensor)}
        there: dict[str, Any] = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        rows = given._replace(**there)
        number, result = torch.ones((), device=device), torch.zeros((), device=device)

        def compute() -> None:
            result.copy_(backward(self.model, rows, number, self.world))

        if self._stream is None:
            return _Recorded(rows, number, result, compute)
        before = [gradient.clone() for gradient in self._gradients.values()]
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                compute()
        current.wait_stream(self._stream)
        torch._foreach_copy_([*self._gradients.values()], before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                compute()
        except RuntimeError as error:
            first = error
            while isinstance(first.__context__, RuntimeError):  # of what happened inside, the end of it tells nothing
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise ConfigError(  # no TrainingError, after which the newest checkpoint is set aside
                f"this model's micro-batch cannot be a CUDA graph ({first_line(first)}): set train.cuda_graph=false"
            ) from None
        # Into these it dequantises, even if others take their place.
        self._held |= {buffer.data_ptr(): buffer for buffer in scratch.buffers()}
        return _Recorded(rows, number, result, graph.replay)
