"""What a page is made of, and how it becomes HTML.

Every text goes through the template, which escapes it: answers, prompts, names and paths may hold anything. `Markup` is
what this package has drawn itself.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATE = "page.html.jinja"
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
Z_95 = 1.959964
"""Standard errors on each side of a mean that cover 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Link:
    """Text that leads to a file beside the page."""

    text: str
    href: str


Row: TypeAlias = Sequence[str | Link]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a page is about: names with short values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Its first column is text, the others are numbers."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    words: bool = False
    """Whether the other columns are words, too."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, or a picture of a file."""

    picture: Markup
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Side by side where there is room; with `wide` one below the other."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Commands:
    """What to type, a command each."""

    kind: ClassVar[str] = "commands"
    commands: Sequence[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a number says."""

    tone: str
    """`better`, `worse`, `same` or `note`."""
    text: str


@dataclass(frozen=True, slots=True)
class Findings:
    """A box of them."""

    kind: ClassVar[str] = "findings"
    findings: Sequence[Finding]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with what is said to it."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Answers:
    """Before and after, side by side."""

    kind: ClassVar[str] = "answers"
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Folded:
    """What is shown on demand, and in print."""

    kind: ClassVar[str] = "folded"
    title: str
    parts: "Sequence[Part]"


Part: TypeAlias = Text | Facts | Table | Figures | Commands | Findings | Answers | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is below it; without parts it is left out."""

    key: str
    """Its anchor."""
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Page:
    """All of it."""

    title: str
    summary: str
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("qdora", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [section for section in page.sections if section.parts]
    return environment.get_template(TEMPLATE).render(page=page, sections=sections)


def number(value: float | None, form: str) -> str:
    """A number for people: a minus as long as a plus, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return format(value, form).replace("e-0", "e-").replace("-", MINUS)


def interval(mean: float | None, half: float | None, form: str) -> str:
    """A mean with what is on each side of it."""
    shown = number(mean, form)
    return shown if half is None or shown == DASH else f"{shown} \N{PLUS-MINUS SIGN} {number(half, form)}"


def gib(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def png(path: Path, description: str, caption: str = "") -> Figure:
    """A PNG inside the page."""
    content = path.read_bytes()
    width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))  # of its IHDR
    data = base64.b64encode(content).decode()
    picture = Markup('<img width="{}" height="{}" alt="{}" src="data:image/png;base64,{}">')
    return Figure(picture.format(width, height, description, data), caption)
