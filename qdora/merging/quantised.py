"""`format=nf4`: the merged layers quantised by bitsandbytes again, as transformers stores and loads them.

A weight `X.weight` (out, in) becomes, with double quantisation,

    X.weight                                  (out * in / 2, 1)   uint8      two codes a byte
    X.weight.absmax                           (out * in / 64,)    uint8      8-bit codes of the block scales
    X.weight.nested_absmax                    (scales / 256,)     float32
    X.weight.quant_map, .nested_quant_map     (16,), (256,)       float32    the code books
    X.weight.quant_state.bitsandbytes__nf4    (bytes,)            uint8      JSON: block sizes, dtype, shape, mean
"""

import json
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdora import nf4
from qdora.kernels import bnb
from qdora.model.writer import CHUNK_NUMEL, Job, Rows

STATE_BYTES = 256
"""Blanks follow the JSON, whose length is not known before the mean is."""


def quantised_jobs(jobs: list[Job], layers: set[str], dtype: torch.dtype) -> list[Job]:
    """Replaces each job of a weight in `layers` (names of tensors) by those of its quantised form.

    Args:
        jobs: of float32 weights (out, in), rows of whole blocks.
        dtype: what the loaded model is to compute in.
    """
    made: list[Job] = []
    for job in jobs:
        made += _Quantised(job, dtype).jobs() if job.name in layers else [job]
    return made


def quantization_config(dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """What transformers reads from config.json; `kept` are the modules that stay in `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }


class _Quantised:
    """The tensors of one weight, of which the small ones are known when the codes have been made."""

    def __init__(self, weight: Job, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.out, self.width = weight.shape
        self.companions: dict[str, Tensor] | None = None
        self.lock = threading.Lock()

    def jobs(self) -> list[Job]:
        numel, name = self.out * self.width, self.weight.name
        scales = numel // nf4.BLOCK_SIZE
        codes = Job(name, (self.out, self.width // 2), torch.uint8, self.codes, stored_shape=(numel // 2, 1))
        shapes = {
            "absmax": ((scales,), torch.uint8),
            "nested_absmax": ((-(-scales // nf4.NESTED_BLOCK_SIZE),), torch.float32),
            "quant_map": ((16,), torch.float32),
            "nested_quant_map": ((256,), torch.float32),
            "quant_state.bitsandbytes__nf4": ((STATE_BYTES,), torch.uint8),
        }
        return [
            codes,
            *(
                Job(f"{name}.{kind}", shape, dtype, partial(self.companion, kind))
                for kind, (shape, dtype) in shapes.items()
            ),
        ]

    def codes(self) -> Rows:
        merged = self.weight.start()
        scales = torch.empty(self.out, self.width // nf4.BLOCK_SIZE)

        def rows(first: int, last: int) -> Tensor:
            packed, scales[first:last] = nf4.quantize(merged(first, last))
            if last == self.out:
                self.companions = self.from_scales(scales)
            return packed

        return rows

    def companion(self, kind: str) -> Rows:
        with self.lock:
            if self.companions is None:  # the codes are written already, or by another worker just now
                rows = self.codes()
                step = max(1, CHUNK_NUMEL // self.width)
                for first in range(0, self.out, step):
                    rows(first, min(first + step, self.out))
        assert self.companions is not None
        whole = self.companions[kind]
        return lambda first, last: whole[first:last]

    def from_scales(self, scales: Tensor) -> dict[str, Tensor]:
        absmax, nested_absmax, mean = nf4.nest(scales, self.out)
        state = {
            "quant_type": "nf4",
            "blocksize": nf4.BLOCK_SIZE,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out, self.width],
            "nested_blocksize": nf4.NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(mean),
        }
        text = json.dumps(state).encode().ljust(STATE_BYTES)
        assert len(text) == STATE_BYTES, f"{self.weight.name}: its state takes {len(text)} bytes"
        return {
            "absmax": absmax.flatten(),
            "nested_absmax": nested_absmax,
            "quant_map": bnb.get_4bit_type("nf4", device="cpu"),
            "nested_quant_map": nf4.nested_code(torch.device("cpu")),
            "quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }
