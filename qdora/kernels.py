"""bitsandbytes without what it does at import that is not needed here, which every command would wait for."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["bnb", "lib"]


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
