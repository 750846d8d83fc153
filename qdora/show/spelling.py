"""Which characters a sample's tokens make, each with what is known of its tokens.

A token of a byte-level vocabulary may be a part of a character, so tokens are taken as the bytes that they stand for,
and a character is learned where any of its bytes is.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LEADS = ((0xC2, 1), (0xE0, 2), (0xF0, 3), (0xF5, 4), (0x100, 0))
"""First bytes below the first number, from the one before on, begin characters of so many bytes."""


@dataclass(frozen=True, slots=True)
class Run:
    """Characters that follow one another and are alike."""

    text: str
    learned: bool
    is_added: bool
    """Whether they are tokens that were added to the vocabulary: the ends of turns, say."""
    is_broken: bool = False
    """Whether `text` is the hexadecimal form of bytes that are no character."""

    @property
    def plain(self) -> str:
        """The text, with U+FFFD for each byte that is no character."""
        return "\ufffd" * (len(self.text) // 2) if self.is_broken else self.text


class Spelling:
    """What the tokens of a tokenizer stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._decoders = list(_decoders(tokenizer))
        self._bytes: dict[int, bytes] = {}

    def is_added(self, number: int) -> bool:
        """Whether a token was added to the vocabulary, as those are that no text is made of."""
        return number in self._added

    def bytes_of(self, number: int) -> bytes:
        """What a token stands for; a blank that begins a word belongs to it."""
        if number not in self._bytes:
            self._bytes[number] = self._spelled(number)
        return self._bytes[number]

    def text(self, ids: Iterable[int]) -> str:
        """What tokens make together; bytes that are no character as U+FFFD."""
        return b"".join(self.bytes_of(int(number)) for number in ids).decode("utf-8", "replace")

    def runs(self, ids: Sequence[int], learned: Sequence[bool]) -> list[Run]:
        """The characters of a sample, those that are alike together."""
        spelled = [self.bytes_of(int(number)) for number in ids]
        owners = np.repeat(np.arange(len(spelled)), [len(piece) for piece in spelled])
        whole, position = b"".join(spelled), 0
        found: list[tuple[list[str], tuple[bool, bool, bool]]] = []
        while position < len(whole):
            character, size = _character(whole, position)
            tokens = {int(owner) for owner in owners[position : position + size]}
            is_broken = character is None
            kind = (any(learned[token] for token in tokens), any(self.is_added(int(ids[t])) for t in tokens), is_broken)
            if not found or found[-1][1] != kind:
                found.append(([], kind))
            found[-1][0].append(f"{whole[position]:02X}" if character is None else character)
            position += size
        return [Run("".join(parts), *kind) for parts, kind in found]

    def _spelled(self, number: int) -> bytes:
        if number in self._added:
            return self._added[number].encode()
        token = self._tokenizer.convert_ids_to_tokens(number)
        if isinstance(token, bytes):
            return token
        text = str(token)
        for decoder in self._decoders:
            kind = decoder["type"]
            if kind == "ByteLevel":
                return b"".join(_alphabet().get(character, character.encode()) for character in text)
            if kind == "ByteFallback" and (byte := _BYTE.fullmatch(text)):
                return bytes([int(byte[1], 16)])
            if kind == "Metaspace":
                text = text.replace(decoder["replacement"], " ")
            elif kind == "Replace" and "String" in decoder["pattern"]:
                text = text.replace(decoder["pattern"]["String"], decoder["content"])
            elif kind == "BPEDecoder":
                text = text.replace(decoder["suffix"], " ")
            elif kind == "WordPiece":
                text = text.removeprefix(decoder["prefix"]) if text.startswith(decoder["prefix"]) else f" {text}"
        return text.encode("utf-8", "surrogatepass")


def _decoders(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """How a tokenizer makes text of tokens, step by step; one in Python as those of sentencepiece do."""
    if not tokenizer.is_fast:
        yield {"type": "Metaspace", "replacement": "\u2581"}
        yield {"type": "ByteFallback"}
        return
    decoder = tokenizer.backend_tokenizer.decoder
    steps = [json.loads(decoder.__getstate__())] if decoder is not None else []
    while steps:
        step = steps.pop(0)
        if step["type"] == "Sequence":
            steps = [*step["decoders"], *steps]
        else:
            yield step


@cache
def _alphabet() -> dict[str, bytes]:
    """The characters that byte-level vocabularies (GPT-2's and later ones) write for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    written = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
    return {character: bytes([byte]) for character, byte in written.items()}


def _character(whole: bytes, position: int) -> tuple[str | None, int]:
    """The character that begins at a byte, and its bytes; None and 1 where none does."""
    first = whole[position]
    if first < 0x80:
        return chr(first), 1
    size = next(size for below, size in _LEADS if first < below)
    try:
        text = whole[position : position + size].decode("utf-8") if size > 1 else ""
    except UnicodeDecodeError:
        text = ""
    return (text, size) if text else (None, 1)
