"""A base without a chat template that was trained on turns: what is written has the template that was used."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qdora.adapter import peft_format
from qdora.chat_template import DEFAULT_TEMPLATE
from qdora.checkpoint_folder import read_manifest
from qdora.commands import run as command
from qdora.merging.gguf_format import FILE
from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import QUICK

TURNS = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Told = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real tokenizer, as a base model has it: no template, `<|endoftext|>` at the end."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    make_model(
        folder,
        "llama-tied",
        num_hidden_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        vocab_size=49152,
        eos_token_id=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    assert not list(folder.glob("*.jinja"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "turns.jsonl"
    file.write_text((json.dumps({"messages": TURNS}) + "\n") * 8)
    return file


def train(base: Path, data: Path, output: Path, *options: str) -> Path:
    """The folder of a run of two steps."""
    given = [f"model.path={base}", f"data.train={data}", "adapter.rank=4", "train.num_steps=2", "tracker=none", *QUICK]
    done = qdora("train", *given, *options, f"output_dir={output}")
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, data, tmp_path_factory.mktemp("runs") / "run")


def ids_of(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    return ids


def wanted_ids(base: Path) -> list[int]:
    """What training showed the model before an answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return ids_of(tokenizer)


@pytest.mark.parametrize("kind", ["adapter", "hf", "nf4", "gguf", "lora", "full"])
def test_template_that_was_trained_is_in_what_is_written(
    base: Path, data: Path, run: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "adapter":
        folder = run / "adapter"
    elif kind == "full":
        folder = train(base, data, tmp_path / "full", "adapter=none", "quant=none") / "model"
    else:
        folder = tmp_path / "merged"
        assert command(["merge", f"run={run}", f"output={folder}", f"format={kind}", "verify=false"]) == 0
    if kind == "gguf":
        fields = {name: field.contents() for name, field in GGUFReader(folder / FILE).fields.items()}
        assert fields["tokenizer.chat_template"] == DEFAULT_TEMPLATE
        assert "tokenizer.ggml.eot_token_id" not in fields, "what ends a turn is the end of sequence"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    assert ids_of(tokenizer) == wanted_ids(base)
    assert tokenizer.eos_token == "<|endoftext|>"


def test_run_of_plain_texts_claims_no_template(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    run = train(base, data, tmp_path / "run")
    assert sorted(file.name for file in (run / "adapter").iterdir()) == [
        *("README.md", peft_format.CONFIG, peft_format.WEIGHTS, "trained_over.json")
    ]
    assert command(["merge", f"run={run}", f"output={tmp_path}/merged", "verify=false"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is None


def test_run_that_goes_on_from_an_adapter_keeps_its_template(base: Path, data: Path, run: Path, tmp_path: Path) -> None:
    again = train(base, data, tmp_path / "again", f"adapter.path={run}/adapter")
    for file in (run / "adapter").glob("*token*"):
        assert (again / "adapter" / file.name).read_bytes() == file.read_bytes()
    assert AutoTokenizer.from_pretrained(again / "adapter").chat_template == DEFAULT_TEMPLATE


def test_training_on_over_another_base_is_told_once(base: Path, data: Path, run: Path, tmp_path: Path) -> None:
    """By the weights' fingerprint: a copy under another name is the same base, other weights under its name are not."""
    moved = shutil.copytree(base, tmp_path / "moved")
    given = [f"data.train={data}", "adapter.rank=4", "train.num_steps=1", "tracker=none", *QUICK]
    given += [f"adapter.path={run}/adapter", f"model.path={moved}"]
    for name, is_told in (("same", False), ("other", True)):
        if is_told:
            tensors = load_file(moved / "model.safetensors")
            save_file(
                {key: tensor + 1 for key, tensor in tensors.items()}, moved / "model.safetensors", {"format": "pt"}
            )
        done = qdora("train", *given, f"output_dir={tmp_path}/{name}", nproc=2)
        assert done.returncode == 0, done.stderr[-3000:]
        told = (
            f"names {base} as its base (adapter_config.json), and model.path={moved} is given, which has other weights"
        )
        assert done.stdout.count(told) == is_told


@pytest.fixture(scope="module")
def foreign(run: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as other programs leave it: with a tokenizer that has another template and what that needs."""
    folder = tmp_path_factory.mktemp("adapters") / "foreign"
    folder.mkdir()
    for name in (peft_format.CONFIG, peft_format.WEIGHTS):
        (folder / name).write_bytes((run / "adapter" / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", ["hf", "nf4", *nightly("gguf"), "lora"])
def test_template_of_an_adapter_from_elsewhere_is_kept_and_ends_its_turns(
    base: Path, foreign: Path, tmp_path: Path, format: str
) -> None:
    output = tmp_path / "merged"
    options = [f"adapter={foreign}", f"model.path={base}", "quant=nf4", f"format={format}", "verify=false"]
    assert command(["merge", *options, f"output={output}"]) == 0
    if format == "gguf":
        fields = {name: field.contents() for name, field in GGUFReader(output / FILE).fields.items()}
        assert fields["tokenizer.chat_template"] == CHATML
        tokenizer = AutoTokenizer.from_pretrained(output, gguf_file=FILE)
        end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
        assert (fields["tokenizer.ggml.eot_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (end, eos)
    else:
        tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == CHATML
    assert ids_of(tokenizer) == ids_of(AutoTokenizer.from_pretrained(foreign))
    if format in ("hf", "nf4"):
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [0, end]


def test_template_of_an_adapter_is_what_generate_asks_through(
    base: Path, foreign: Path, run: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr("qdora.generation.generate_stream", lambda model, prompt, *_, **__: asked.append(prompt))
    for given in ([f"adapter={foreign}", f"model.path={base}"], [f"run={run}"]):
        assert command(["generate", *given, f"prompt={TURNS[0]['content']}"]) == 0
    assert asked == [ids_of(AutoTokenizer.from_pretrained(foreign)), wanted_ids(base)]


def test_other_template_of_the_base_gives_way_and_that_is_told(
    base: Path, foreign: Path, tmp_path: Path, capsys: Told
) -> None:
    with_one = tmp_path / "with-one"
    shutil.copytree(base, with_one)
    config = json.loads((with_one / "tokenizer_config.json").read_text()) | {"chat_template": DEFAULT_TEMPLATE}
    (with_one / "tokenizer_config.json").write_text(json.dumps(config))
    alone = tmp_path / "alone"  # the template without a tokenizer
    alone.mkdir()
    for name in (peft_format.CONFIG, peft_format.WEIGHTS, "chat_template.jinja"):
        (alone / name).write_bytes((foreign / name).read_bytes())
    for adapter in (foreign, alone):
        output = tmp_path / f"merged-{adapter.name}"
        options = [f"adapter={adapter}", f"model.path={with_one}", "quant=nf4", "verify=false", f"output={output}"]
        assert command(["merge", *options]) == 0
        said = (
            f"the chat template in {adapter} takes the place of that in {with_one}: it is what the adapter was trained"
        )
        assert said in capsys.readouterr().out
        assert AutoTokenizer.from_pretrained(output).chat_template == CHATML
        assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())


def test_vocabulary_that_an_adapter_brings_must_fit_the_base(
    base: Path, foreign: Path, tmp_path: Path, capsys: Told
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(foreign, larger)
    tokenizer = AutoTokenizer.from_pretrained(foreign)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(larger)
    assert command(["merge", f"adapter={larger}", f"model.path={base}", "quant=nf4", f"output={tmp_path}/merged"]) == 2
    told = capsys.readouterr().err
    assert (
        f"the tokenizer in {larger} makes token ids up to 49153, but the model's embedding has 49152 rows ({base})"
        in told
    )
    assert not (tmp_path / "merged").exists()


def test_another_template_is_another_merge(base: Path, foreign: Path, tmp_path: Path, capsys: Told) -> None:
    options = ["merge", f"adapter={foreign}", f"model.path={base}", "quant=nf4", "verify=false", f"output={tmp_path}/m"]
    assert command(options) == 0
    before = (foreign / "chat_template.jinja").read_text()
    try:
        (foreign / "chat_template.jinja").write_text(before + " ")
        assert command(options) == 2
    finally:
        (foreign / "chat_template.jinja").write_text(before)
    assert "holds another merge: adapter_tokenizer" in capsys.readouterr().err


def test_merged_weights_are_those_of_the_run_with_a_template(run: Path, base: Path, tmp_path: Path) -> None:
    """The tokenizer beside the adapter changes no weight."""
    for name, given in (("run", [f"run={run}"]), ("adapter", [f"adapter={run}/adapter", f"model.path={base}"])):
        assert command(["merge", *given, f"output={tmp_path}/{name}", "verify=false"]) == 0
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "adapter"))
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())


VARIABLE = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
OFF = "model.chat_template_kwargs.enable_thinking=false"


@pytest.fixture(scope="module")
def thinker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose template has a variable."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("bases") / "thinker")
    (folder / "chat_template.jinja").write_text(CHATML + VARIABLE)
    return folder


@pytest.fixture(scope="module")
def without_thinking(thinker: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(thinker, data, tmp_path_factory.mktemp("runs") / "run", OFF)


def asked_with(folder: Path, **variables: bool) -> str:
    """The prompt for an answer through the template of a folder, as transformers and vLLM write it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": FILE} if (folder / FILE).exists() else {}))
    text: str = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, **variables)
    return text


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "hf", "nf4", "gguf", "lora", "full", "from an adapter"])
def test_variables_of_the_training_are_in_what_is_written(
    thinker: Path, data: Path, run: Path, without_thinking: Path, tmp_path: Path, kind: str
) -> None:
    """As defaults, which a request may change; fixed for llama.cpp, which gives each template `enable_thinking`."""
    folder = tmp_path / "merged"
    if kind == "adapter":
        folder = without_thinking / "adapter"
    elif kind == "checkpoint":
        copy = shutil.copytree(without_thinking, tmp_path / "copy")
        shutil.rmtree(copy / "adapter")
        assert command(["merge", f"run={copy}", f"output={folder}", "verify=false"]) == 0
    elif kind == "full":
        folder = train(thinker, data, tmp_path / "full", "adapter=none", "quant=none", OFF) / "model"
    elif kind == "from an adapter":  # which was trained without the variable
        plain = train(thinker, data, tmp_path / "plain")
        given = [f"adapter={plain}/adapter", f"model.path={thinker}", OFF, f"output={folder}"]
        assert command(["merge", *given, "verify=false"]) == 0
    else:
        assert command(["merge", f"run={without_thinking}", f"output={folder}", f"format={kind}", "verify=false"]) == 0
    assert asked_with(folder) == asked_with(thinker, enable_thinking=False) != asked_with(thinker)
    theirs = asked_with(thinker, enable_thinking=kind != "gguf")
    assert asked_with(folder, enable_thinking=True) == theirs


def test_variables_of_the_training_are_those_of_generate_unless_others_are_given(
    thinker: Path, without_thinking: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr("qdora.generation.generate_stream", lambda model, prompt, *_, **__: asked.append(prompt))
    ways = ([f"run={without_thinking}"], [f"adapter={without_thinking}/adapter", f"model.path={thinker}"])
    others = (OFF.replace("false", "true"), OFF.replace("false", "null"))
    for given in [*ways, *([*way, other] for way in ways for other in others)]:
        assert command(["generate", *given, f"prompt={TURNS[0]['content']}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    off, on = (tokenizer(asked_with(thinker, enable_thinking=one))["input_ids"] for one in (False, True))
    assert asked == [off] * 2 + [on] * 4


def test_variables_are_refused_where_a_run_goes_on_otherwise_or_the_template_has_none(
    base: Path, thinker: Path, data: Path, without_thinking: Path, tmp_path: Path, capsys: Told
) -> None:
    given = [f"data.train={data}", "adapter.rank=4", "train.num_steps=2", "tracker=none", *QUICK]
    assert command(["train", f"model.path={thinker}", *given, f"output_dir={without_thinking}"]) == 2
    assert "it has model.chat_template_kwargs={enable_thinking:false} (now {})" in capsys.readouterr().err
    other = OFF.replace("enable_thinking", "enable_thought")
    assert command(["train", f"model.path={thinker}", *given, other, f"output_dir={tmp_path}/a"]) == 2
    assert "no variable enable_thought, did you mean 'enable_thinking'?; it has enable_thi" in capsys.readouterr().err
    assert command(["show", f"model.path={base}", *given, OFF]) == 2
    assert "no variable enable_thinking; it has none" in capsys.readouterr().err
    assert command(["merge", f"run={without_thinking}", OFF, f"output={tmp_path}/merged"]) == 2
    assert "model.chat_template_kwargs: run=DIR decides that" in capsys.readouterr().err


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("kind", ["base", "foreign", "full"])
def test_unfinished_run_has_the_tokenizer_and_system_turn_of_its_end(
    base: Path, foreign: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its checkpoint's adapter, and in what it is asked; also where the adapter was written without them."""
    asked: list[list[int]] = []
    monkeypatch.setattr("qdora.generation.generate_stream", lambda model, prompt, *_, **__: asked.append(prompt))
    data = tmp_path / "turns.jsonl"
    data.write_text((json.dumps({"messages": [SYSTEM, *TURNS]}) + "\n") * 8)
    options = {"base": [], "foreign": [f"adapter.path={foreign}"], "full": ["adapter=none", "quant=none"]}[kind]
    run = train(base, data, tmp_path / "run", *options)
    ask = ["generate", f"run={run}", f"prompt={TURNS[0]['content']}"]
    assert command(ask) == 0
    result = run / ("model" if kind == "full" else "adapter")
    at_end = result.rename(run / "gone")
    assert command(ask) == 0
    assert asked[0] == asked[1]
    template = CHATML if kind == "foreign" else DEFAULT_TEMPLATE
    wanted = AutoTokenizer.from_pretrained(at_end).apply_chat_template(
        [SYSTEM, *TURNS[:1]], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert asked[1] == wanted
    if kind == "full":
        return
    written = run / "adapters" / "step-00000002"
    assert contents(written) == contents(at_end)
    note = json.loads((written / "trained_over.json").read_text())
    ended = json.loads((at_end / "trained_over.json").read_text())
    assert note == ended | {"checkpoint": note["checkpoint"]}
    checksums = read_manifest(run / "checkpoints" / written.name).checksums
    before = {"checkpoint": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()}
    (written / "trained_over.json").write_text(json.dumps(note | before))
    (written / "tokenizer.json").unlink()
    assert command(["merge", f"run={run}", f"output={tmp_path}/merged", "verify=false"]) == 0
    assert contents(written) == contents(at_end)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template


def contents(folder: Path) -> dict[str, bytes]:
    """Returns what an adapter's folder holds, but note, card and config, which may name its layers in two ways."""
    own = ("trained_over.json", peft_format.CONFIG, "README.md")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in own}


def test_adapter_that_a_run_began_with_and_that_is_gone_is_told_until_it_is_back(
    base: Path, foreign: Path, data: Path, tmp_path: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr("qdora.generation.generate_stream", lambda model, prompt, *_, **__: asked.append(prompt))
    first = shutil.copytree(foreign, tmp_path / "first")
    run = train(base, data, tmp_path / "run", f"adapter.path={first}")
    shutil.rmtree(run / "adapter")
    ask = ["generate", f"run={run}", f"prompt={TURNS[0]['content']}"]
    first.rename(tmp_path / "moved")
    said = f"adapter.path={first}, with which the run began, is not there: the tokenizer of the base is taken"
    for _ in range(2):
        assert command(ask) == 0
        assert said in capsys.readouterr().err
    (tmp_path / "moved").rename(first)
    assert command(ask) == 0
    assert said not in capsys.readouterr().err
    assert asked[-1] == ids_of(AutoTokenizer.from_pretrained(foreign)) != asked[0]
