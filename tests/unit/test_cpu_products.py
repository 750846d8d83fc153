"""Products of bfloat16 in float32, on any CPU: the kernels are put in place in a process of its own."""

import sys

import pytest

from tests.support.processes import run

BEGIN = """
import torch
from torch.nn import functional as F

torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
from qdora import cpu_products

wide = torch.randn(40, 300), torch.randn(300, 50)
before = wide[0] @ wide[1]
cpu_products.install.cache_clear()
cpu_products.install()
assert "cpu_products.py" in torch._C._dispatch_dump("aten::mm")
generator = torch.Generator().manual_seed(0)


def values(*shape):
    return torch.randn(*shape, generator=generator).bfloat16()


def check(result, exact):
    # One rounding to 8 bits, and sums in float32.
    assert result.dtype is torch.bfloat16 and result.shape == exact.shape
    error = (result.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-4).all(), error.max()
"""
CASES = {
    "more than a tile, transposed": """
a, b = values(1100, 1050), values(1200, 1050)
check(a @ b.T, a.double() @ b.T.double())
check(a.T @ a, a.T.double() @ a.double())
check(F.linear(a.view(100, 11, 1050), b), (a.double() @ b.T.double()).view(100, 11, 1200))
""",
    "added": """
a, b, bias, rows = values(40, 300), values(300, 50), values(50), values(40, 50)
exact = a.double() @ b.double()
check(torch.addmm(bias, a, b), bias.double() + exact)
check(torch.addmm(rows, a, b, beta=0.5, alpha=2), rows.double() / 2 + 2 * exact)
check(torch.addmm(rows * float("nan"), a, b, beta=0), exact)
check(rows.clone().addmm_(a, b, alpha=-1), rows.double() - exact)
""",
    "into a given tensor": """
a, b = values(40, 300), values(300, 50)
exact = a.double() @ b.double()
for out in (values(0), values(40, 50), values(50, 40).T):
    assert torch.mm(a, b, out=out) is out
    check(out, exact)
check(torch.addmm(values(50) * 0, a, b, out=values(40, 50)), exact)
""",
    "batches": """
a, b, added = values(3, 40, 30), values(3, 30, 20), values(3, 40, 20)
exact = a.double() @ b.double()
check(a @ b, exact)
check(torch.baddbmm(added, a, b, beta=2), 2 * added.double() + exact)
check(added.clone().baddbmm_(a, b), added.double() + exact)
out = values(3, 40, 20)
check(torch.bmm(a, b, out=out), exact)
""",
    "small ones, few rows, nothing": """
for m, k, n in ((3, 200, 300), (8, 8, 8), (0, 4, 4), (40, 0, 50), (300, 200, 1)):
    a, b = values(m, k), values(k, n)
    check(a @ b, a.double() @ b.double())
""",
    "attention": """
def gradients(dtype, **options):
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
    F.scaled_dot_product_attention(q, k, v, **options).backward(grad.to(dtype))
    assert q.grad.dtype is dtype
    return q.grad, k.grad, v.grad

inputs, grad = [values(2, 3, 50, 16) for _ in range(3)], values(2, 3, 50, 16)
for options in ({"is_causal": True}, {"attn_mask": torch.rand(2, 1, 50, 50) > 0.2}):
    for ours, exact in zip(gradients(torch.bfloat16, **options), gradients(torch.float32, **options)):
        torch.testing.assert_close(ours.float(), exact, atol=0.03, rtol=0.02)
""",
    "float32": """
assert torch.equal(wide[0] @ wide[1], before)
assert torch.equal(torch.mm(*wide, out=torch.empty(40, 50)), before)
assert torch.equal(torch.addmm(torch.zeros(50), *wide), before)
assert torch.equal(torch.stack([wide[0]] * 2) @ torch.stack([wide[1]] * 2), torch.stack([before] * 2))
""",
    "gradients": """
x, weight = values(40, 64).requires_grad_(), values(96, 64).requires_grad_()
F.linear(x, weight).sum().backward()
check(x.grad, weight.double().sum(0).expand(40, 64))
check(weight.grad, x.double().sum(0).expand(96, 64))
""",
    "mistakes": """
for a, b, words in (
    (values(40, 30), values(40, 30), "shapes cannot be multiplied"),
    (values(40, 30), values(30, 40).float(), "same dtype"),
    (values(2, 40, 30), values(3, 30, 40), "size"),
):
    try:
        a @ b
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
try:
    values(50).addmm_(values(40, 30), values(30, 50))
except RuntimeError:
    pass
else:
    raise AssertionError("addmm_ of a tensor of another shape")
""",
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_exact_but_for_one_rounding(case: str) -> None:
    done = run([sys.executable, "-c", BEGIN + CASES[case]])
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_world_on_a_slow_cpu_has_them() -> None:
    """And one on another CPU leaves torch's."""
    for supported in (True, False):
        script = f"""
import torch
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: {supported}
from qdora.parallel import start_alone
start_alone("test")
assert ("cpu_products.py" in torch._C._dispatch_dump("aten::mm")) != {supported}
"""
        done = run([sys.executable, "-c", script], cold=True)
        assert done.returncode == 0, done.stderr
