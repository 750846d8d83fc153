"""Kernels of a GPU where there is none: their values by Triton's interpreter, and that they compile for each GPU."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from qdora import nf4
from qdora.adapter import operator
from tests.support.processes import run

pytest.importorskip("triton", reason="Triton has no package for this system")

INTERPRETED = """
import itertools, json, torch
from qdora import nf4, triton_kernels
from qdora.adapter import operator

torch.manual_seed(0)
different, compared = [], 0
cases = itertools.product([(7, 64), (300, 128), (96, 576)], [True, False], [0, 5], [True, False])
for (rows, width), double_quant, first_row, is_scaled in cases:
    packed, absmax = nf4.quantize(torch.randn(rows, width) * torch.rand(rows, 1))
    stored = nf4.nest(absmax, rows) if double_quant else [absmax.view(torch.uint8)]
    tensors = [packed[first_row:], stored[0][first_row:], *stored[1:]]
    row_scale = torch.rand(rows - first_row, 1) + 0.5 if is_scaled else None
    out = torch.full((rows - first_row, width), torch.nan)
    codes = nf4.nested_code(out.device), nf4.nf4_code(out.device)
    triton_kernels.dequantize_nf4(tensors, row_scale, first_row, out, *codes)
    if not torch.equal(out, nf4.weight_from(tensors, torch.float32, row_scale, first_row)):
        different.append([rows, width, double_quant, first_row, is_scaled])
    compared += 1
works = nf4.working_kernel(torch.device("cpu")) is triton_kernels.dequantize_nf4
for shape in [(1, 1), (64, 32), (65, 33), (300, 200)]:
    dy, y, inverse_m = torch.randn(shape), torch.randn(shape), torch.rand(shape[1])
    found = triton_kernels.magnitude_gradient(dy, y, inverse_m)
    expected = (dy.double() * y.double()).sum(0) * inverse_m
    if not torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4):
        different.append(shape)
    compared += 1
works &= operator.working_magnitude_kernel(torch.device("cpu")) is triton_kernels.magnitude_gradient
print(json.dumps({"different": different, "compared": compared, "works": works}))
"""
"""In float32: the interpreter cuts bfloat16 off instead of rounding it."""
TARGETS = [80, 86, 89, 90, 100, 120]
"""Compute capabilities: A100, 3090, 4090, H100 and H200, B200, 5090."""


def test_kernels_have_the_values_of_their_references() -> None:
    done = run([sys.executable, "-c", INTERPRETED], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"different": [], "compared": 28, "works": True}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("nested", "scaled", "out"), [(True, True, "bf16"), (True, False, "fp32"), (False, True, "bf16")]
)
def test_dequantisation_compiles_without_fused_multiply_add(
    target: int, nested: bool, scaled: bool, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused one would round once where bitsandbytes rounds twice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qdora import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats = ("absmax_scale", "absmax_mean", "nested_code", "nf4_code", "row_scale")
    signature = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32", **dict.fromkeys(floats, "*fp32")}
    signature |= {"out": f"*{out}", **dict.fromkeys(("num_bytes", "row_bytes", "first_block"), "i32")}
    constants = {"NESTED": nested, "SCALED": scaled, "BYTES": triton_kernels.BYTES}
    source = ASTSource(triton_kernels._dequantize_nf4, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, GPUTarget("cuda", target, 32), {"enable_fp_fusion": triton_kernels.ALLOW_FMA})
    assert compiled.asm["cubin"]
    assert "fma" not in compiled.asm["ptx"]
    if out == "bf16":
        assert "cvt.rn.bf16" in compiled.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_gradient_of_magnitudes_compiles(target: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qdora import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"dy": "*bf16", "y": "*bf16", "inverse_m": "*fp32", "out": "*fp32"}
    signature |= {"num_rows": "i32", "num_columns": "i32"}
    constants = {"ROWS": triton_kernels.ROWS, "COLUMNS": triton_kernels.COLUMNS}
    source = ASTSource(triton_kernels._magnitude_gradient, signature | dict.fromkeys(constants, "constexpr"), constants)
    assert triton.compile(source, GPUTarget("cuda", target, 32)).asm["cubin"]


def test_kernel_that_does_not_work_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Here: no driver of a GPU."""
    with caplog.at_level(logging.WARNING):
        assert nf4.working_kernel(torch.device("cpu")) is None
        assert operator.working_magnitude_kernel(torch.device("cpu")) is None
    assert "the Triton kernel failed on cpu, weights are dequantised in four launches: " in caplog.text
    assert "the gradients of magnitudes take three launches: " in caplog.text
