"""Small file systems for tests to mount."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


@contextlib.contextmanager
def mounted_there(point: Path, *words: str | Path) -> Iterator[Path]:
    point.mkdir()
    subprocess.run(["mount", *words, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True)


@contextlib.contextmanager
def tmpfs(point: Path) -> Iterator[Path]:
    with mounted_there(point, "-t", "tmpfs", "-o", "size=1m,nr_inodes=40", "tmpfs"):
        yield point


@contextlib.contextmanager
def ext4(point: Path, image: Path | None = None) -> Iterator[Path]:
    """8 MiB; `image` is where its file lies."""
    image = image or point.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard", image], check=True)
    with mounted_there(point, "-o", "loop,nodelalloc", image):
        yield point
