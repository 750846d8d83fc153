"""Seconds that qdora waits for other processes and machines, and the environment variables that change them.

`QDORA_LOCK_PATIENCE_S=60 launch/train.sh ...` waits a minute for a folder that another run has. What options bound is
not here: `parallel.timeout_s`, `tracker.timeout_s`.
"""

import math
import os

from qdora.errors import ConfigError

USUAL_S = {
    "QDORA_LOCK_PATIENCE_S": 20.0,  # a run's folder: ranks whose launcher was killed finish their step and save first
    "QDORA_SEEN_AFTER_S": 70.0,  # another machine's file: NFS may remember for a minute that there was none
    "QDORA_GRACE_S": 10.0,  # rank 0 under plain torchrun, which may find the others' mistake later and is to tell it
    "QDORA_RENDEZVOUS_S": 600.0,  # the machine that hosts the rendezvous and may start later; torchrun waits for 60 s
    "QDORA_TWICE_S": 1.0,  # a second signal: Slurm tells a rank itself and its launcher, which hands it on
    "QDORA_WANDB_PROBE_S": 3.0,  # an answer of W&B's server, before a run is recorded online
    "QDORA_WANDB_GRACE_S": 5.0,  # W&B's own process beyond `tracker.timeout_s`, should that process be what hangs
}
"""Each variable, and its value where the environment has none."""


def wait_s(name: str) -> float:
    """Returns the seconds of a wait in `USUAL_S`: its usual ones where the environment has none, or no number."""
    given = _number(os.environ.get(name, ""))
    return USUAL_S[name] if given is None else given


def check_waits() -> None:
    """Raises `ConfigError` for a variable of `USUAL_S` that is no number of seconds."""
    for name, usual in USUAL_S.items():
        given = os.environ.get(name)
        if given is not None and _number(given) is None:
            raise ConfigError(
                f"the environment variable {name} is {given!r}; it must be a number of seconds, 0 or more (without it: "
                f"{usual:g})"
            )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
