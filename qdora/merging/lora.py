"""`format=lora`: the change that training made, W' - W, as a LoRA adapter of a chosen rank.

A LoRA adapter stays as it is where the rank allows. What DoRA does to a row's length is no low-rank change: there the
best approximation in the Frobenius norm is taken, the largest singular values (Eckart and Young, 1936), by a random
method with power iterations (Halko et al., arXiv:0909.4061). Each factor gets the root of the singular values; s is 1.
"""

from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora.adapter import peft_format
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError, ConfigError
from qdora.merging.weights import Weights
from qdora.model.writer import CHUNK_NUMEL, JOURNAL, clear, cores_shared, num_workers

OVERSAMPLED, POWER_ITERATIONS = 16, 6
"""Directions beyond the rank, and rounds, of the randomised method: within 1 % of the best error on what was seen."""


def lora_rank(adapter: AdapterConfig, given: int | None) -> int:
    """The rank to write: what was asked for, or the adapter's own (LoRA, VeRA), or twice that (DoRA, DVoRA)."""
    if given is not None:
        return given
    largest = max(adapter.shape_of(name)[0] for name in adapter.target_modules)
    return 2 * largest if adapter.method.has_magnitude else largest


def is_exact(adapter: AdapterConfig, rank: int) -> bool:
    """Whether nothing is lost at `rank`."""
    return not adapter.method.has_magnitude and rank >= lora_rank(adapter, None)


def write_lora(weights: Weights, folder: Path, base: str, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Writes the adapter to `folder` in the format of PEFT; held in memory until it is whole, begun anew if killed.

    Returns:
        `relative_error`, the Frobenius norm of what is lost (before rounding) over that of the change, of all layers;
        of the worst layer, too.
    """
    whole = max(min(layer.in_features, layer.out_features) for layer in weights.layers.values())
    if rank > whole:
        raise ConfigError(f"lora_rank is {rank}, but {whole} is the whole of the largest layer")
    tensors: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}

    def one(name: str) -> None:
        b, a, lost, norm = _factors(weights, name, rank)
        errors[name] = lost, norm
        for kind, matrix in (("lora_a", a), ("lora_b", b)):
            tensors[peft_format.tensor_name(name, kind)] = matrix.to("cpu", dtype).contiguous()

    workers = num_workers(weights.world.device)
    with cores_shared(workers), ThreadPoolExecutor(workers) as pool:
        try:
            for task in [pool.submit(one, name) for name in weights.layers]:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    clear(folder)
    folder.mkdir(parents=True)
    (folder / JOURNAL).touch()
    peft_format.write_weights(folder / peft_format.WEIGHTS, dict(sorted(tensors.items())))
    config = AdapterConfig(method=AdapterMethod.lora, rank=rank, alpha=float(rank))
    peft_format.write_config(folder, config, base, peft_format.target_modules(weights.empty.model))
    lost, norm = (sqrt(sum(errors[name][place] for name in weights.layers)) for place in (0, 1))
    worst = max(weights.layers, key=lambda name: errors[name][0] / max(errors[name][1], 1e-30))
    return {
        "relative_error": lost / max(norm, 1e-15),
        "worst_layer": worst,
        "worst_relative_error": sqrt(errors[worst][0] / max(errors[worst][1], 1e-30)),
    }


def _factors(weights: Weights, name: str, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """B (out, rank), A (rank, in) of a layer's change, and the squared norms of what is lost and of the change."""
    layer, device = weights.layers[name], weights.world.device
    stored = weights.adapter_of(name)
    a, b = stored["lora_a"], stored["lora_b"] * layer.scaling
    if layer.magnitude is None and a.shape[0] <= rank:
        padding = rank - a.shape[0]
        a, b = torch.nn.functional.pad(a, (0, 0, 0, padding)), torch.nn.functional.pad(b, (0, padding))
        return b, a, 0.0, float((b.T @ b * (a @ a.T)).sum())
    shape = (layer.out_features, layer.in_features)
    change = torch.empty(shape, device=device)
    base = weights.base_rows(name, layer.base, "weight", shape, torch.float32)
    merged = weights.merged_rows(name, base)
    step = max(1, CHUNK_NUMEL // layer.in_features)
    for first in range(0, layer.out_features, step):
        last = min(first + step, layer.out_features)
        before = base(first, last).clone()
        change[first:last] = merged(first, last) - before
    if not change.isfinite().all():
        raise AdapterError(f"{name} has values that are not finite: the adapter is damaged")
    kept = min(rank, *shape)
    u, s, vh = _largest_singular(change, min(kept + OVERSAMPLED, *shape))
    root = s[:kept].sqrt()
    b, a = torch.zeros(shape[0], rank, device=device), torch.zeros(rank, shape[1], device=device)
    b[:, :kept], a[:kept] = u[:, :kept] * root, vh[:kept] * root[:, None]
    norm = float(change.square().sum())
    return b, a, float(change.addmm_(b, a, alpha=-1).square().sum()), norm


def _largest_singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of about the `count` largest singular values; deterministic, whatever thread it runs in."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(matrix.shape[1], count, generator=generator).to(matrix.device)
    span = torch.linalg.qr(matrix @ sample).Q
    for _ in range(POWER_ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span).Q).Q
    u, s, vh = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return span @ u, s, vh
