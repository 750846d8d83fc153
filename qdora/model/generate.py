"""Answers token by token: several at once, or one that is handed on while it is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from qdora.chat_template import turn_ends
from qdora.errors import ModelError, first_line


def end_tokens(tokenizer: Any, base: Path) -> list[int]:
    """The ids that end an answer: of the sequence, of a turn by the chat template, and those that the folder names."""
    ends = {tokenizer.eos_token_id, *turn_ends(tokenizer)}
    if (base / "generation_config.json").exists():
        try:
            named = GenerationConfig.from_pretrained(base).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{base}/generation_config.json cannot be read: {first_line(error)}") from None
        ends |= set(named) if isinstance(named, list) else {named}
    return sorted(end for end in ends if end is not None)


@torch.no_grad()
def generate_batch(
    model: Any, prompts: list[list[int]], tokenizer: Any, max_new_tokens: int, ends: list[int], device: torch.device
) -> list[str]:
    """Greedy continuations of several prompts at once, without special tokens. *Collective* if sharded."""
    length = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    settings = GenerationConfig(**options, eos_token_id=ends)
    made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    return [text.strip() for text in tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)]


@torch.no_grad()
def generate_stream(
    model: Any,
    prompt: list[int],
    stream: "TextStream",
    max_new_tokens: int,
    device: torch.device,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Continues one prompt into `stream`: greedily, or drawing tokens at a temperature above 0; seeds torch."""
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    settings = GenerationConfig(
        **(drawn if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=stream.ends,
        pad_token_id=stream.tokenizer.pad_token_id,
    )
    ids = torch.tensor([prompt], device=device)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=stream)


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Hands on the text of an answer as soon as its characters are whole.

    transformers' own streamer waits for a blank, which many languages do not write. A token may be a part of a
    character, and its text may depend on the token before it: each piece is what two decodings differ by.
    """

    def __init__(self, tokenizer: Any, ends: list[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.text = ""
        """All that was handed on."""
        self._write = write
        self._ids: list[int] = []
        self._before, self._written = 0, 0
        """Tokens up to which the text is known, without and with the latest piece."""
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes the prompt, which is passed over, and then token by token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self.ends]
        self._hand_on(whole=True)

    def end(self) -> None:
        """Hands on what is left, whole characters or not."""
        self._hand_on(whole=False)

    def _hand_on(self, whole: bool) -> None:
        known, text = (
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self._ids[self._before : self._written], self._ids[self._before :])
        )
        if len(text) <= len(known) or (whole and text.endswith("\ufffd")):
            return
        self._before, self._written = self._written, len(self._ids)
        self.text += text[len(known) :]
        self._write(text[len(known) :])
