"""What a figure is from, and what it may lack."""

import os
import platform
import subprocess
from typing import Any

import torch

from qdora.training.results import versions

NEEDS = {"qdora-liger": "liger_kernel", "peft-qdora-axolotl": "axolotl"}
"""Arms with a package that no other arm needs, and that none of qdora's installs bring."""


def provenance() -> dict[str, Any]:
    """Commit, machine and versions, for the head of a results file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }
