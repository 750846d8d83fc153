"""Reading what runs and studies have left, whole or not."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

UNREADABLE = (OSError, EOFError, zlib.error, ValueError)


def read_packed_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl.gz file; none where there is no such file."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        values = [json.loads(line) for line in lines]
    except UNREADABLE:
        return []
    return [one for one in values if isinstance(one, dict)]
