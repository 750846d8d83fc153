"""`qdora report` on a run that was trained for it and a study of the project, looked at by a real browser."""

import base64
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.reporting.answers import MAX_NEW_TOKENS
from tests.support.models import make_model
from tests.support.processes import ROOT, qdora
from tests.support.processes import run as start
from tests.support.runs import metrics_of, summary_of, write_sums

IN_A_BROWSER = pytest.mark.nightly(paths=["qdora/reporting/*", "qdora/figures.py"], packages=["chromium"])
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 1280)
LEGIBLE = 9
"""Pixels: the size of the smallest text in a drawing."""
FREE_FD = 10
"""Descriptors from here on are none of those that a shell redirects."""
HOSTILE = "<script>console.error('ran')</script>{{ 7 * 7 }}<img src=x onerror=\"console.error('ran')\">"
LOOK = """(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const panels = all("svg[role=img]");
  return {
    title: document.title,
    headings: all("h2").map((one) => one.id),
    anchors: all("nav a").every((one) => document.getElementById(one.getAttribute("href").slice(1))),
    page: document.documentElement.scrollWidth, screen: window.innerWidth,
    images: all("img").map((one) => [one.complete && one.naturalWidth > 0, one.alt.length > 0]),
    panels: panels.map((one) => [one.getBoundingClientRect().width, one.getAttribute("aria-label").length]),
    smallest: Math.min(...panels.map((one) => one.getScreenCTM().a)) * 9,
    outside: panels.flatMap((one) => [...one.querySelectorAll("text")].filter((text) => {
      const [box, own] = [one.getBoundingClientRect(), text.getBoundingClientRect()];
      return own.left < box.left - 2 || own.right > box.right + 2;
    }).map((text) => text.textContent)),
    ids: all("[id]").length - new Set(all("[id]").map((one) => one.id)).size,
    references: all("[href^='#']").every((one) => document.getElementById(one.getAttribute("href").slice(1))),
    scripts: all("script").length,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    text: document.body.innerText,
  };
})()"""


class Browser:
    """Chromium without a window, told what to do through a pipe (the DevTools protocol)."""

    def __init__(self, profile: Path) -> None:
        reads, ours = os.pipe()
        theirs, writes = os.pipe()
        given = [fcntl.fcntl(one, fcntl.F_DUPFD, FREE_FD) for one in (reads, writes)]
        self._to, self._from = os.fdopen(ours, "wb", buffering=0), os.fdopen(theirs, "rb", buffering=0)
        start = f'exec "$@" 3<&{given[0]} 4>&{given[1]}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", start, "bash", str(CHROMIUM), *options],
            pass_fds=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (reads, writes, *given):
            os.close(descriptor)
        self._numbers, self._left, self._session = itertools.count(1), b"", ""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def look(self, address: str, width: int, scheme: str = "light") -> dict[str, Any]:
        """What `LOOK` finds on a page, and what it asked for and complained of meanwhile."""
        self.events.clear()
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=address)
        self._until("Page.loadEventFired")
        found = self._call("Runtime.evaluate", expression=LOOK, returnByValue=True)
        assert "exceptionDetails" not in found, found
        seen: dict[str, Any] = found["result"]["value"]
        told = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        seen["complaints"] = [event for event in self.events if event["method"] in told]
        sent = [event["params"]["request"]["url"] for event in self.events if "requestWill" in event["method"]]
        seen["requests"] = [url for url in sent if url != address and not url.startswith("data:")]
        return seen

    def picture(self, path: Path) -> None:
        """The whole page that is shown, as a PNG."""
        taken = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(20)
        self._to.close()
        self._from.close()

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters} | session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _until(self, method: str) -> None:
        deadline = time.monotonic() + 60
        while not any(event.get("method") == method for event in self.events):
            assert time.monotonic() < deadline, method
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            some = self._from.read(1 << 20)
            assert some, "the browser has ended"
            self._left += some
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all pages."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32, whose greedy answers do not hang on rounding."""
    return make_model(tmp_path_factory.mktemp("model"), "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sums to train on, and held-out ones with two choices; the first prompt would run if it could."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": prompt, "completion": "even" if n % 2 else "odd", "choices": ["odd", "even"], "answer": n % 2}
        for n, prompt in enumerate([HOSTILE, *(f"{n}+{n}=" for n in range(5))])
    ]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": write_sums(folder / "train.jsonl"), "eval": folder / "held-out.jsonl"}


