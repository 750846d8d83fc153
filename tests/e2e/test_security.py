"""What comes from outside runs no code and reaches no other folder; secrets stay where they are."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from qdora.checkpoint_folder import read_manifest
from tests.support.marks import nightly
from tests.support.processes import qdora

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" + "0" * 26 + "badc0ffe",
    "HF_TOKEN": "hf_" + "5ec2e7" + "A" * 28,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "5ec2e7" + "B" * 28,
    "AWS_SECRET_ACCESS_KEY": "5ec2e7" + "C" * 34,
}


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_secrets_reach_no_file_and_no_message(options: list[str], tmp_path: Path, nproc: int) -> None:
    """A run that ends well, and two that fail: its folder, W&B's files, and all that was printed."""
    arguments = [*options, "tracker=wandb", "train.report=true", f"output_dir={tmp_path}/run", "train.num_steps=2"]
    wrong = [[*arguments, f"model.path={tmp_path}/none"], [*arguments, "train.num_stepz=2"]]
    for given, status in ((arguments, 0), (wrong[0], 2), (wrong[1], 2)):
        done = qdora("train", *given, nproc=nproc, WANDB_DIR=str(tmp_path), **SECRETS)
        assert done.returncode == status, done.stderr
        for name, secret in SECRETS.items():
            assert secret not in done.stdout + done.stderr, name
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    for name, secret in SECRETS.items():
        assert not files_with(secret, tmp_path), name
    assert files_with("cosine", tmp_path / "run"), "the search finds what is there"


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_checkpoint_that_would_run_code_is_refused(options: list[str], tmp_path: Path) -> None:
    """With a checksum that fits, as whoever planted it would see to."""
    run, planted = tmp_path / "run", tmp_path / "planted"
    arguments = [*options, f"output_dir={run}", "train.num_steps=2"]
    assert qdora("train", *arguments).returncode == 0
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted(planted)))
    manifest = read_manifest(checkpoint)
    manifest.checksums[".metadata"] = hashlib.sha256((checkpoint / ".metadata").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(manifest.to_json())
    done = qdora("train", *arguments, "train.num_steps=3")
    assert done.returncode == 2, done.stderr
    assert "its metadata names posix.mkdir, which is not read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not planted.exists()


def test_index_that_names_files_elsewhere_is_refused(options: list[str], tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").rename(tmp_path / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../weights.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    done = qdora("train", *options, f"model.path={model}", f"output_dir={tmp_path}/run")
    assert done.returncode == 2
    assert "names '../weights.safetensors', which is not a file of its own folder" in done.stderr


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused(options: list[str], tiny: Path, tmp_path: Path, file: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    values = json.loads((model / file).read_text())
    names = {"AutoConfig": "someone/else--mine.C", "AutoTokenizer": ["someone/else--mine.T", None]}
    (model / file).write_text(json.dumps(values | {"auto_map": names}))
    given = [f"model.path={model}", "model.trust_remote_code=true", f"output_dir={tmp_path}/run"]
    done = qdora("train", *options, *given)
    assert done.returncode == 2
    assert "takes its Python code from another repository (someone/else--mine.C), which no revision pins" in done.stderr


@pytest.mark.parametrize("revision", [None, "main", "abc1234"])
def test_code_from_the_hub_needs_a_commit(options: list[str], tmp_path: Path, revision: str | None) -> None:
    given = [f"model.revision={revision}"] if revision else []
    given += ["model.path=someone/model", "model.trust_remote_code=true", f"output_dir={tmp_path}/run"]
    done = qdora("train", *options, *given)
    assert done.returncode == 2
    assert "pin what you have read, model.revision=<commit, 40 characters>" in done.stderr
