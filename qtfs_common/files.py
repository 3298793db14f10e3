"""Opening files that a user named, which may be anything."""

from __future__ import annotations

import os
from typing import BinaryIO


def open_input(path: str | os.PathLike[str]) -> BinaryIO:
    """``path`` opened for reading; a FIFO does not make it wait, and a directory raises OSError and leaks nothing."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