def options(model: Path, data: dict[str, Path], *others: str) -> list[str]:
    """A run of six steps."""
    given = [f"model.path={model}", "model.dtype=float32", f"data.train={data['train']}", f"data.eval={data['eval']}"]
    given += ["data.packing=false", "data.max_length=256", "train.num_steps=6", "train.micro_batch_size=4"]
    return [*given, "train.num_accumulation_steps=1", "parallel=none", "tracker=none", *others]


def done(command: str, *arguments: str) -> str:
    """What a command that ends well says."""
    ended = qdora(command, *arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return str(ended.stdout)


@pytest.fixture(scope="module")
def run(model: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that has been scored twice, analysed and reported."""
    folder = tmp_path_factory.mktemp("run") / "my run"
    own = ["adapter=lora", "quant=none", "adapter.rank=4", "optim.learning_rate=1e-2", "train.checkpoint_every=3"]
    done("train", *options(model, data, *own, f"output_dir='{folder}'"))
    done("evaluate", f"run='{folder}'")
    done("evaluate", f"run='{folder}'", "protocol=likelihood", f"output_dir='{folder}/evaluation-likelihood'")
    done("analyze", f"run='{folder}'")
    assert "one file that needs no other" in done("report", f"run='{folder}'", "num_answers=2")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The largest one that the project has the results of."""
    folder = tmp_path_factory.mktemp("study") / "study"
    shutil.copytree(ROOT / "benchmarks" / "results" / "study-operations-2026-11-27", folder)
    done("report", f"study={folder}")
    return folder


@pytest.fixture(scope="module", params=["run", "study"])
def page(request: pytest.FixtureRequest) -> Path:
    """report.html of either."""
    folder: Path = request.getfixturevalue(request.param)
    return folder / "report.html"


@IN_A_BROWSER
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_whole_in_a_browser(browser: Browser, page: Path, width: int, scheme: str) -> None:
    seen = browser.look(page.resolve().as_uri(), width, scheme)
    assert seen["complaints"] == []
    assert seen["requests"] == []
    assert seen["page"] <= seen["screen"] == width
    wanted = {"overview", "curves", "options", "commands", "versions"}
    wanted |= {"reading", "results", "differences", "search", "cost"} if "study" in str(page) else set()
    wanted |= {"scores", "answers", "weights", "memory"} if "my run" in str(page) else set()
    assert {*seen["headings"]} == wanted
    assert seen["anchors"]
    assert seen["references"]
    assert seen["ids"] == 0
    assert len(seen["images"]) == (2 if "my run" in str(page) else 0)
    assert all(loaded and described for loaded, described in seen["images"])
    assert len(seen["panels"]) >= 4
    assert all(250 < shown <= width and described for shown, described in seen["panels"])
    assert seen["outside"] == []
    assert seen["smallest"] > LEGIBLE
    light = [sum(map(int, re.findall(r"\d+", seen[name])[:3])) for name in ("ground", "ink")]
    assert (light[0] > 600 > 150 > light[1]) if scheme == "light" else (light[0] < 150 < 600 < light[1])


@IN_A_BROWSER
def test_what_a_prompt_holds_is_text(browser: Browser, run: Path) -> None:
    seen = browser.look((run / "report.html").resolve().as_uri(), 1280)
    assert HOSTILE in seen["text"]
    assert (seen["scripts"], seen["complaints"]) == (0, [])


@IN_A_BROWSER
def test_browser_would_complain(browser: Browser, run: Path, tmp_path: Path) -> None:
    text = (run / "report.html").read_text()
    bad = '<script>console.error("ran")</script><img src="http://127.0.0.1:9/x.png"><p style="width: 5000px">wide</p>'
    (tmp_path / "bad.html").write_text(text.replace("<main>", f"<main>{bad}"))
    seen = browser.look((tmp_path / "bad.html").resolve().as_uri(), 360)
    assert any("Content Security Policy" in json.dumps(event) for event in seen["complaints"])
    assert seen["page"] > seen["screen"]
    assert not all(loaded for loaded, _ in seen["images"])
    unguarded = (tmp_path / "bad.html").read_text().replace("Content-Security-Policy", "x")
    (tmp_path / "worse.html").write_text(unguarded)
    seen = browser.look((tmp_path / "worse.html").resolve().as_uri(), 360)
    assert seen["requests"] == ["http://127.0.0.1:9/x.png"]
    assert any(event["method"] == "Runtime.consoleAPICalled" for event in seen["complaints"])


def answers_of(model: torch.nn.Module, folder: Path, prompts: list[str]) -> list[str]:
    """Greedy, by plain transformers, a prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
        )
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_answers_are_those_of_base_and_adapter(model: Path, run: Path, data: dict[str, Path]) -> None:
    answers = json.loads((run / "answers.json").read_text())["answers"]
    rows = [json.loads(line) for line in data["eval"].read_text().splitlines()][:2]
    assert [(one["prompt"], one["reference"]) for one in answers] == [(r["prompt"], r["completion"]) for r in rows]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = [row["prompt"] for row in rows]
    before = answers_of(base, model, prompts)
    after = answers_of(PeftModel.from_pretrained(base, run / "adapter"), model, prompts)
    assert [one["before"] for one in answers] == before
    assert [one["after"] for one in answers] == after
    assert before != after


def test_second_report_needs_neither_base_nor_data(model: Path, run: Path, data: dict[str, Path]) -> None:
    first = (run / "report.html").read_bytes()
    hidden = [path.rename(path.with_name(f"{path.name}-hidden")) for path in (model, data["eval"])]
    try:
        done("report", f"run='{run}'", "num_answers=2")
        assert (run / "report.html").read_bytes() == first
        refused = qdora("report", f"run='{run}'", "num_answers=3")
        assert refused.returncode == 2
        assert "num_answers=0 reports without answers" in refused.stderr
        assert (run / "report.html").read_bytes() == first
    finally:
        for path in hidden:
            path.rename(path.with_name(path.name.removesuffix("-hidden")))


WITHOUT_MATPLOTLIB = """
import sys
from qdora.commands import run
status = run(sys.argv[1:])
sys.exit(status or 3 * ("matplotlib" in sys.modules))
"""


def test_report_that_a_run_left_out_is_made_later(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """It loads no matplotlib; the rest of it is there, and it goes on with a report."""
    folder, reports = tmp_path / "run", [tmp_path / "run" / name for name in ("report.png", "report.html")]
    arguments = options(model, data, "adapter.rank=4", f"output_dir={folder}")
    without = ["train", *arguments, "train.num_steps=2", "train.report=false"]
    ended = start([sys.executable, "-c", WITHOUT_MATPLOTLIB, *without], cold=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "qdora report" in ended.stdout
    assert not any(file.exists() for file in reports)
    assert (folder / "adapter").is_dir()
    assert len(metrics_of(folder)) == 3
    assert summary_of(folder)["status"] == "finished"
    done("report", f"run={folder}", "num_answers=0")
    first = [file.read_bytes() for file in reports]
    assert "going on from step 2 of 6" in done("train", *arguments)
    assert all(file.read_bytes() != before for file, before in zip(reports, first, strict=True))


def test_full_fine_tuning_answers_with_its_base_and_its_result(
    model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    own = ["adapter=none", "quant=none", "optim.learning_rate=1e-3"]
    done("train", *options(model, data, *own, f"output_dir={tmp_path}/run"))
    done("report", f"run={tmp_path}/run", "num_answers=3", f"output={tmp_path}/page.html")
    answers = json.loads((tmp_path / "run" / "answers.json").read_text())["answers"]
    prompts = [one["prompt"] for one in answers]
    for name, folder in (("before", model), ("after", tmp_path / "run" / "model")):
        own_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert [one[name] for one in answers] == answers_of(own_model, model, prompts)
    assert "full fine-tuning" in (tmp_path / "page.html").read_text()
