"""A Git repository with some history, and Git itself without the tester's configuration."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from programs import program
from trees import Entry, snapshot

FILES = 300
COMMITS = 40


#: Nothing of the tester's, and a time that stands still.
VARIABLES: Mapping[str, str] = {
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    **{
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "A"), ("EMAIL", "a@example.org"), ("DATE", "2020-01-01T00:00:00Z"))
    },
}


def git(*words: str | Path, cwd: Path | None = None) -> str:
    """What Git says, which must succeed."""
    # -C, not Popen's cwd: until a child is executed nothing else runs in this process, a proxy of the mount neither.
    where = ("-C", cwd) if cwd is not None else ()
    return program("git", *where, "-c", "gc.auto=0", *words, variables=VARIABLES)


def _blob(content: bytes) -> bytes:
    return b"data %d\n%s\n" % (len(content), content)


def _commit(number: int, branch: str, parent: str, changes: list[bytes]) -> bytes:
    head = f"commit refs/heads/{branch}\ncommitter A <a@example.org> {1_500_000_000 + number} +0000\n".encode()
    start = f"from {parent}\n".encode() if parent else b""
    return head + _blob(b"change %d" % number) + start + b"".join(changes) + b"\n"


def _file(name: str, content: bytes, mode: str = "100644") -> bytes:
    return f"M {mode} inline {name}\n".encode() + _blob(content)


def history() -> bytes:
    """A stream for git fast-import: branches `main` and `other`, with changes, deletions, renames and odd entries."""
    chance = random.Random(7)
    names = [f"directory-{n % 23}/sub {n % 5}/file-{n}.txt" for n in range(FILES)]

    def text() -> bytes:
        return b"".join(b"%d lines of text\n" % chance.randrange(10**6) for _ in range(chance.randrange(100)))

    stream = [_commit(0, "main", "", [_file(name, text()) for name in names])]
    odd = [_file(".gitattributes", b"gate filter=gate\n"), _file("directory-4/gate", b"passed\n")]
    odd += [_file("run me.sh", b"#!/bin/sh\n", "100755"), _file("link", b"run me.sh", "120000"), _file("empty", b"")]
    odd += [_file("binary", chance.randbytes(400_000)), _file("\u6587\u4ef6/\u00e4", text())]
    stream.append(_commit(1, "main", "", odd))
    for number in range(2, COMMITS):
        branch = "other" if number >= COMMITS // 2 and number % 2 else "main"
        parent = "refs/heads/main" if number == COMMITS // 2 + 1 else ""
        changes = [_file(name, text()) for name in chance.sample(names[COMMITS:], 9)]
        if branch == "main":
            changes.append(f"D {names[number]}\n".encode())
        stream.append(_commit(number, branch, parent, changes))
    return b"".join(stream)


def make_repository(area: Path) -> Path:
    """A bare repository with that history."""
    (area / "stream").write_bytes(history())
    git("init", "-q", "--bare", "-b", "main", area / "origin.git")
    program("sh", "-c", "git fast-import --quiet <../stream", cwd=area / "origin.git")
    return area / "origin.git"


def worktree(path: Path) -> dict[bytes, Entry]:
    """The files of a clone, without times."""
    return snapshot(path, times=False, without=frozenset({b".git", b"."}))
