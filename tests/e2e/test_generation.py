"""What `qdora generate` and `qdora chat` say is what the model says, and comes while it is made."""

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora import commands, generation
from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers, switched_off
from qdora.adapter.trained_over import NOTE, write_note
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    ChatConfig,
    Compare,
    DataConfig,
    Dtype,
    GenerateConfig,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    RunConfig,
)
from qdora.errors import ConfigError
from qdora.generation import chat, generate
from qdora.model import LoadedModel, load_model
from qdora.model.generate import TextStream, generate_stream
from qdora.parallel import start_alone
from qdora.run_folder import RunFolder
from tests.support.models import make_model, make_tokenizer
from tests.support.processes import ROOT

WORLD = start_alone("tests")
NUM_TOKENS = 16
CTRL_C = b"\x03"
QUESTIONS = ["My name is Ada and I like tea.", "What is my name?"]
NO_SYSTEM = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system') }}{% endfor %}a"
PLAIN_TEMPLATE = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"


def load(folder: Path, quant: QuantMethod, adapter: AdapterConfig) -> LoadedModel:
    """The model in float32, for evaluation."""
    config, plan = ModelConfig(path=str(folder), dtype=Dtype.float32), ParallelConfig(plan=Plan.none)
    loaded = load_model(folder, config, QuantConfig(method=quant), adapter, plan, WORLD, trainable=False)
    loaded.model.eval()
    return loaded


def adapted(folder: Path, quant: QuantMethod, rank: int = 4) -> LoadedModel:
    """The model with a random DoRA adapter."""
    loaded = load(folder, quant, AdapterConfig(rank=rank))
    torch.manual_seed(3)
    for layer in adapted_layers(loaded.model).values():
        layer.lora_b.data.normal_(std=0.2)
        assert layer.magnitude is not None
        layer.magnitude.data.mul_(1 + 0.2 * torch.randn(layer.out_features))
    loaded.refresh(WORLD.device)
    return loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama, each of whose tokens is a character."""
    return make_model(tmp_path_factory.mktemp("tiny"), "llama", dtype=torch.float32, vocab_size=101)


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over NF4."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    loaded = adapted(tiny, QuantMethod.nf4)
    peft_format.save(loaded.model, folder.adapter, loaded.adapter, str(tiny), torch.float32, WORLD)
    write_note(folder.adapter, QuantConfig())
    config = RunConfig(model=ModelConfig(path=str(tiny), dtype=Dtype.float32), data=DataConfig(train="t"))
    folder.start(config, 0)
    return folder.path


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """SmolLM2 as transformers alone loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def model_of(folder: Path) -> ModelConfig:
    """In float32, so that whoever computes it takes the same tokens."""
    return ModelConfig(path=str(folder), dtype=Dtype.float32)


