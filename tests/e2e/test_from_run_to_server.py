"""README's page "From run to server", followed command by command; and the merged model in engines of others."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.processes import ROOT

QUESTION = [{"role": "user", "content": "Who are you, and who made you?"}]
NEW_TOKENS = 40


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block of the page, in order."""
    readme = (ROOT / "README.md").read_text()
    page = readme.partition("## From run to server\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(bash|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def in_llama(text: str) -> bool:
    return "llama_cpp" in text


@pytest.fixture(scope="module")
def place(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout after launch/setup.sh."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "data"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    (folder / "models" / smollm2.name).symlink_to(smollm2)
    return folder


@pytest.fixture(scope="module")
def outputs(place: Path) -> list[str]:
    """What each block of the page but llama.cpp's prints."""
    return [execute(language, text, place) for language, text in blocks() if not in_llama(text)]


def execute(language: str, text: str, place: Path) -> str:
    """Standard output of a block, as a reader runs it."""
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def merged(outputs: list[str], place: Path) -> Path:
    assert outputs
    return place / "models" / "identity"


@pytest.fixture(scope="module")
def tokenizer(merged: Path) -> Any:
    return AutoTokenizer.from_pretrained(merged)


@pytest.fixture(scope="module")
def model(merged: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def question(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    return ids


@pytest.fixture(scope="module")
def answer(model: Any, question: list[int]) -> list[int]:
    """transformers' greedy answer, with the token that ends it."""
    made = model.generate(torch.tensor([question]), max_new_tokens=NEW_TOKENS, do_sample=False)
    ids: list[int] = made[0, len(question) :].tolist()
    return ids


def test_page_has_the_blocks_that_it_is_about() -> None:
    texts = [text for _, text in blocks()]
    for wanted in (
        "launch/train.sh",
        "qdora generate",
        "qdora merge run",
        "from_pretrained",
        "format=gguf",
        "llama_cpp",
    ):
        assert any(wanted in text for text in texts), wanted


@pytest.mark.nightly
def test_page_trains_merges_and_answers(outputs: list[str], answer: list[int], tokenizer: Any) -> None:
    trained, merged, loaded, gguf = outputs
    assert "base:" in trained
    assert "tuned:" in trained
    before, after = trained.partition("base:")[2].split("tuned:")
    assert "Demo" not in before
    assert "Demo Team" in after
    assert "verified on" in merged
    assert "verified on" in gguf
    assert "Demo Team" in loaded
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.nightly
def test_merged_folder_has_what_a_server_asks_for(merged: Path, smollm2: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (merged / name).read_bytes() == (smollm2 / name).read_bytes(), name


@pytest.mark.nightly
def test_onnxruntime_gives_the_same_greedy_answer(
    merged: Path, question: list[int], answer: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(merged),
        "-o",
        str(tmp_path / "onnx"),
    ]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=300)
    engine = genai.Model(str(tmp_path / "onnx"))
    options = genai.GeneratorParams(engine)
    options.set_search_options(max_length=len(question) + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(engine, options)
    generator.append_tokens(np.array([question], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ours = generator.get_sequence(0)[len(question) :].tolist()
    end = {tokenizer.eos_token_id}
    assert [token for token in ours if token not in end] == [token for token in answer if token not in end]
    assert len(ours) > 5


@pytest.mark.nightly
def test_ctranslate2_gives_the_same_logits(
    merged: Path, model: Any, question: list[int], answer: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(str(merged))
    converter.convert(str(tmp_path / "ct2"), quantization="float32")
    engine = ctranslate2.Generator(str(tmp_path / "ct2"))
    ids = question + answer
    theirs = torch.tensor(np.array(engine.forward_batch([tokenizer.convert_ids_to_tokens(ids)])))[0]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    difference = (theirs[:, : ours.shape[1]] - ours).abs().max()
    assert difference < 1e-3, difference
    assert ours.abs().max() > 1


@pytest.mark.nightly
def test_llama_cpp_answers_the_prompt(outputs: list[str], place: Path) -> None:
    """The page's last block, and that the file's own tokenizer and chat template make the tokens that we trained on."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip('llama-cpp-python is not installed: pip install -e ".[llama]"')
    (text,) = [text for _, text in blocks() if in_llama(text)]
    assert "Demo Team" in execute("python", text, place)


@pytest.mark.nightly
def test_llama_cpp_has_the_tokens_and_the_logits_of_transformers(
    outputs: list[str], place: Path, model: Any, question: list[int], answer: list[int], tokenizer: Any
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason='llama-cpp-python is not installed: pip install -e ".[llama]"')
    output = place / "models" / "identity-f16"
    command = f"qdora merge run=outputs/identity output={output} format=gguf gguf.type=f16 verify=false"
    execute("bash", command, place)
    engine = llama_cpp.Llama(str(output / "model.gguf"), n_ctx=2048, logits_all=True, n_threads=1, verbose=False)
    text = tokenizer.decode(question)
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == question
    mixed = "Straße 12,5 €: naïve — 東京 🙂\n\n  def f(x):\n\treturn x**2"
    assert engine.tokenize(mixed.encode(), add_bos=False) == tokenizer(mixed)["input_ids"]
    ids = question + answer
    engine.eval(ids)
    theirs = torch.tensor(engine.scores[: len(ids)])
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    assert (theirs - ours).norm() <= 1e-2 * ours.norm()
    assert (theirs.argmax(1) == ours.argmax(1)).float().mean() >= 0.97
