"""What importing bitsandbytes must not cost, and what is said where it has no library."""

import sys
from types import SimpleNamespace

import pytest
import torch

from qdora import nf4
from tests.support.processes import run

IMPORT = """
import sys, torch
compile = torch.compile
import qdora.nf4
assert torch.compile is compile
print(*(name for name in ("torch._inductor.compile_fx", "torch._dynamo") if name in sys.modules))
"""


def test_quantisation_is_there_without_a_compiler() -> None:
    done = run([sys.executable, "-c", IMPORT], cold=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    compiles = "import sys, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    done = run([sys.executable, "-c", compiles], cold=True)
    assert done.stdout.strip() == "True", "bitsandbytes no longer compiles at import: qdora/kernels.py can go"


def test_missing_library_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes then has a function that raises in the place of each of its library's."""

    def missing(*_: object) -> None:
        raise RuntimeError("the library of bitsandbytes was not found")

    packed, absmax = nf4.quantize(torch.randn(4, 64))
    names = ("cdequantize_blockwise_cpu_nf4_fp32", "cdequantize_blockwise_cpu_fp32")
    monkeypatch.setattr(nf4, "lib", SimpleNamespace(**dict.fromkeys(names, missing)))
    nf4._cpu_kernel.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the library of bitsandbytes was not found"):
            nf4.dequantize(packed, absmax, torch.float32)
        with pytest.raises(RuntimeError, match="the library of bitsandbytes was not found"):
            nf4.unnest(*nf4.nest(absmax, 4))
    finally:
        nf4._cpu_kernel.cache_clear()
