"""The numbers of the analysis: how far rows moved, how many directions an update has, and what goes with what.

Of a layer's weight W_0 (out, in) before training and W_t after t steps (DoRA, arXiv:2402.09353, section 3.2),

    dM = mean over rows of |m_t - m_0|,    dD = mean over rows of 1 - cos(W_t row, W_0 row),    m = || row ||

The paper writes the columns of the transposed weight; rows, one an output, are what its authors' code and `magnitude`
have. A row shorter than `NORM_FLOOR` has no direction and is left out of dD and of the relative dM.

Singular values s of the update W_t - W_0 give its effective rank, exp of the entropy of s / sum(s) (Roy and Vetterli,
2007), and its stable rank, sum(s^2) / max(s)^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qdora.adapter.dora import NORM_FLOOR

LEAST_POINTS = 3
"""Two points are always on a line."""
ROUNDING = 1e-13
"""1 - cos of a row that was rounded to float32 is below: a spread that small is none."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A line through points, y = slope * x + intercept, by least squares; None where there is none to draw."""

    correlation: float | None
    """Pearson's; None also where all y are the same."""
    slope: float | None
    intercept: float | None


def row_changes(before: Tensor, after: Tensor) -> Tensor:
    """|m_t - m_0|, |m_t / m_0 - 1| and 1 - cos of each row, (rows, 3) float64; NaN where a row has no direction.

    Args:
        before, after: the same rows of W_0 and W_t, (rows, in).
    """
    before, after = before.double(), after.double()
    m_0, m_t = before.norm(dim=1), after.norm(dim=1)
    # 1 - cos would be lost in rounding; half the squared distance of the unit rows is the same.
    apart = after / m_t[:, None] - before / m_0[:, None]
    has_direction = torch.minimum(m_0, m_t) > NORM_FLOOR
    direction = torch.where(has_direction, apart.square().sum(1) / 2, torch.nan)
    relative = torch.where(m_0 > NORM_FLOOR, (m_t / m_0 - 1).abs(), torch.nan)
    return torch.stack([(m_t - m_0).abs(), relative, direction], dim=1)


def product_singular_values(lora_b: Tensor, lora_a: Tensor) -> Tensor:
    """Those of B A that are not zero by its form, (rank,) float64, from the QR factors of both.

    Args:
        lora_b: (out, rank); `lora_a`: (rank, in).
    """
    of_b = torch.linalg.qr(lora_b.double(), mode="r").R
    of_a = torch.linalg.qr(lora_a.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(of_b @ of_a.T)
    return values


def ranks(singular_values: Tensor) -> tuple[float | None, float | None]:
    """Effective and stable rank; None for an update of zeros."""
    s = singular_values.double()
    total = s.sum()
    if not total > 0:
        return None, None
    effective = torch.special.entr(s / total).sum().exp()
    return float(effective), float((s / s.max()).square().sum())


def fit(x: list[float], y: list[float]) -> Fit:
    """The line through (x, y) and how well they go together."""
    if len(x) < LEAST_POINTS:
        return Fit(None, None, None)
    xs, ys = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    dx, dy = xs - xs.mean(), ys - ys.mean()
    if dx.abs().max() <= ROUNDING:
        return Fit(None, None, None)
    slope = (dx * dy).sum() / dx.square().sum()
    flat = dy.abs().max() <= ROUNDING
    correlation = None if flat else float(((dx * dy).sum() / (dx.norm() * dy.norm())).clamp(-1, 1))
    return Fit(correlation, float(slope), float(ys.mean() - slope * xs.mean()))
