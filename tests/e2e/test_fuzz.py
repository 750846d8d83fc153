"""Whatever is given, a run makes its step or ends in one message: random overrides, files that are not right."""

import csv
import gzip
import io
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qdora.commands import COMMANDS, conf_folder, run

LIMIT_S = 60
MESSAGE_LENGTH = 2000
SMALL = {
    "train.num_steps",
    "train.num_epochs",
    "train.micro_batch_size",
    "train.num_accumulation_steps",
    "adapter.rank",
    "data.max_length",
}
"""Options whose large values are valid and take memory or hours."""
LEFT_OUT = {
    "output_dir": "is where this test writes",
    "tracker.kind": "W&B takes seconds to start; test_wandb.py and test_wandb_server.py run it",
    "train.compile": "takes half a minute; test_compile.py runs it",
    "data.cache_dir": "would write there",
}
# fmt: off
WRONG = [
    "", "''", "null", "abc", "-1", "0", "1e400", "nan", "-.inf", "1e-320", "true", "[]", "[1,2]", "{}", "{a: 1}", "???",
    "!!python/object:os.system", "${seed}", "${nothing}", "${oc.env:HOME}", "'", '"', "[", "}", "a,b", "1,2", "ä€😀",
    "range(1,3)", "\\\\", "a b", "\t", "0x10", "1_0", "1e3", "2.5", "999999999999999999999", "\x00", "'quoted'",
    "~", "*",
]
ODD = [
    "", "=", "==", "a", "=1", "a=b=c", "~adapter", "~train.num_steps", "+x=1", "++x.y=1", "+adapter.rank=3", "++seed=2",
    "adapter=[dora]", "adapter@b=dora", "optim=adamw", "optim=sgd", "quant/x=nf4", "train", "--multirun", "-m", "--no",
    "adapter=null", "model=null", "train=null", "adapter={rank: 2}", "train={}", "adapter.rank.x=1", ".rank=1",
    "seed.=1", "+experiment=nothing", "+experiment=[]", "experiment=smollm2_identity", "--cfg", "--cfg job", "-c",
    "hydra.job=1", "merge=1", "output=x", "run=x", "protocol=loss", "~seed", "~output_dir", "+output_dir=x",
    "\n", "a\nb=1", "seed=1",
]
# fmt: on


