"""What programs.py works on: a tree of sources, as files, as an archive, and as a repository. The same in every run."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

FILES = 200
_DIRECTORIES = 20
_COMMITS = 3
#: Nobody's settings but git's own.
GIT_ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}


def make(directory: Path) -> None:
    """`tree.tar` and the bare repository `tree.git`, in a new directory."""
    directory.mkdir()
    _write_archive(directory / "tree.tar")
    _write_repository(directory / "tree.git")


def _sources() -> Iterator[tuple[str, bytes]]:
    """Names and contents: 0.5 to 16 KiB, most of them short."""
    chance = random.Random(4)
    for number in range(FILES):
        size = int(512 * 2 ** chance.triangular(0, 5, 1))
        yield f"part{number % _DIRECTORIES}/file{number}.c", chance.randbytes(size // 2).hex().encode()


def _write_archive(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in _sources():
            entry = tarfile.TarInfo(f"tree/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _write_repository(path: Path) -> None:
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", path], check=True, env=GIT_ENVIRONMENT)
    command: list[str | Path] = ["git", "-C", path, "fast-import", "--quiet"]
    subprocess.run(command, check=True, env=GIT_ENVIRONMENT, input=b"".join(_history()))


def _history() -> Iterator[bytes]:
    """For git-fast-import(1): each commit adds a line to every file."""
    for number in range(_COMMITS):
        yield b"commit refs/heads/main\ncommitter A <a@example.org> %d +0000\ndata 1\n.\n" % (1_600_000_000 + number)
        for name, data in _sources():
            text = data + b"\nline\n" * number
            yield b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(text), text)
