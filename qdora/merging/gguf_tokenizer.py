"""A transformers tokenizer as the metadata of a GGUF file.

llama.cpp has code of its own for each way of splitting text before merging ("pre"), known by a name; it is found here
by the regular expression, so that a fine-tune under any name is recognised. A vocabulary of SentencePiece's kind needs
scores: llama.cpp merges the pair of the highest first, so they follow from the order of the merges.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer

from qdora.chat_template import turn_ends
from qdora.template_variables import fixed

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_PRES = {
    rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}": "qwen2",
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}": "tekken",
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_SYMBOLS}[\r\n/]*|{_SPACES}": "gpt-4o",
}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Tokens that models add as plain text, but mean as marks."""


class _UnwritableError(Exception):
    """GGUF has no such tokenizer."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    model: str
    """llama.cpp's word: gpt2 for byte-level merges, llama for SentencePiece's."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    special: gguf.SpecialVocab
    space_prefix: bool
    """Whether a space is put before a text."""


def write_tokenizer(writer: gguf.GGUFWriter, base: Path, num_tokens: int) -> None:
    """Adds the tokenizer in `base`, filled up to `num_tokens`, or prints why the file has none."""
    try:
        vocabulary = _read(base, num_tokens)
    except _UnwritableError as error:
        writer.add_tokenizer_model("none")
        print(f"GGUF: the file has no tokenizer ({error}): llama.cpp takes and gives token ids only")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)


def _read(base: Path, num_tokens: int) -> _Vocabulary:
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        model, vocabulary = spec["model"], tokenizer.get_vocab()
        byte_level = _is_byte_level(spec)
        special = gguf.SpecialVocab(base, load_merges=byte_level, n_vocab=num_tokens)
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise _UnwritableError(f"transformers cannot read one in {base}: {error}") from error
    if max(vocabulary.values()) >= num_tokens:
        raise _UnwritableError(f"it has tokens up to {max(vocabulary.values())}, the embedding {num_tokens} rows")
    tokens, types = _tokens(tokenizer, num_tokens, byte_level)
    for kind in ("bos", "eos", "unk", "pad"):
        id_ = getattr(tokenizer, f"{kind}_token_id")
        if id_ is not None:
            special.special_token_ids[kind] = id_
    end = _end_of_turn(tokenizer)
    if end is not None:
        special.special_token_ids["eot"] = end
    # As transformers reads it, which may be another than the one in tokenizer_config.json.
    named = tokenizer.chat_template
    if isinstance(named, dict):
        special.chat_template = [{"name": name, "template": fixed(text)} for name, text in named.items()]
    else:
        special.chat_template = named and fixed(named)
    ids = tokenizer.encode("a")
    special.add_special_token = {
        "bos": ids[0] == special.special_token_ids.get("bos"),
        "eos": ids[-1] == special.special_token_ids.get("eos"),
    }
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[0])
    scores = None
    if not byte_level:
        order: dict[str, float] = {}
        for merge in model["merges"]:
            order.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(len(order)))
        scores = [order.get(token, -float(len(order))) for token in tokens]
    return _Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=_pre(spec) if byte_level else "default",
        tokens=tokens,
        types=types,
        scores=scores,
        special=special,
        space_prefix=first.startswith("Ġ" if byte_level else "▁"),
    )


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an assistant's turn by the chat template, where that is not the end of sequence."""
    if not tokenizer.chat_template:
        return None
    return min(turn_ends(tokenizer) - {tokenizer.eos_token_id}, default=None)


def _is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether its merges are of bytes, rather than of characters with the bytes to fall back on."""
    model = spec["model"]
    if model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix"):
        if model.get("byte_fallback"):
            return False
        if any(step["type"] == "ByteLevel" for step in _steps(spec)):
            return True
    raise _UnwritableError(f"its {model['type']} vocabulary is neither byte-level nor of SentencePiece's BPE kind")


def _steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What is done to a text before merging."""
    steps = spec["pre_tokenizer"] or {"type": "none"}
    return steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]


def _tokens(tokenizer: Any, num_tokens: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """The text and the type of each id."""
    tokens = [f"[PAD{id_}]" for id_ in range(num_tokens)]
    types = [int(TokenType.UNUSED)] * num_tokens
    added = tokenizer.added_tokens_decoder
    for token, id_ in tokenizer.get_vocab().items():
        type_ = TokenType.NORMAL
        if id_ in added:
            if not byte_level and token == tokenizer.unk_token:
                type_ = TokenType.UNKNOWN
            elif added[id_].special or _LOOKS_SPECIAL.fullmatch(token):
                type_ = TokenType.CONTROL
            else:  # matched in the text as it is, before spaces are marked
                type_, token = TokenType.USER_DEFINED, token.replace("▁", " ")
        elif not byte_level and _BYTE.fullmatch(token):
            type_ = TokenType.BYTE
        tokens[id_], types[id_] = token, int(type_)
    return tokens, types


def _pre(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how a text is split."""
    steps = _steps(spec)
    kinds = [step["type"] for step in steps]
    splits = steps[-1].get("use_regex", True)
    model = spec["model"]
    if kinds == ["Split", "ByteLevel"] and not splits:
        pre = _PRES.get(steps[0]["pattern"].get("Regex", ""))
        if pre is not None:
            # The same splits; only llama-bpe takes a whole word that is a token before any merge.
            return "smaug-bpe" if pre == "llama-bpe" and not model.get("ignore_merges") else pre
    elif kinds == ["Digits", "ByteLevel"] and splits and steps[0]["individual_digits"]:
        return "smollm"
    elif kinds == ["ByteLevel"] and splits:
        # Where no merge has a digit in it, digits come out alone all the same.
        digits = any(re.search("[0-9]", "".join(merge)) for merge in model["merges"])
        return "gpt-2" if digits else "smollm"
    print("GGUF: llama.cpp has no name for how this tokenizer splits text (pre=default): some texts get other ids")
    return "default"
