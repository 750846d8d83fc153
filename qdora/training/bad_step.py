"""Which steps must not update the weights: not finite, or far above the steps before.

The test for spikes is that of OLMo-core's SkipStepOptimizer: standard deviations above the mean of a window.
"""

import math
import statistics
from collections import deque
from typing import Any

from qdora.config import OnBadStep

WINDOW = 128
"""Good steps that a step is compared with; half of them must be there."""
MAX_SKIPPED = 10
"""Bad steps in a row after which `skip` stops too: what broke does not pass by itself."""


class StepGuard:
    """Looks at each step's loss and gradient norm, the same on all ranks."""

    def __init__(self, on_bad_step: OnBadStep, spike_deviations: float | None) -> None:
        self._action, self._deviations = on_bad_step, spike_deviations
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.num_skipped = 0
        """In the whole run."""
        self._in_a_row = 0

    @property
    def looks_for_spikes(self) -> bool:
        """Whether a step of finite numbers can be bad."""
        return self._deviations is not None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; JSON."""
        recent = [list(pair) for pair in self._recent] if self._deviations is not None else []
        return {"recent": recent, "num_skipped": self.num_skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self._recent.extend((loss, norm) for loss, norm in state["recent"])
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]

    def check(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with the step, or None; a good one joins the window."""
        fault = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            fault = f"the loss is {loss} and the gradient norm {grad_norm}"
        elif self._deviations is not None and len(self._recent) >= WINDOW // 2:
            losses, norms = zip(*self._recent, strict=True)
            fault = _spike("loss", loss, losses, self._deviations)
            fault = fault or _spike("gradient norm", grad_norm, norms, self._deviations)
        if fault is None:
            self._recent.append((loss, grad_norm))
            self._in_a_row = 0
        return fault

    def record_skip(self) -> bool:
        """Whether the bad step is to be left out, else the run stops; counts it."""
        if self._action is OnBadStep.stop or self._in_a_row == MAX_SKIPPED:
            return False
        self.num_skipped += 1
        self._in_a_row += 1
        return True


def _spike(name: str, value: float, before: tuple[float, ...], allowed: float) -> str | None:
    mean, deviation = statistics.fmean(before), statistics.stdev(before)
    if value <= mean + allowed * deviation:
        return None
    return (
        f"the {name} is {value:.4g}, more than train.spike_deviations={allowed:g} standard deviations "
        f"({deviation:.2g}) above the {mean:.4g} of the {len(before)} steps before"
    )