def said(capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What `qdora generate` writes to standard output."""
    capsys.readouterr()
    config = GenerateConfig(**{"prompt": "Hello", "max_new_tokens": NUM_TOKENS, **options})
    assert generate(config) == 0
    return capsys.readouterr().out


@torch.no_grad()
def greedy(model: Any, folder: Path, prompt: str, count: int = NUM_TOKENS) -> str:
    """By hand: the most likely token each time, everything computed anew for each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text


def by_transformers(model: Any, folder: Path, turns: list[str], count: int) -> str:
    """The greedy answer to turns of user and assistant."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": ["user", "assistant"][at % 2], "content": text} for at, text in enumerate(turns)]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**given, do_sample=False, max_new_tokens=count)[0, given["input_ids"].shape[1] :]
    text: str = tokenizer.decode(made, skip_special_tokens=True)
    return text


@torch.no_grad()
def logits_of(loaded: LoadedModel) -> Tensor:
    """(1, length, vocabulary)."""
    logits: Tensor = loaded.model(input_ids=torch.arange(4, 68)[None]).logits
    return logits


@pytest.mark.parametrize("quant", [QuantMethod.nf4, QuantMethod.none])
def test_adapters_switched_off_leave_the_base_exactly(quant: QuantMethod, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen2", dtype=torch.float32)  # with biases
    base = logits_of(load(folder, quant, AdapterConfig(method=AdapterMethod.none)))
    loaded = adapted(folder, quant)
    before = logits_of(loaded)
    assert not torch.allclose(before, base)
    with switched_off(loaded.model):
        with switched_off(loaded.model):
            assert torch.equal(logits_of(loaded), base)
        assert torch.equal(logits_of(loaded), base)
    assert torch.equal(logits_of(loaded), before)
    with pytest.raises(KeyboardInterrupt), switched_off(loaded.model):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(loaded), before)


def test_answer_is_that_of_transformers(smollm2: Path, theirs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    question = "What is the capital of France?"
    expected = by_transformers(theirs, smollm2, [question], NUM_TOKENS)
    assert "Paris" in expected
    assert said(capsys, model=model_of(smollm2), prompt=question) == expected + "\n"


def test_bare_text_is_continued_without_a_template(
    smollm2: Path, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "One, two, three, four,"
    expected = greedy(theirs, smollm2, text, 8)
    assert said(capsys, model=model_of(smollm2), prompt=text, max_new_tokens=8, chat_template=False) == expected + "\n"
    assert expected != by_transformers(theirs, smollm2, [text], 8)


def test_run_and_adapter_over_its_base_give_the_tuned_answer(
    tiny: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = greedy(adapted(tiny, QuantMethod.nf4).model, tiny, "Hello") + "\n"
    assert said(capsys, run=str(run), chat_template=False) == expected
    over = {"model": model_of(tiny), "adapter": str(run / "adapter"), "chat_template": False}
    assert said(capsys, **over, quant=QuantConfig()) == expected


def test_adapter_over_unquantised_weights_is_hinted_at_beside_the_answer(
    tiny: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = said(capsys, run=str(run), prompt="Hello", max_new_tokens=2)
    config = GenerateConfig(model=model_of(tiny), adapter=str(run / "adapter"), prompt="Hello", max_new_tokens=2)
    generate(config)  # its folder says what it was trained over
    out, err = capsys.readouterr()
    assert out == expected
    assert "unquantised" not in err
    unknown = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (unknown / NOTE).unlink()
    generate(replace(config, adapter=str(unknown)))
    out, err = capsys.readouterr()
    assert "is used over unquantised weights; trained over NF4? add quant=nf4" in err
    assert "unquantised" not in out


def test_compare_shows_the_answer_of_the_base_and_the_tuned_one(
    tiny: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = said(capsys, model=model_of(tiny), quant=QuantConfig()).removesuffix("\n")
    tuned = said(capsys, run=str(run)).removesuffix("\n")
    assert base != tuned
    assert said(capsys, run=str(run), compare=Compare.base) == f"base:\n{base}\n\ntuned:\n{tuned}\n"
    drawn = {"run": str(run), "temperature": 2.0, "seed": 5}
    alone, both = said(capsys, **drawn), said(capsys, **drawn, compare=Compare.base)
    assert both.endswith(f"tuned:\n{alone}"), "drawing for the base must not change what is drawn after it"


class Terminal(io.StringIO):
    """An output that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "side_by_side"), [(100, True), (79, False)])
