"""NF4 storage against bitsandbytes' own functional interface, bit for bit."""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qdora import nf4

SHAPES = [(7, 64), (300, 128), (1536, 576), (576, 1536)]


def _store(weight: Tensor, double_quant: bool) -> list[Tensor]:
    packed, scales = nf4.quantize(weight)
    if not double_quant:
        return [packed, scales.view(torch.uint8)]
    codes, absmax_scale, absmax_mean = nf4.nest(scales, weight.shape[0])
    return [packed, codes, absmax_scale, absmax_mean]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_values_are_those_of_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int], double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant)
    stored = _store(weight, double_quant)
    assert torch.equal(stored[0].flatten(), packed.flatten())
    assert torch.equal(nf4.weight_from(stored, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nf4_codes_are_those_of_bitsandbytes_at_every_border(dtype: torch.dtype, scale: float) -> None:
    values = bnb.get_4bit_type("nf4", device="cpu")
    borders = (values[:-1] + values[1:]) / 2
    up, down = (torch.nextafter(borders, torch.full_like(borders, end)) for end in (2.0, -2.0))
    row = torch.cat([torch.ones(1), borders, up, down, values, torch.tensor([-0.0, -1.0])])
    tail = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    weight = (torch.cat([row[None], tail]) * scale).to(dtype)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
    ours, scales = nf4.quantize(weight)
    assert torch.equal(ours, packed.view_as(ours))
    assert torch.equal(scales, absmax.view_as(scales))


def test_nf4_rows_of_zeros_stay_zero() -> None:
    weight = torch.randn(8, 128, dtype=torch.bfloat16)
    weight[3] = 0
    assert not nf4.weight_from(_store(weight, double_quant=False), torch.bfloat16)[3].any()


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_row_scale_is_applied_before_rounding(double_quant: bool) -> None:
    weight, scale = torch.randn(16, 128), torch.rand(16) + 0.5
    stored = _store(weight, double_quant)
    plain = nf4.weight_from(stored, torch.float32).clone()
    for _ in range(2):  # what is stored stays as it is
        # Float32 scales are multiplied before the code's value instead of after: two roundings in another order.
        scaled = nf4.weight_from(stored, torch.float32, scale[:, None])
        torch.testing.assert_close(scaled, scale[:, None] * plain, rtol=3e-7, atol=0)
    assert torch.equal(nf4.weight_from(stored, torch.float32), plain)


@pytest.mark.parametrize("rows", [slice(37, 61), slice(200, 500)])
def test_nf4_part_of_the_rows_unnests_to_the_same_scales(rows: slice) -> None:
    """Inside the first of the blocks of 256 scales, and from the middle of the third to that of the sixth."""
    weight = torch.randn(700, 192) * torch.rand(700, 1)  # so that the blocks differ
    _, codes, absmax_scale, absmax_mean = _store(weight, double_quant=True)
    whole = nf4.unnest(codes, absmax_scale, absmax_mean)
    assert torch.equal(nf4.unnest(codes[rows], absmax_scale, absmax_mean, first_row=rows.start), whole[rows])


def test_nf4_frozen_linear_has_the_gradient_of_the_dequantised_weight() -> None:
    stored = _store(torch.randn(96, 128), double_quant=True)
    weight = nf4.weight_from(stored, torch.float32).clone()
    x = torch.randn(5, 128, requires_grad=True)
    upstream = torch.randn(5, 96)
    nf4.frozen_linear(x, stored).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ weight)


def test_all_weights_share_one_buffer_also_once_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, shapes = nf4._Scratch(), [(2, 64), (4, 64), (3, 128), (2, 64), (4, 64)]
    cpu, made = torch.device("cpu"), torch.empty

    def nothing_else_is_there(*args: Any, **options: Any) -> Tensor:
        assert scratch.buffers() == []
        assert not any(map(len, scratch._views.values()))
        return made(*args, **options)

    monkeypatch.setattr(torch, "empty", nothing_else_is_there)
    for shape in shapes:
        found = scratch.get(shape, torch.float32, cpu)
        assert (tuple(found.shape), found.dtype) == (shape, torch.float32)
        assert found.data_ptr() == scratch.buffers()[0].data_ptr()
    assert [buffer.numel() for buffer in scratch.buffers()] == [3 * 128]
    for rows in range(1, 300):  # as an embedding asks
        scratch.get((rows, 1), torch.float32, cpu)
    assert sum(map(len, scratch._views.values())) <= nf4.MOST_VIEWS
    monkeypatch.undo()
    assert scratch.get((2, 64), torch.bfloat16, cpu).dtype == torch.bfloat16


def test_buffer_that_inference_made_serves_training() -> None:
    scratch = nf4._Scratch()
    with torch.inference_mode():
        made = scratch.get((2, 64), torch.float32, torch.device("cpu"))
    made.fill_(1.0)  # torch refuses that of what inference made
    assert not made.is_inference()
