"""The files for Kubernetes and SkyPilot are what those read, and all launch files give the same to `qdora train`."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import ROOT

LAUNCH = ROOT / "launch"
JOB, TRAINJOB, SKY = (
    LAUNCH / "kubernetes" / "job.yaml",
    LAUNCH / "kubernetes" / "trainjob.yaml",
    LAUNCH / "skypilot.yaml",
)
SCRIPTS = [LAUNCH / name for name in ("train.sh", "multinode.sh", "environment.sh", "slurm.sbatch")]


def documents(file: Path) -> list[dict[str, Any]]:
    """Its YAML documents."""
    return list(yaml.safe_load_all(file.read_text()))


def validate(file: Path) -> "subprocess.CompletedProcess[str]":
    """`kubernetes-validate --strict`: every field is one of Kubernetes', with a value of its type."""
    pytest.importorskip("kubernetes_validate")
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_job_is_valid_by_the_schemas_of_kubernetes(tmp_path: Path) -> None:
    done = validate(JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(JOB.read_text().replace("completionMode", "completionsMode"))
    assert validate(wrong).returncode, "the check sees nothing"


def lost(model: Any, given: dict[str, Any]) -> list[str]:
    """The fields of `given` that the class of the API does not know; it passes them over in silence.

    Raises:
        pydantic.ValidationError: a value of the wrong type, or a field that must be there and is not.
    """

    def paths(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, dict):
            return {path for key, item in value.items() for path in paths(item, f"{prefix}.{key}")} | {prefix}
        if isinstance(value, list):
            return {path for index, item in enumerate(value) for path in paths(item, f"{prefix}[{index}]")} | {prefix}
        return {prefix}

    return sorted(paths(given) - paths(model.from_dict(given).to_dict()))


def test_trainjob_is_valid_by_the_api_of_kubeflow_trainer() -> None:
    """By the classes that the project generates from its OpenAPI schema."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (given,) = documents(TRAINJOB)
    assert (given["apiVersion"], given["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert lost(models.TrainerV1alpha1TrainJob, given) == []
    given["spec"]["trainer"]["numNode"] = 2
    assert lost(models.TrainerV1alpha1TrainJob, given) == [".spec.trainer.numNode"]


def test_pods_have_volume_secret_and_shared_memory() -> None:
    """In a patch of the runtime, where it is a TrainJob."""
    pod = documents(JOB)[1]["spec"]["template"]["spec"]
    (train,) = pod["containers"]
    trainer = documents(TRAINJOB)[0]["spec"]["trainer"]
    (patch,) = documents(TRAINJOB)[0]["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    patched = job["template"]["spec"]["template"]["spec"]
    for one in (pod, patched):
        volumes = {volume["name"]: volume for volume in one["volumes"]}
        assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
        mounts = {mount["mountPath"]: mount["name"] for mount in one["containers"][0]["volumeMounts"]}
        assert mounts["/dev/shm"] == "memory"
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        assert one["terminationGracePeriodSeconds"] == 300
    assert train["envFrom"] == [{"secretRef": {"name": "qdora"}}]
    keys = {one["valueFrom"]["secretKeyRef"]["key"] for one in trainer["env"] if "valueFrom" in one}
    assert keys == {"WANDB_API_KEY", "HF_TOKEN"}
    assert train["args"] == trainer["args"], "the same overrides everywhere"


def test_pods_of_the_job_are_as_many_as_it_waits_for_and_meet_at_the_first() -> None:
    service, job = documents(JOB)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    env = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
    assert env["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_skypilot_has_what_the_script_needs() -> None:
    """A check by hand: SkyPilot's schema comes with all of SkyPilot."""
    (task,) = documents(SKY)
    known = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "secrets", "setup", "run"}
    assert task.keys() <= known
    variables = set(re.findall(r"\$\{?!?([A-Z][A-Z_]+)", task["run"]))
    given = task["envs"].keys() | task["secrets"].keys()
    assert variables - given == {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"}


def test_skypilot_script_starts_a_machine_of_the_run(tmp_path: Path) -> None:
    """With the variables that SkyPilot sets, and a command in multinode.sh's place that prints what it is given."""
    (task,) = documents(SKY)
    (tmp_path / "launch").mkdir()
    fake = tmp_path / "launch" / "multinode.sh"
    fake.write_text('#!/usr/bin/env bash\necho "$HEAD|$NODE|$NNODES|$RUN_ID|${HF_TOKEN-none}|$WANDB_API_KEY|$*"\n')
    fake.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        **task["envs"],
        **task["secrets"],
        "OVERRIDES": "model=any data.train=a.jsonl",
        "WANDB_API_KEY": "key",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
    }
    command = ["bash", "-c", task["run"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    overrides = "output_dir=/shared/outputs/first train.checkpoint_every=50 model=any data.train=a.jsonl"
    assert done.stdout == f"10.0.0.1|1|2|first|none|key|{overrides}\n", done.stderr


@pytest.mark.parametrize("file", [*SCRIPTS, JOB, TRAINJOB, SKY], ids=lambda file: file.name)
def test_launch_file_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60


def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    """SkyPilot's too, which stands inside YAML."""
    (tmp_path / "run.sh").write_text(f"#!/usr/bin/env bash\n{documents(SKY)[0]['run']}")
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    files = [str(file.relative_to(ROOT)) for file in SCRIPTS]
    command = [shellcheck, "--external-sources", *files, str(tmp_path / "run.sh")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