def options(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name, with its type."""
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        name = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from options(hints[item.name], f"{name}.")
        elif name not in LEFT_OUT:
            yield name, hints[item.name]


def right(name: str, hint: Any) -> list[str]:
    """Values of the option's type, many of them allowed."""
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    values: list[str] = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            values += [word.name for word in kind]
        elif kind is bool:
            values += ["true", "false", "1", "no"]
        elif kind is int:
            values += ["1", "2", "3", "7"] + ([] if name in SMALL else ["1000", "2147483648"])
        elif kind is float:
            values += ["0.5", "1", "0", "1e-3", "2e0"] + ([] if name in SMALL else ["1e9"])
        else:
            values += ["x", "/nowhere", "some/where", "q_proj", "[q_proj,v_proj]", ".*", "main"]
    return values


def overrides(command: str) -> st.SearchStrategy[list[str]]:
    """One to five arguments: options with right and wrong values, choices of groups, and what is no override at all."""
    found = dict(options(COMMANDS[command].config_class))
    groups = [
        f"{folder.name}={file.stem}"
        for folder in conf_folder().iterdir()
        if folder.is_dir() and folder.name in {name.partition(".")[0] for name in found} - {"tracker", "model"}
        for file in folder.glob("*.yaml")
    ]
    names = sorted(found)
    valid = st.sampled_from(names).flatmap(
        lambda name: st.sampled_from(right(name, found[name])).map(lambda value: f"{name}={value}")
    )
    wrong = st.builds(
        lambda name, value: f"{name}={value}", st.sampled_from(names), st.sampled_from(WRONG) | st.text(max_size=6)
    )
    mangled = st.builds(
        lambda name, mark: f"{mark}{name}=1", st.sampled_from(names), st.sampled_from(["+", "++", "~", "."])
    )
    odd = st.sampled_from(ODD)
    return st.lists(st.one_of(valid, valid, wrong, st.sampled_from(groups), mangled, odd), min_size=1, max_size=5)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Fails what takes longer."""

    def late(*_: Any) -> None:
        raise AssertionError(f"no end after {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # what pytest-timeout has set
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, left_s)


def check(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str], names: Sequence[str] = ()) -> int:
    """Runs the command in this process; its status, which goes with what it printed. A message has all of `names`."""
    capsys.readouterr()
    before = (torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), Path.cwd())
    with limited(LIMIT_S):
        status = run(arguments)
    assert (torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), Path.cwd()) == before
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    messages = [line for line in err.splitlines() if line.startswith("qdora: ")]
    if status == 0:
        assert not messages
        printed = not {"--cfg", "--cfg job"}.isdisjoint(arguments)
        steps = [json.loads(file.read_text())["steps"] for file in output.rglob("summary.json")]  # a sweep's lie deeper
        assert printed or (steps and min(steps) >= 1)
    else:
        assert status == 2, (status, err)
        assert len(messages) == 1, err
        assert 10 < len(err) < MESSAGE_LENGTH, err
        assert all(name in err for name in names), err
    return status


def fuzzing(max_examples: int) -> Any:
    """The same examples each time; no time is lost on making a failure smaller."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def arguments_of(tiny: Path, data: Path, output: Path) -> list[str]:
    """A run of one step."""
    given = [f"model.path={tiny}", f"data.train='{data}'", "train.num_steps=1", "train.num_accumulation_steps=1"]
    return ["train", *given, "data.max_length=64", "adapter.rank=2", "tracker=none", f"output_dir={output}"]


def some_of_each(statuses: list[int]) -> None:
    """Both ends were met often enough: neither the base arguments nor the changes are without effect."""
    assert min(statuses.count(0), statuses.count(2)) >= len(statuses) / 20, statuses


LONG = (pytest.mark.nightly, pytest.mark.timeout(3600))


@pytest.mark.parametrize("count", [12, pytest.param(800, marks=LONG)])
def test_random_overrides_train_or_end_in_one_message(
    count: int, tiny: Path, data: Path, tmp_path_factory: Any, capsys: Any
) -> None:
    """Three overrides an example, in the mean."""
    statuses = []

    @fuzzing(count)
    @given(given_overrides=overrides("train"))
    def each(given_overrides: list[str]) -> None:
        output = tmp_path_factory.mktemp("fuzz") / "run"
        statuses.append(check([*arguments_of(tiny, data, output), *given_overrides], output, capsys))

    each()
    some_of_each(statuses)


def test_random_overrides_of_doctor_end_in_a_verdict_or_one_message(tiny: Path, capsys: Any) -> None:
    statuses = []

    @fuzzing(15)
    @given(given_overrides=overrides("doctor"))
    def each(given_overrides: list[str]) -> None:
        with limited(LIMIT_S):
            statuses.append(run(["doctor", f"model.path={tiny}", "tracker=none", *given_overrides]))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert err.count("qdora: ") == (statuses[-1] == 2), err

    each()
    assert {0, 2} <= set(statuses), statuses


def test_random_overrides_of_show_end_in_samples_or_one_message(tiny: Path, data: Path, capsys: Any) -> None:
    statuses = []

    @fuzzing(40)
    @given(given_overrides=overrides("show"))
    def each(given_overrides: list[str]) -> None:
        with limited(LIMIT_S):
            statuses.append(run(["show", f"model.path={tiny}", f"data.train={data}", *given_overrides]))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert err.count("qdora: ") == (statuses[-1] == 2), err

    each()
    assert {0, 2} <= set(statuses), statuses


@pytest.mark.parametrize("command", ["merge", "evaluate"])
def test_random_overrides_of_other_commands_end_in_one_message(command: str, capsys: Any) -> None:
    """Without what they need, so that they end before they do anything."""
    needed = ["run=/nowhere"]

    @fuzzing(50)
    @given(given_overrides=overrides(command))
    def each(given_overrides: list[str]) -> None:
        if not {"--cfg", "--cfg job"}.isdisjoint(given_overrides):
            return
        assert check([command, *given_overrides, *needed], Path(), capsys) == 2

    each()


ROWS = [{"prompt": f"{n}+{n}=", "completion": str(n + n)} for n in range(20)]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}]} for n in range(20)]
ODD_VALUES: list[Any] = [
    None,
    1,
    -1.5,
    True,
    "",
    " ",
    [],
    {},
    [[]],
    {"a": {}},
    "\ud800",
    "\x00",
    "a" * 100_000,
    [None],
    "€",
]
KEYS = ["prompt", "completion", "messages", "text", "x"]
DAMAGE = ["none", "cut", "flip", "insert", "head", "bom", "utf-16", "empty", "lines", "latin"]
ODD_CHATS: list[Any] = [
    [{"role": "nobody", "content": "a"}],
    [{"role": "user"}],
    [{"content": "a"}],
    [{"role": "assistant", "content": None}],
    ["user: a"],
    [{"role": "user", "content": "a"}] * 3,
    [{"role": "assistant", "content": ["a"]}],
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    [{"role": ["user"], "content": {}}],
]


