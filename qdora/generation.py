"""Answers of a run or a model, shown while they are made: to one prompt (`generate`) or in a conversation (`chat`)."""

import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qdora import parallel
from qdora.adapter.dora import switched_off
from qdora.config import AdapterMethod, ChatConfig, DataFormat, GenerateConfig
from qdora.data.encode import encode_prompt
from qdora.data.sources import Row
from qdora.errors import ConfigError, DataError
from qdora.files import output_may_close
from qdora.model import LoadedModel, check_vocabulary, load_tokenizer, model_folder
from qdora.model.folder import context_length
from qdora.model.generate import TextStream, end_tokens, generate_stream
from qdora.subject import find_subject

TABLE_COLUMNS = 80
"""A terminal this wide shows two answers side by side."""
NEW = "/new"
"""What starts a conversation over."""

Turn = dict[str, str]


def generate(config: GenerateConfig) -> int:
    """Answers one prompt as `config` says, on standard output; returns the exit status.

    Raises:
        QdoraError: the run, the model, the adapter or the prompt cannot be used.
    """
    speaker = Speaker(config, "qdora generate")
    text = _utf8("prompt", _standard_input() if config.prompt == "-" else str(config.prompt))
    prompt = speaker.encode([_said("user", text)]) if config.chat_template else speaker.encode_bare(text)
    speaker.load()
    with output_may_close():
        speaker.show(prompt, config.seed)
    return 0


def chat(config: ChatConfig) -> int:
    """Answers line after line of standard input until an empty one or its end; returns the exit status.

    Ctrl-C stops an answer, of which what was shown is kept; at the prompt it ends the conversation.

    Raises:
        QdoraError: the run, the model, the adapter or what was said cannot be used.
    """
    speaker = Speaker(config, "qdora chat", can_stop=True)
    speaker.encode([_said("user", "Hello")])  # a system prompt without a place shows before the model is loaded
    speaker.load()
    with output_may_close(), suppress(KeyboardInterrupt):
        _converse(speaker, config.seed)
    return 0


def _converse(speaker: "Speaker", seed: int) -> None:
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history and keys to edit with

        print(f"{speaker.name}: an empty line or Ctrl-D ends, {NEW} starts over, Ctrl-C stops an answer")
    turns: list[Turn] = []
    asked = False
    while line := _next_line("> " if by_hand else ""):
        asked = True
        if line == NEW:
            turns = []
            continue
        turns.append(_said("user", line))
        try:
            prompt = speaker.encode(turns)
        except ConfigError as error:
            if not by_hand:
                raise
            print(f"qdora: {error}", file=sys.stderr)
            turns.pop()
            continue
        answer = speaker.show(prompt, seed + len(turns))
        if answer:
            turns.append(_said("assistant", answer))
        else:
            turns.pop()  # most templates want an answer after each question
    if not (asked or by_hand):
        raise ConfigError("qdora chat reads standard input, which is empty: pipe questions into it, or use a terminal")


