"""`qdora show`: data as a model is trained on it. Needs a tokenizer, no weights, no GPU, and mostly no torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdora.adapter.trained_over import check_adapter
from qdora.config import ModelConfig, ShowConfig


def show(config: ShowConfig) -> int:
    """Prints samples, counts and lengths of the data, under torchrun on rank 0 alone; returns 0.

    Raises:
        QdoraError: the tokenizer or the data cannot be read, nothing of the data is left, what is asked for is not
            there, or the figure cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    if config.adapter.path is not None:
        check_adapter(config.adapter.path)
    with without_torch(config.model):
        from qdora.model.folder import load_tokenizer_alone
        from qdora.show.run import run

        tokenizer = load_tokenizer_alone(config.model, config.adapter.path)
    return run(config, tokenizer)


@contextmanager
def without_torch(model: ModelConfig) -> Iterator[None]:
    """Inside the block torch cannot be imported, unless it is loaded already or the tokenizer may need it.

    transformers loads torch where it is installed, which takes five of seven seconds, and no tokenizer of its own
    computes with it. What it has found out when it was imported stays, so that it does not do so later either. A GGUF
    file is read by its code for torch, and code that comes with a model may be so.
    """
    path = Path(str(model.path)).expanduser()
    may_need_it = model.trust_remote_code or path.suffix == ".gguf" or any(path.glob("*.gguf"))
    if may_need_it or "torch" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it says that there is no PyTorch
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module is not there
    try:
        yield
    finally:
        del sys.modules["torch"]


__all__ = ["show"]
