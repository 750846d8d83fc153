"""Kernels of others: bitsandbytes without what it does at import and is not needed, and whether Triton's work here."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from qdora.errors import first_line

__all__ = ["bnb", "lib", "tried"]

T = TypeVar("T")
logger = logging.getLogger(__name__)


def tried(trial: Callable[[], T], device: torch.device, instead: str) -> T | None:
    """What `trial` returns; None where it raises, and a warning that says why and what is done instead."""
    try:
        return trial()
    except Exception as error:  # no Triton, no compiler, a device that it does not know, values that differ
        fault = f"{type(error).__name__}: {first_line(error)}"
        logger.warning("the Triton kernel failed on %s, %s: %s", device, instead, fault)
        return None


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """`torch.compile` returns what it is given.

    bitsandbytes 0.50 compiles four functions at import (`backends/default/ops.py`), for devices without kernels of
    their own; none is called here. That alone loads inductor, which takes longer than torch itself. Where compiling
    fails bitsandbytes keeps the plain functions, too. To be removed once it compiles at the first call.
    """
    original = torch.compile

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function or (lambda decorated: decorated)

    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for a package that is not needed
with _nothing_compiled():
    import bitsandbytes.functional as bnb
    from bitsandbytes.cextension import lib