class Speaker:
    """A model that answers: its tokenizer at first, so that mistakes in a prompt show at once, and `load` the rest."""

    def __init__(self, config: ChatConfig, command: str, can_stop: bool = False) -> None:
        """`can_stop`: Ctrl-C ends an answer, and not the command.

        Raises:
            QdoraError: the run, the model or the adapter cannot be used.
        """
        self._config, self._can_stop = config, can_stop
        self._world = parallel.start_alone(command)
        # Standard output is for answers.
        self._subject = find_subject(config, "used", self._world, hints=sys.stderr)
        if config.compare is not None and self._subject.adapter.method is AdapterMethod.none:
            raise ConfigError(
                f"compare=base: run={config.run} trained every weight, so its base is not in it: leave compare out, "
                "and ask its base by model.path=..."
            )
        self.name = str(config.run or config.adapter or config.model.path)
        self._base = model_folder(self._subject.model)
        self._tokenizer = load_tokenizer(self._base, self._subject.model, self._subject.adapter.path)
        self._ends = end_tokens(self._tokenizer, self._base)
        self._context = context_length(self._base, self._subject.model)
        self._loaded: LoadedModel | None = None
        self._is_told = False  # that a prompt has the system turn of the training
        self._system = self._subject.system if config.system is None else config.system

    def load(self) -> None:
        """Loads the model."""
        check_vocabulary(self._base, self._tokenizer)
        told = self._subject.other_base(self._base)
        print(*([told] if told else []), f"loading {self.name}", sep="\n", file=sys.stderr, flush=True)
        if self._is_told:
            said = textwrap.shorten(str(self._system), 80)
            print(f"system turn of the training: {said!r} (system=... gives another, system= none)", file=sys.stderr)
        self._loaded = self._subject.load(self._base, self._world)

    def encode(self, turns: list[Turn]) -> list[int]:
        """The prompt that a conversation makes through the chat template, after the system turn: given, or trained.

        Raises:
            ConfigError: it is too long, or the template has no place for a system prompt.
        """
        system, is_given = self._system, self._config.system is not None
        if not system:
            return self._fitting(self._through_template(turns))
        try:
            ids, other = (
                self._through_template([_said("system", text), *turns])
                for text in (_utf8("system", system), f"Not: {system}")
            )
        except DataError:
            self._through_template(turns)  # unless the turns alone do not fit either
            ids = other = []
        if ids == other and not is_given:
            self._system = None
            return self.encode(turns)
        if ids == other:  # refused, or passed over in silence
            raise ConfigError(
                f"system: the chat template of {self._subject.model.path} has no place for a system prompt: leave it "
                "out, or say it in the prompt"
            )
        self._is_told = not is_given
        return self._fitting(ids)

    def encode_bare(self, text: str) -> list[int]:
        """The prompt that a text is by itself.

        Raises:
            ConfigError: it is too long.
        """
        return self._fitting(encode_prompt(Row({"prompt": text}, "prompt"), DataFormat.completion, self._tokenizer))

    def _through_template(self, turns: list[Turn]) -> list[int]:
        return encode_prompt(Row({"messages": turns}, "the conversation"), DataFormat.messages, self._tokenizer)

    def _fitting(self, prompt: list[int]) -> list[int]:
        if self._context is not None and len(prompt) >= self._context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, but the context of {self._subject.model.path} is "
                f"{self._context} with the answer: shorten it, or start over"
            )
        return prompt

    def show(self, prompt: list[int], seed: int) -> str:
        """Writes the answer to standard output while it is made, and under `compare` the base's; returns the answer.

        Tuned and base draw by the same seed, so that the answer is the same with and without `compare`.
        """
        if self._config.compare is None:
            answer = self._answer(prompt, seed, _write)
        elif sys.stdout.isatty() and shutil.get_terminal_size().columns >= TABLE_COLUMNS:
            return self._show_side_by_side(prompt, seed)
        else:
            _write("base:\n")
            self._answer_of_base(prompt, seed, _write)
            _write("\n\ntuned:\n")
            answer = self._answer(prompt, seed, _write)
        _write("\n")
        return answer

    def _show_side_by_side(self, prompt: list[int], seed: int) -> str:
        base, tuned = Text(), Text()

        def table() -> Table:
            made = Table("base", "tuned", expand=True)
            made.add_row(base, tuned)
            return made

        console = Console()
        # What is longer than the screen is cut while it grows; the whole table comes at the end.
        with Live(console=console, get_renderable=table, transient=True):
            self._answer_of_base(prompt, seed, lambda text: _extend(base, text))
            answer = self._answer(prompt, seed, lambda text: _extend(tuned, text))
        console.print(table())
        return answer

    def _answer_of_base(self, prompt: list[int], seed: int, write: Callable[[str], None]) -> None:
        assert self._loaded is not None, "load() comes first"
        with switched_off(self._loaded.model):
            self._answer(prompt, seed, write)

    def _answer(self, prompt: list[int], seed: int, write: Callable[[str], None]) -> str:
        assert self._loaded is not None, "load() comes first"
        config, stream = self._config, TextStream(self._tokenizer, self._ends, write)
        room = config.max_new_tokens if self._context is None else self._context - len(prompt)
        try:
            generate_stream(
                self._loaded.model,
                prompt,
                stream,
                min(room, config.max_new_tokens),
                self._world.device,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=seed,
            )
        except KeyboardInterrupt:
            if not self._can_stop:
                raise
        return stream.text


def _said(role: str, text: str) -> Turn:
    return {"role": role, "content": text}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _extend(shown: Text, text: str) -> None:
    shown.append(text)


def _utf8(what: str, text: str) -> str:
    """Raises `ConfigError` for what Python reads where bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is not UTF-8: convert it") from None
    return text


def _standard_input() -> str:
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise ConfigError("prompt=- reads standard input, which is not UTF-8: convert it") from None
    if not text.strip():
        raise ConfigError("prompt=- reads standard input, which is empty: pipe a text into it")
    return text


def _next_line(mark: str) -> str:
    """The next line without blanks around it; empty at the end of standard input."""
    try:
        return _utf8("what was said", input(mark).strip())
    except EOFError:
        if mark:
            print()
        return ""
    except UnicodeDecodeError:
        raise ConfigError("standard input is not UTF-8: convert it") from None
