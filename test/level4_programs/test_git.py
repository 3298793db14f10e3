"""Git on a mount: clone, check, switch branches, commit, collect garbage; the server's repository is sound."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from programs import Shared, over, program
from trees import Entry, assert_same, snapshot

FILES = 300
COMMITS = 40


def git(*words: str | Path, cwd: Path | None = None) -> str:
    """Git without the tester's own configuration, at a time that stands still."""
    return program(
        "git", "-c", "gc.auto=0", *words, cwd=cwd, HOME="/nonexistent",
        GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL="/dev/null", GIT_TERMINAL_PROMPT="0",
        GIT_AUTHOR_NAME="A", GIT_AUTHOR_EMAIL="a@example.org", GIT_AUTHOR_DATE="2020-01-01T00:00:00Z",
        GIT_COMMITTER_NAME="A", GIT_COMMITTER_EMAIL="a@example.org", GIT_COMMITTER_DATE="2020-01-01T00:00:00Z",
    )


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
    odd = [_file("run me.sh", b"#!/bin/sh\n", "100755"), _file("link", b"run me.sh", "120000"), _file("empty", b"")]
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


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository that is not on a mount."""
    area = tmp_path_factory.mktemp("git")
    (area / "stream").write_bytes(history())
    git("init", "-q", "--bare", "-b", "main", area / "origin.git")
    program("sh", "-c", "git fast-import --quiet <../stream", cwd=area / "origin.git")
    return area / "origin.git"


@over("unix-auto", "unix-none", "tcp-auto")
def test_clone_check_switch_and_collect(origin: Path, shared: Shared, tmp_path: Path) -> None:
    here, there, local = shared.here / "clone", shared.there / "clone", tmp_path / "local"
    git("clone", "-q", f"file://{origin}", here)
    git("clone", "-q", f"file://{origin}", local)
    for branch in ("main", "other", "main"):
        for path in (here, local):
            git("checkout", "-q", branch, cwd=path)
            assert git("status", "--porcelain", cwd=path) == ""
        assert_same(_worktree(here), _worktree(local))
        assert_same(_worktree(there), _worktree(local))
    for path in (here, there):
        assert git("fsck", "--full", "--strict", "--no-dangling", cwd=path) == ""
    git("gc", "-q", "--prune=now", cwd=here)
    assert git("fsck", "--full", "--strict", "--no-dangling", cwd=there) == ""
    assert git("rev-list", "--all", "--objects", cwd=there) == git("rev-list", "--all", "--objects", cwd=local)
    assert_same(snapshot(here), snapshot(there))


def _worktree(path: Path) -> dict[bytes, Entry]:
    return snapshot(path, times=False, without=frozenset({b".git", b"."}))


@over("unix-auto", "unix-none")
def test_work_on_the_mount(origin: Path, shared: Shared) -> None:
    """Commit, merge, stash, rebase and worktrees; the result is cloned back to a disk."""
    here, there = shared.here / "clone", shared.there / "clone"
    git("clone", "-q", origin, here)
    git("checkout", "-q", "-b", "mine", cwd=here)
    (here / "new").write_text("new\n")
    (here / "empty").unlink()
    os.rename(here / "binary", here / "moved")
    assert sorted(git("status", "--porcelain", cwd=here).splitlines()) == [
        " D binary", " D empty", "?? moved", "?? new",
    ]  # fmt: skip
    git("add", "-A", cwd=here)
    git("commit", "-q", "-m", "mine", cwd=here)
    git("merge", "-q", "-m", "merged", "-X", "ours", "origin/other", cwd=here)
    (here / "new").write_text("newer\n")
    git("stash", "-q", cwd=here)
    assert (there / "new").read_text() == "new\n"
    git("stash", "pop", "-q", cwd=here)
    assert (there / "new").read_text() == "newer\n"
    git("commit", "-q", "-a", "-m", "newer", cwd=here)
    git("worktree", "add", "-q", "../second", "origin/main", cwd=here)
    assert git("status", "--porcelain", cwd=shared.here / "second") == ""
    assert git("fsck", "--full", "--strict", "--no-dangling", cwd=there) == ""
    assert git("log", "--format=%s", "-3", "--first-parent", cwd=there).split() == ["newer", "merged", "mine"]
