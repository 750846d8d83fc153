"""Checks of one machine, or of one GPU: versions, kernels, memory, disk, W&B, the hub."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants, get_token, is_offline_mode
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qdora.config import TrackerConfig, TrackerKind, TrackerMode
from qdora.doctor.finding import Finding, Verdict
from qdora.nf4 import BLOCK_SIZE, quantize, weight_from, working_kernel
from qdora.tracking import answers, offline_reason

DISK_BYTES = {Verdict.failed: 2**28, Verdict.warning: 5 * 2**30}
"""Less free than that: not even an adapter and its checkpoints; no merged model of 1 to 3 billion parameters."""
SHARED_MEMORY_BYTES = 2**30
FREE_SHARE = 0.9
"""Of a GPU's memory, below which somebody else is using it."""
GIB = 2**30
NF4_VALUES = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""QLoRA, arXiv:2305.14314, appendix E, to seven places."""


def software() -> Iterator[Finding]:
    """Python, the libraries that qdora asks for, and what torch was built for."""
    about = metadata.metadata("qdora")
    wanted, python = about["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(python):
        yield Finding("Python", Verdict.ok, python)
    else:
        yield Finding("Python", Verdict.failed, f"{python}, but qdora needs {wanted}", "PYTHON=... launch/setup.sh")
    requirements = [Requirement(line) for line in metadata.requires("qdora") or []]
    wrong = [
        f"{requirement.name} {_version(requirement.name) or 'is missing'} (needs {requirement.specifier})"
        for requirement in requirements
        if requirement.marker is None and not requirement.specifier.contains(_version(requirement.name) or "0")
    ]
    if wrong:
        yield Finding("libraries", Verdict.failed, ", ".join(wrong), "launch/setup.sh, or pip install -e .")
    else:
        names = ("transformers", "bitsandbytes", "accelerate", "wandb")
        yield Finding("libraries", Verdict.ok, ", ".join(f"{name} {_version(name)}" for name in names))
    cuda = torch.version.cuda
    yield Finding("torch", Verdict.ok, f"{torch.__version__}, {f'built for CUDA {cuda}' if cuda else 'without CUDA'}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu(device: torch.device) -> Iterator[Finding]:
    """This rank's GPU, its driver and NCCL."""
    if device.type == "cpu":
        driver = Path("/proc/driver/nvidia/version")
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            yield Finding("GPU", Verdict.skipped, "hidden by CUDA_VISIBLE_DEVICES: runs compute on the CPU")
        elif driver.exists():
            remedy = "install torch for CUDA, and a driver that is new enough; in a container: --gpus all"
            yield Finding("GPU", Verdict.failed, "there is a driver, but torch finds no GPU", remedy)
        else:
            yield Finding("GPU", Verdict.skipped, "none: runs compute on the CPU")
        return
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    capability = f"{properties.major}.{properties.minor}"
    found = f"{properties.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, compute {capability}"
    if free < FREE_SHARE * total:
        yield Finding("GPU", Verdict.warning, found, "another process uses it: nvidia-smi")
    else:
        yield Finding("GPU", Verdict.ok, found)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("bfloat16", Verdict.ok, "in hardware")
    else:
        yield Finding("bfloat16", Verdict.warning, "emulated on this GPU", "model.dtype=float32 may be faster")
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        line = driver.read_text(encoding="utf-8").splitlines()[0]
        yield Finding("driver", Verdict.ok, line.removeprefix("NVRM version: "))
    yield Finding("NCCL", Verdict.ok, ".".join(str(part) for part in torch.cuda.nccl.version()))


def kernels(device: torch.device, dtype: torch.dtype) -> Finding:
    """NF4 there and back on the device, against the values worked out here."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 4 * BLOCK_SIZE, generator=generator)
    try:
        packed, absmax = quantize(weight.to(device))
        found = weight_from([packed, absmax.view(torch.uint8)], dtype).float().cpu()
    except Exception as error:  # whatever a missing kernel raises
        remedy = "bitsandbytes and torch must be built for the same CUDA; python -m bitsandbytes says more"
        return Finding("NF4 kernel", Verdict.failed, f"{type(error).__name__}: {error}", remedy)
    blocks = weight.view(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4_VALUES)
    nearest = values[(blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)] * scale
    off = float((found - nearest.view_as(found)).abs().max())
    where = f"bitsandbytes {_version('bitsandbytes')} on {device.type}"
    if off > float(torch.finfo(dtype).eps) * float(scale.max()):
        return Finding(
            "NF4 kernel", Verdict.failed, f"{where} is wrong by {off:.2g}", "another version of bitsandbytes"
        )
    if device.type == "cuda":
        where += ", dequantised in one launch by Triton" if working_kernel(device) else ", dequantised in four launches"
    return Finding("NF4 kernel", Verdict.ok, where)


def disk(folder: Path) -> Finding:
    """Where runs are written: room, and leave to write."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free for {folder}"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        return Finding("disk", Verdict.failed, f"{there} cannot be written: {error}", "output_dir=... elsewhere")
    for verdict, least in DISK_BYTES.items():
        if free < least:
            return Finding("disk", verdict, found, "make room, or output_dir=... elsewhere")
    return Finding("disk", Verdict.ok, found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """What ranks of a machine pass data through."""
    if not folder.exists():
        return Finding("shared memory", Verdict.skipped, f"no {folder}")
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {folder}"
    if usage.free < SHARED_MEMORY_BYTES:
        return Finding("shared memory", Verdict.warning, found, "docker run --ipc=host, or --shm-size=8g")
    return Finding("shared memory", Verdict.ok, found)


def tracker(config: TrackerConfig) -> Finding:
    """Whether W&B would record online."""
    if config.kind is TrackerKind.none:
        return Finding("W&B", Verdict.skipped, "tracker=none")
    reason = offline_reason(config)
    if reason is None:
        return Finding("W&B", Verdict.ok, "online")
    if config.mode is TrackerMode.offline or reason == "as configured":
        return Finding("W&B", Verdict.ok, "offline, as configured")
    return Finding("W&B", Verdict.warning, f"runs are recorded offline: {reason}", "wandb login, or tracker=none")


def hub(reachable: Callable[[str], bool] = answers) -> Finding:
    """Whether models and data can be downloaded."""
    if is_offline_mode():
        return Finding("hub", Verdict.ok, "offline, as configured (HF_HUB_OFFLINE)")
    if not reachable(constants.ENDPOINT):
        remedy = "give folders as model.path and data.train, or HF_ENDPOINT=... of a mirror"
        return Finding("hub", Verdict.warning, f"{constants.ENDPOINT} does not answer", remedy)
    token = "with a token" if get_token() else "without a token: gated models need `hf auth login`"
    return Finding("hub", Verdict.ok, f"{constants.ENDPOINT}, {token}")


def processor() -> Finding:
    """Cores and threads of this process."""
    cores = len(os.sched_getaffinity(0))
    return Finding("CPU", Verdict.ok, f"{cores} cores, {torch.get_num_threads()} threads a rank")
