"""The files for Kubernetes and SkyPilot are what those read, and all launch files give the same to `qdora train`."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdora.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.support.processes import ROOT, run

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


def test_job_goes_on_after_evictions_and_saved_runs_and_ends_at_a_mistake() -> None:
    """The first rule that matches decides; what none matches counts as a failure."""
    rules = documents(JOB)[1]["spec"]["podFailurePolicy"]["rules"]
    by_status = {
        status: rule["action"]
        for rule in reversed(rules)
        if "onExitCodes" in rule and rule["onExitCodes"]["operator"] == "In"
        for status in rule["onExitCodes"]["values"]
    }
    assert by_status == {EXIT_USER_ERROR: "FailJob", EXIT_PREEMPTED: "Ignore"}
    containers = {one["name"] for one in documents(JOB)[1]["spec"]["template"]["spec"]["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == containers
    (evicted,) = [rule for rule in rules if "onPodConditions" in rule]
    assert (evicted["action"], evicted["onPodConditions"]) == (
        "Ignore",
        [{"type": "DisruptionTarget", "status": "True"}],
    )
    assert documents(JOB)[1]["spec"]["template"]["spec"]["restartPolicy"] == "Never", "else the policy is refused"


STAND_INS = {
    "python": 'if [[ "$1" == -c ]]; then echo 0; else echo "$@"; fi',
    "scontrol": 'if [[ "$1" == show ]]; then printf "n1\\nn2\\n"; else echo "$@" >> "$CALLS"; fi',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec env SLURM_NODEID=0 "$@"',
}
"""Commands that the scripts call: python prints its arguments; srun runs the first machine's part, here."""


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a Slurm job, in which the commands are the stand-ins."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": f"{tmp_path}/python", "CALLS": f"{tmp_path}/calls"}
    return paths | job


def printed(script: str, environment: dict[str, str]) -> str:
    """Returns what the launch script prints in that environment; it has to succeed."""
    command = ["bash", str(LAUNCH / script), "seed=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_machine_of_a_run_hosts_by_its_number_and_restarts_as_often_as_is_said(stand_ins: dict[str, str]) -> None:
    """Three times if nothing is said; without NODE, torchrun looks at the address."""
    given = {**stand_ins, "HEAD": "there", "RUN_ID": "first"}
    usual = printed("multinode.sh", given)
    assert "--max-restarts 3 " in usual
    assert "is_host" not in usual
    assert usual.endswith("-m qdora train run_id=first seed=1\n")
    assert "--max-restarts 5 " in printed("multinode.sh", {**given, "MAX_RESTARTS": "5"})
    for node, is_host in (("0", 1), ("3", 0)):
        assert f"--rdzv-conf is_host={is_host} " in printed("multinode.sh", {**given, "NODE": node})


def test_job_of_slurm_is_a_run_of_its_number_that_meets_at_its_first_machine(stand_ins: dict[str, str]) -> None:
    """In `outputs/RUN_ID`, as no `output_dir` is given; RUN_ID and HEAD may be others."""
    usual = printed("slurm.sbatch", stand_ins)
    assert "--rdzv-endpoint n1:20007 " in usual
    assert usual.endswith("-m qdora train run_id=slurm-7 seed=1\n")
    other = printed("slurm.sbatch", {**stand_ins, "RUN_ID": "slurm-3", "HEAD": "n9:1234"})
    assert "--rdzv-endpoint n9:1234 " in other
    assert "run_id=slurm-3 " in other


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, "requeue 7\n"), (signal.SIGTERM, "")])
def test_job_of_slurm_is_queued_again_after_a_warning_and_not_when_it_is_cancelled(
    number: signal.Signals, queued: str, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    """Slurm sends the warning two minutes before the end to the script alone, SIGTERM to the tasks as well."""
    script = LAUNCH / "slurm.sbatch"
    assert "#SBATCH --signal=B:USR1@120\n" in script.read_text()
    waiting = "#!/usr/bin/env bash\ntrap 'sleep 0.5; exit 75' USR1 TERM\necho ready\nsleep 60 & wait\n"  # it saves
    (tmp_path / "srun").write_text(waiting)
    (tmp_path / "calls").touch()
    with subprocess.Popen(["bash", str(script)], env=stand_ins, stdout=subprocess.PIPE, start_new_session=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"ready\n"
        if number == signal.SIGTERM:
            os.killpg(job.pid, number)
        else:
            job.send_signal(number)
        try:
            assert job.wait(30) == 75
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "calls").read_text() == queued


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


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RUN_ID": "one"}, "HEAD is not set: give the name or address of the first machine"),
        ({"HEAD": "10.0.0.1"}, "RUN_ID is not set: give the run a name, the same on each machine"),
        ({"HEAD": "10.0.0.1", "RUN_ID": "a/b"}, "RUN_ID=a/b: a name has letters, digits"),
        ({"HEAD": "10.0.0.1", "RUN_ID": "one", "NNODES": "two"}, "NNODES=two is not a number of machines"),
        ({"HEAD": "10.0.0.1", "RUN_ID": "one", "NODE": "first"}, "NODE=first is not the number of this machine"),
        ({"HEAD": "10.0.0.1", "RUN_ID": "one", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1 is not a number of restarts"),
        ({"HEAD": "10.0.0.1", "RUN_ID": "one", "NPROC": "0"}, "NPROC=0 is not a number of ranks"),
    ],
)
def test_setting_of_multinode_that_cannot_be_is_told_in_a_line(environment: dict[str, str], words: str) -> None:
    done = run([str(ROOT / "launch" / "multinode.sh")], **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"qdora: {words}"), done.stderr
    assert done.stderr.count("\n") == 1
