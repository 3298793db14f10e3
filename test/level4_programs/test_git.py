"""Git on a mount: clone, check, switch branches, commit, collect garbage; the server's repository is sound."""

from __future__ import annotations

import os
from pathlib import Path

from programs import Shared, over
from repositories import git, worktree
from trees import assert_same, snapshot


@over("unix-auto", "unix-none", "tcp-auto")
def test_clone_check_switch_and_collect(origin: Path, shared: Shared, tmp_path: Path) -> None:
    here, there, local = shared.here / "clone", shared.there / "clone", tmp_path / "local"
    git("clone", "-q", f"file://{origin}", here)
    git("clone", "-q", f"file://{origin}", local)
    for branch in ("main", "other", "main"):
        for path in (here, local):
            git("checkout", "-q", branch, cwd=path)
            assert git("status", "--porcelain", cwd=path) == ""
        assert_same(worktree(here), worktree(local))
        assert_same(worktree(there), worktree(local))
    for path in (here, there):
        assert git("fsck", "--full", "--strict", "--no-dangling", cwd=path) == ""
    git("gc", "-q", "--prune=now", cwd=here)
    assert git("fsck", "--full", "--strict", "--no-dangling", cwd=there) == ""
    assert git("rev-list", "--all", "--objects", cwd=there) == git("rev-list", "--all", "--objects", cwd=local)
    assert_same(snapshot(here), snapshot(there))


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