def test_a_wide_terminal_shows_both_side_by_side(
    columns: int, side_by_side: bool, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = said(capsys, run=str(run), max_new_tokens=6).strip()
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    generate(GenerateConfig(run=str(run), prompt="Hello", max_new_tokens=6, compare=Compare.base))
    lines = shown.getvalue().splitlines()
    assert any("base" in line and "tuned" in line for line in lines) == side_by_side
    assert any(tuned in line for line in lines)
    assert all(len(line) <= columns for line in lines)


def test_each_piece_is_written_before_the_next_token_is_computed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of the model at each write; greedy answers of the tiny model are all characters."""
    passes, seen = [0], []
    original = generation.generate_stream

    def counted(model: Any, *arguments: Any, **options: Any) -> None:
        model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        original(model, *arguments, **options)

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(passes[0])
            return super().write(text)

    monkeypatch.setattr(generation, "generate_stream", counted)
    monkeypatch.setattr(sys, "stdout", Output())
    generate(GenerateConfig(model=model_of(tiny), prompt="Hello", max_new_tokens=NUM_TOKENS))
    assert seen == [*range(1, NUM_TOKENS + 1), NUM_TOKENS], "a write a pass, and the end of the line"


def test_pieces_are_whole_characters_and_wait_for_no_blank(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "Grüße 😀👍🏽 日本語の文章です, ça va"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split()), "no character is of several tokens"
    pieces: list[str] = []
    stream = TextStream(tokenizer, [tokenizer.eos_token_id], pieces.append)
    stream.put(torch.tensor([[5, 6, 7]]))
    for token in [*ids, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(any(character > "\u3040" for character in piece) for piece in pieces) >= 5
    stream = TextStream(tokenizer, [], pieces.append)
    stream.put(torch.tensor([[5]]))
    stream.put(torch.tensor(tokenizer("😀", add_special_tokens=False)["input_ids"][:1]))
    assert stream.text == ""
    stream.end()
    assert stream.text == "\ufffd", "half a character at the end is shown as such"


def converse(monkeypatch: pytest.MonkeyPatch, lines: str, folder: Path, **options: Any) -> list[str]:
    """A conversation over a pipe; the prompts that it made, as text."""
    prompts: list[str] = []
    original, tokenizer = generation.generate_stream, AutoTokenizer.from_pretrained(folder)

    def recorded(model: Any, prompt: list[int], *arguments: Any, **given: Any) -> None:
        prompts.append("".join(tokenizer.convert_ids_to_tokens(prompt)))
        original(model, prompt, *arguments, **given)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate_stream", recorded)
        patched.setattr(sys, "stdin", io.StringIO(lines))
        assert chat(ChatConfig(**{"max_new_tokens": NUM_TOKENS, **options})) == 0
    return prompts


def test_chat_keeps_the_conversation_until_it_is_started_over(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "first\nsecond\n/new\nthird\n\nnever"
    prompts = converse(monkeypatch, lines, tiny, model=model_of(tiny), system="be kind")
    start = "<s>### System:\nbe kind\n\n### User:\n"
    first = prompts[0].removeprefix(start)
    assert first == "first\n\n### Assistant:\n"
    assert prompts[1].startswith(f"{start}{first}")
    assert prompts[1].endswith("</s>\n\n### User:\nsecond\n\n### Assistant:\n")
    assert prompts[2:] == [f"{start}third\n\n### Assistant:\n"]
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_system_turn_of_the_training_is_used_told_replaced_and_left_out(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the note of an adapter, and of a model that was merged or trained whole."""
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    shutil.copytree(RunFolder(run).adapter, adapter)
    shutil.copytree(tiny, model)
    write_note(adapter, QuantConfig(), system="be kind")
    write_note(model, None, system="be kind")
    of_adapter = {"adapter": str(adapter), "model": model_of(tiny)}
    for options in (of_adapter, {"model": model_of(model)}):
        capsys.readouterr()
        (prompt,) = converse(monkeypatch, "first\n", tiny, **options)
        assert prompt == "<s>### System:\nbe kind\n\n### User:\nfirst\n\n### Assistant:\n"
        assert (
            "system turn of the training: 'be kind' (system=... gives another, system= none)" in capsys.readouterr().err
        )
        (prompt,) = converse(monkeypatch, "first\n", tiny, **options, system="be brief")
        assert prompt.startswith("<s>### System:\nbe brief\n\n")
        (prompt,) = converse(monkeypatch, "first\n", tiny, **options, system="")
        assert prompt.startswith("<s>### User:")
        assert "system turn" not in capsys.readouterr().err.partition("loading")[2].partition("loading")[2]
    make_tokenizer(PLAIN_TEMPLATE).save_pretrained(model)  # has no place for it
    (prompt,) = converse(monkeypatch, "first\n", model, model=model_of(model))
    assert "be kind" not in prompt


@pytest.mark.nightly(paths=["qdora/generation.py", "qdora/model/generate.py", "qdora/interrupt.py"])
def test_chat_over_a_pipe_answers_as_transformers_does(smollm2: Path, theirs: Any) -> None:
    """As a user runs it; the first answer is read while the command waits for the second line."""
    count = 10
    arguments = [f"model.path={smollm2}", "model.dtype=float32", f"max_new_tokens={count}"]
    command = [sys.executable, "-m", "qdora", "chat", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{QUESTIONS[0]}\n".encode())
        process.stdin.flush()
        reads: list[bytes] = []
        while not reads or not reads[-1].endswith(b"\n"):
            reads.append(os.read(process.stdout.fileno(), 1000))
            assert reads[-1], "it ended"
        assert process.poll() is None
        rest, _ = process.communicate(f"{QUESTIONS[1]}\n".encode(), timeout=60)
    assert process.returncode == 0
    assert len(reads) > count // 2, "tokens came together"
    first = by_transformers(theirs, smollm2, QUESTIONS[:1], count)
    second = by_transformers(theirs, smollm2, [QUESTIONS[0], first, QUESTIONS[1]], count)
    assert second != by_transformers(theirs, smollm2, QUESTIONS[1:], count)
    assert b"".join(reads).decode() == first + "\n"
    assert rest.decode() == second + "\n"


def test_chat_goes_on_with_the_tuned_answer(
    tiny: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = converse(monkeypatch, "one\ntwo\n", tiny, run=str(run))
    capsys.readouterr()
    both = converse(monkeypatch, "one\ntwo\n", tiny, run=str(run), compare=Compare.base)
    assert both == [alone[0], alone[0], alone[1], alone[1]]
    assert capsys.readouterr().out.count("base:\n") == 2


class Impatient(io.StringIO):
    """Presses Ctrl-C at the third piece."""

    pieces = 0

    def write(self, text: str) -> int:
        self.pieces += 1
        count = super().write(text)
        if self.pieces == 3:
            raise KeyboardInterrupt
        return count


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_shown(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Impatient()
    monkeypatch.setattr(sys, "stdout", output)
    prompts = converse(monkeypatch, "one\ntwo\n", tiny, model=model_of(tiny))
    shown, rest = output.getvalue().split("\n", 1)
    assert 0 < len(shown) < len(rest)
    answer = prompts[1].removeprefix(prompts[0]).partition("</s>")[0]
    assert answer.replace(" ", "") == shown.replace(" ", "")
    monkeypatch.setattr(sys, "stdout", Impatient())
    with pytest.raises(KeyboardInterrupt):
        generate(GenerateConfig(model=model_of(tiny), prompt="Hello", max_new_tokens=NUM_TOKENS))


def until(terminal: int, wanted: bytes, timeout_s: float = 60) -> bytes:
    """What comes from a terminal up to `wanted`, or its end."""
    read, deadline = b"", time.monotonic() + timeout_s
    while wanted not in read:
        assert time.monotonic() < deadline, read
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                read += os.read(terminal, 1000)
            except OSError:  # closed on the other side
                return read
    return read


def press(terminal: int, key: bytes, process: int) -> int:
    """Presses a key that ends the process; its exit status.

    Pressed again after a while: CPython's readline misses a Ctrl-C between writing its mark and waiting for keys.
    """
    for _ in range(3):
        os.write(terminal, key)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
    raise AssertionError(f"{key!r} does not end it")


@pytest.mark.nightly(paths=["qdora/generation.py", "qdora/model/generate.py", "qdora/interrupt.py"])
def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(smollm2: Path) -> None:
    """In a terminal; the answer would take minutes. Ctrl-D is the end of input, as that of a pipe."""
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"TERM": "dumb", "PYTHONPATH": str(ROOT)}
        arguments = ["chat", f"model.path={smollm2}", "max_new_tokens=2000"]
        os.execv(sys.executable, [sys.executable, "-m", "qdora", *arguments])
    try:
        until(terminal, b"> ", timeout_s=180)
        os.write(terminal, b"Tell me a long story about every king of England.\n")
        until(terminal, b"England.\r\n")
        until(terminal, b" ")
        os.write(terminal, CTRL_C)
        assert len(until(terminal, b"\n> ", timeout_s=60)) < 1000
        status = press(terminal, CTRL_C, process)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    finally:
        os.close(terminal)
    assert status == 0


def test_prompt_comes_from_standard_input(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "two\nlines"
    expected = said(capsys, model=model_of(tiny), prompt=text)
    assert expected != said(capsys, model=model_of(tiny), prompt="-n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    assert said(capsys, model=model_of(tiny), prompt="-") == expected


def test_drawn_tokens_are_fixed_by_the_seed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(**options: Any) -> str:
        return said(capsys, model=model_of(tiny), **options)

    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1)
    assert drawn(temperature=1.5, seed=1) != drawn(temperature=1.5, seed=2)
    assert drawn(temperature=1.5, seed=1) != drawn(temperature=0.3, seed=1)
    assert drawn(seed=1) == drawn(seed=2)
    assert drawn(temperature=1.5, seed=1, top_p=1e-6) == drawn(), "only the most likely token is left"


def test_drawing_is_among_all_tokens(tiny: Path) -> None:
    """transformers keeps the 50 most likely by itself; at this temperature all 101 are alike."""
    model = load(tiny, QuantMethod.none, AdapterConfig(method=AdapterMethod.none)).model
    tokenizer, first = AutoTokenizer.from_pretrained(tiny), set()
    for seed in range(200):
        stream = TextStream(tokenizer, [], lambda text: None)
        generate_stream(model, [5], stream, 1, WORLD.device, temperature=1e4, seed=seed)
        first.add(stream.text)
    assert len(first) > 60


def test_answer_ends_where_the_context_does(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(
        capsys, model=model_of(tiny), prompt="x" * 505, chat_template=False, max_new_tokens=100, temperature=9.0
    )
    assert 1 <= len(text.replace(" ", "").strip()) <= 7


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (
            None,
            {"prompt": "x" * 513, "chat_template": False},
            r"prompt has 513 tokens, but the context of .* is 512",
        ),
        (NO_SYSTEM, {"system": "be kind"}, "system: the chat template of .* has no place for a system prompt"),
        (PLAIN_TEMPLATE, {"system": "be kind"}, "system: the chat template of .* has no place for a system prompt"),
        (None, {"prompt": "\udcff"}, "prompt is not UTF-8"),
    ],
)
def test_prompt_that_cannot_be_used_is_told_before_the_model_is_loaded(
    template: str | None,
    options: dict[str, Any],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(ConfigError, match=message):
        generate(GenerateConfig(**{"model": model_of(tmp_path), "prompt": "Hello", **options}))
    if "system" in options:
        with pytest.raises(ConfigError, match=message):
            chat(ChatConfig(model=model_of(tmp_path), system="be kind"))


def test_chat_over_a_pipe_ends_where_the_context_does(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"tokens, but the context of .* is 512 with the answer"):
        converse(monkeypatch, f"one\n{'x' * 500}\n", tiny, model=model_of(tiny))


def test_standard_input_that_cannot_be_used_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerateConfig(model=model_of(tiny), prompt="-")
    for given, message in ((b"\n", "which is empty"), (b"\xff\xfe", "which is not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        with pytest.raises(ConfigError, match=message):
            generate(config)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match="standard input is not UTF-8"):
        chat(ChatConfig(model=model_of(tiny)))


def test_chat_with_nothing_to_answer_is_no_success(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="reads standard input, which is empty"):
        converse(monkeypatch, "", tiny, model=model_of(tiny))


def test_run_that_trained_every_weight_answers_but_has_no_base_to_compare(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    method, quant = AdapterConfig(method=AdapterMethod.none), QuantConfig(method=QuantMethod.none)
    model = ModelConfig(path="gone", dtype=Dtype.float32)
    run.start(RunConfig(model=model, quant=quant, adapter=method, data=DataConfig(train="t")), 0)
    run.model.symlink_to(tiny)
    assert said(capsys, run=str(run.path)) == said(capsys, model=model_of(tiny))
    with pytest.raises(ConfigError, match=r"compare=base: run=.* trained every weight"):
        generate(GenerateConfig(run=str(run.path), prompt="Hello", compare=Compare.base))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "run=nowhere", "prompt=x"], "run=nowhere: no run there"),
        (["chat", "run=nowhere"], "run=nowhere: no run there"),
        (["generate", "model.path=nowhere", "prompt="], "prompt is not set"),
        (["generate", "model.path=nowhere", "prompt=x"], "model.path=nowhere: no such folder"),
        (["generate", "model.path=nowhere", "prompt=x", "compare=base"], "compare=base needs run=DIR or adapter=DIR"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
