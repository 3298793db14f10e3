"""tar and rsync: a tree with everything a file system can hold goes onto the mount and comes back identical."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import Shared, over, program
from trees import assert_same, plant, plant_what_tar_loses, snapshot

TAR = ("tar", "--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse", "--format=posix")
RSYNC = ("rsync", "-aHAXS", "--numeric-ids", "--super", "--modify-window=-1")


@pytest.fixture
def garden(area: Path) -> Path:
    """The tree, on a disk."""
    plant(area / "garden")
    return area / "garden"


def tar_copy(source: Path, target: Path) -> None:
    target.mkdir()
    archive = target.parent / f"{target.name}.tar"
    program(*TAR, "-cf", archive, "-C", source, ".")
    program(*TAR, "-xpf", archive, "-C", target)
    program(*TAR, "-df", archive, "-C", target)
    archive.unlink()


@over("unix-auto", "unix-none", "tcp-auto")
def test_tar_there_and_back(garden: Path, shared: Shared, area: Path) -> None:
    original = snapshot(garden)
    tar_copy(garden, shared.here / "copy")
    assert_same(snapshot(shared.here / "copy"), original)
    assert_same(snapshot(shared.there / "copy"), original)
    tar_copy(shared.here / "copy", area / "back")
    assert_same(snapshot(area / "back"), original)


@over("unix-auto", "unix-none", "tcp-auto")
def test_rsync_there_and_back(garden: Path, shared: Shared, area: Path) -> None:
    """A second run finds nothing to do, and a third takes away what went at the source."""
    plant_what_tar_loses(garden)
    original = snapshot(garden)
    program(*RSYNC, f"{garden}/", shared.here / "copy")
    assert_same(snapshot(shared.here / "copy"), original)
    assert_same(snapshot(shared.there / "copy"), original)
    assert program(*RSYNC, "-ci", f"{garden}/", shared.here / "copy") == ""
    program(*RSYNC, f"{shared.here}/copy/", area / "back")
    assert_same(snapshot(area / "back"), original)
    (garden / "big").unlink()
    (garden / "links/soft").unlink()
    program(*RSYNC, "--delete", f"{garden}/", shared.here / "copy")
    assert_same(snapshot(shared.there / "copy"), snapshot(garden))


@over("unix-auto", "unix-none")
def test_a_tree_grown_on_the_mount(shared: Shared) -> None:
    """The same calls on both sides give the same tree, and cp -a copies it."""
    plant(shared.here / "garden")
    plant(shared.there.parent / "garden")
    here, there, local = (snapshot(p / "garden") for p in (shared.here, shared.there, shared.there.parent))
    assert_same(here, there)
    random = {b"big"}
    assert_same({n: e for n, e in here.items() if n not in random}, {n: e for n, e in local.items() if n not in random})
    program("cp", "-a", shared.here / "garden", shared.here / "copy")
    assert_same(snapshot(shared.there / "copy"), there)
