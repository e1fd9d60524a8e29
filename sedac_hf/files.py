"""Write files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """Write text to a file so that a reader sees the old content or the new, never a part.

    Args:
        path: The file; its folder is made when missing.
        text: The content, written as UTF-8.
    """
    with replacing(path) as draft, draft.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside the block a new file is written, which then takes the place of another at once.

    Args:
        path: The file; its folder is made when missing.

    Yields:
        Where to write. After an error nothing is left there, and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
