"""launch/multinode.sh over two machines ends as the run on one, whatever happens to the machines and their link."""

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qdora.config import DataConfig
from qdora.data import BatchLoader, prepare
from qdora.run_folder import read_metrics
from tests.support.network import Machine, steps_of, two_machines
from tests.support.runs import assert_same

pytestmark = pytest.mark.nightly(
    paths=[
        *("qdora/commands/launch.py", "qdora/rank_files.py", "qdora/parallel.py"),
        *("launch/multinode.sh", "launch/environment.sh", "tests/launch/*", "tests/support/network.py"),
    ],
    packages=["iproute2"],
)
TIMEOUT_S = 10
"""After which ranks that wait for each other give up."""


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two, on both ends of a cable."""
    with two_machines() as found:
        yield found


def test_two_machines_that_know_only_an_address_train_as_one(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    """Their names resolve nowhere: torchrun left alone would have no machine host the rendezvous, and wait."""
    one, two = machines
    second = two.start(one.address, "first", overrides, tmp_path)
    second.say("waiting for 10.77.0.1:29400 to answer")  # the host need not be the first to come
    first = one.start(one.address, "first", overrides, tmp_path)
    assert "run first: finished" in first.end()
    second.end()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["first"]
    assert_same(tmp_path / "outputs" / "first", one_machine)


def test_machine_that_is_lost_comes_back(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    one, two = machines
    folder = tmp_path / "outputs" / "lost"
    first = one.start(one.address, "lost", overrides, tmp_path)
    two.start(one.address, "lost", overrides, tmp_path)
    first.reach(folder, 11)
    two.kill()
    second = two.start(one.address, "lost", overrides, tmp_path)
    told = first.end() + second.end()
    assert "going on from step" in told
    assert_same(folder, one_machine)


@pytest.mark.nightly
def test_machine_that_hosts_the_rendezvous_is_lost_and_the_same_command_goes_on(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    one, two = machines
    folder = tmp_path / "outputs" / "head"
    one.start(one.address, "head", overrides, tmp_path)
    second = two.start(one.address, "head", overrides, tmp_path)
    second.reach(folder, 11)
    one.kill()
    told = second.end(75)
    assert told.count("qdora: the other machines, which meet at 10.77.0.1, were lost; the same command") == 1, told
    assert "Traceback" not in told
    runs = [machine.start(one.address, "head", overrides, tmp_path) for machine in machines]
    assert "going on from step" in "".join(one_run.end() for one_run in runs)
    assert_same(folder, one_machine)


@pytest.mark.nightly
def test_machine_that_is_cut_off_goes_on_when_the_link_is_back(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    """For longer than ranks wait for each other; nobody starts anything again."""
    one, two = machines
    folder = tmp_path / "outputs" / "cut"
    arguments = [*overrides, f"parallel.timeout_s={TIMEOUT_S}"]
    runs = [machine.start(one.address, "cut", arguments, tmp_path) for machine in machines]
    runs[0].reach(folder, 11)
    two.unplug()
    time.sleep(TIMEOUT_S + 5)
    two.plug()
    told = "".join(one_run.end() for one_run in runs)
    assert "going on from step" in told
    assert_same(folder, one_machine)


@pytest.mark.nightly
def test_slow_link_that_is_cut_for_a_moment_still_trains(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    one, two = machines
    for machine in machines:
        machine.slow_down("50mbit")
    folder = tmp_path / "outputs" / "slow"
    runs = [machine.start(one.address, "slow", overrides, tmp_path) for machine in machines]
    runs[0].reach(folder, 3)
    two.unplug()
    time.sleep(2)
    two.plug()
    told = "".join(one_run.end() for one_run in runs)
    assert "going on from step" not in told, "no restart was needed"
    assert_same(folder, one_machine)


@pytest.mark.nightly
def test_run_goes_on_with_one_machine_and_takes_another_that_comes_later(
    machines: tuple[Machine, Machine], overrides: list[str], tmp_path: Path
) -> None:
    """The same rows in each step as without it. The other one has started, and waits for its link."""
    one, two = machines
    folder = tmp_path / "outputs" / "elastic"
    arguments = [*overrides, "train.num_accumulation_steps=4", "train.num_steps=100000", "train.checkpoint_every=0"]
    two.unplug()
    second = two.start(one.address, "elastic", arguments, tmp_path, NNODES="1:2")
    second.say("waiting for a network by which 10.77.0.1 is reached")
    first = one.start(one.address, "elastic", arguments, tmp_path, NNODES="1:2")
    first.reach(folder, 3)
    assert "ranks: 1 on cpu" in first.told
    two.plug()
    first.say("ranks: 2 on cpu")
    first.say("going on from step")
    first.reach(folder, steps_of(folder) + 10)
    two.kill()
    one.kill()
    told = tokens_of(folder)
    assert told == tokens_dealt(arguments, len(told))


def tokens_of(folder: Path) -> list[int]:
    """How many the run had seen after each step."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["num_tokens"] for record in records]