def encoded(rows: list[Any], suffix: str) -> bytes:
    """A file of the format."""
    if suffix == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(rows[0])
        writer.writerows([row.values() for row in rows])
        return out.getvalue().encode("utf-8", "replace")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """A name and a content: rows that are odd, bytes that are damaged, or both."""
    suffix = draw(st.sampled_from(["jsonl", "json", "csv", "parquet"]))
    rows: list[Any] = [dict(row) for row in draw(st.sampled_from([ROWS, CHATS] if suffix[0] == "j" else [ROWS]))]
    if suffix.startswith("json"):
        for _ in range(draw(st.integers(0, 3))):
            index, key = draw(st.integers(0, 19)), draw(st.sampled_from(KEYS))
            kind = draw(st.sampled_from(["value", "chat", "drop", "row", "all"]))
            if kind == "value" and isinstance(rows[index], dict):
                rows[index][key] = draw(st.sampled_from(ODD_VALUES))
            elif kind == "chat":
                rows[index] = {"messages": draw(st.sampled_from(ODD_CHATS))}
            elif kind == "drop" and isinstance(rows[index], dict):
                rows[index].pop(key, None)
            elif kind == "row":
                rows[index] = draw(st.sampled_from(ODD_VALUES))
            else:
                rows = [{key: draw(st.sampled_from(ODD_VALUES))}] * 20
    content = encoded(rows, suffix)
    damage = draw(st.sampled_from(DAMAGE))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if damage == "cut":
        content = content[:place]
    elif damage == "flip" and content:
        content = content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
    elif damage == "insert":
        content = content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    elif damage == "head":
        content = draw(st.binary(max_size=64)) + content
    elif damage == "bom":
        content = b"\xef\xbb\xbf" + content
    elif damage == "utf-16":
        content = content.decode("utf-8", "replace").encode("utf-16")
    elif damage == "empty":
        content = b""
    elif damage == "lines":
        content = b"\n" * 100
    elif damage == "latin":
        content = content + "é\n".encode("latin-1")
    packed = draw(st.sampled_from(["", "", ".gz", ".gz wrong"]))
    if packed == ".gz":
        content = gzip.compress(content)
    name = draw(st.sampled_from(["data", "a b", "ä", "[x]", "a,b", "-x", "x=y"]))
    return f"{name}.{suffix}{packed.removesuffix(' wrong')}", content


@pytest.mark.parametrize("count", [12, pytest.param(500, marks=LONG)])
def test_malformed_data_trains_or_ends_in_one_message(
    count: int, tiny: Path, tmp_path_factory: Any, capsys: Any
) -> None:
    statuses = []

    @fuzzing(count)
    @given(file=files())
    def each(file: tuple[str, bytes]) -> None:
        folder = tmp_path_factory.mktemp("fuzz")
        path = folder / file[0]
        path.write_bytes(file[1])
        statuses.append(check(arguments_of(tiny, path, folder / "run"), folder / "run", capsys, names=[file[0]]))

    each()
    some_of_each(statuses)