def tokens_dealt(overrides: list[str], num_steps: int) -> list[int]:
    """How many a single rank would have seen."""
    values = dict(override.split("=", 1) for override in overrides)
    tokenizer = AutoTokenizer.from_pretrained(values["model.path"])
    data = DataConfig(train=values["data.train"], max_length=int(values["data.max_length"]))
    loader = BatchLoader(
        prepare(data, values["data.train"], tokenizer),
        micro_batch_size=1,
        num_accumulation_steps=int(values["train.num_accumulation_steps"]),
        max_length=data.max_length,
        packing=True,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    steps = itertools.islice(iter(loader), num_steps)
    return list(itertools.accumulate(sum(batch.num_tokens for batch in batches) for batches in steps))


@pytest.mark.nightly
def test_machine_that_is_told_to_stop_saves_and_comes_back(
    machines: tuple[Machine, Machine], overrides: list[str], one_machine: Path, tmp_path: Path
) -> None:
    """As a pod that is evicted: the other machine waits for it."""
    one, two = machines
    folder = tmp_path / "outputs" / "evicted"
    first, second = [machine.start(one.address, "evicted", overrides, tmp_path) for machine in machines]
    first.reach(folder, 11)
    second.process.send_signal(signal.SIGTERM)
    second.end(75)
    stopped_at = steps_of(folder)
    assert stopped_at < 30
    second = two.start(one.address, "evicted", overrides, tmp_path)
    told = first.end() + second.end()
    assert f"going on from step {stopped_at} of 30" in told
    assert_same(folder, one_machine)


def test_mistake_ends_every_machine_at_once(
    machines: tuple[Machine, Machine], overrides: list[str], tmp_path: Path
) -> None:
    """Without the restarts that a failure would have. They meet at a name that is nobody's own."""
    for machine in machines:
        machine.know("head", machines[0].address)
    arguments = [*overrides, "model.path=/nowhere"]
    runs = [machine.start("head:29401", "wrong", arguments, tmp_path) for machine in machines]
    for one_run in runs:
        told = one_run.end(2)
        assert told.count("qdora: model.path=/nowhere: no such folder") == 1, told
        assert "Traceback" not in told
    assert "".join(one_run.told for one_run in runs).count("loading /nowhere") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_machine_that_is_preempted_while_it_waits_may_be_queued_again(
    machines: tuple[Machine, Machine], overrides: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    waiting = machines[1].start(machines[0].address, "early", overrides, tmp_path)
    waiting.say("waiting for 10.77.0.1:29400 to answer")
    waiting.process.send_signal(number)
    assert "Traceback" not in waiting.end(75)


def test_address_that_no_other_machine_reaches_is_refused(
    machines: tuple[Machine, Machine], overrides: list[str], tmp_path: Path
) -> None:
    """Debian's /etc/hosts names a machine so to itself: the others would wait for it."""
    machines[0].know("head", "127.0.1.1")
    told = machines[0].start("head", "alone", overrides, tmp_path).end(2)
    assert "qdora: head is 127.0.1.1 on this machine, where no other can reach it: give the address" in told
    assert "Traceback" not in told


@pytest.mark.nightly
def test_folder_that_machines_do_not_share_is_refused(
    machines: tuple[Machine, Machine], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step: a checkpoint would have the parts of one machine only."""
    monkeypatch.setenv("QDORA_SEEN_AFTER_S", "5")
    (tmp_path / "outputs").mkdir()
    one, two = machines
    runs = [one.start(one.address, "apart", overrides, tmp_path)]
    runs.append(two.start(one.address, "apart", overrides, tmp_path, own=tmp_path / "outputs"))
    for one_run in runs:
        told = one_run.end(2)
        assert told.count("qdora: output_dir=outputs/apart is not the same folder on every machine") == 1, told
        assert "step 0/30" not in told
