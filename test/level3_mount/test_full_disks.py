"""Full disks, quotas and broken disks below the engine: the writer is told, by the same call as on one machine.

Each story is a row of calls and what came of them. It is told twice, on the server's file system itself and by way of a
mount, on files that have the same before them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import MIB, ext4, tmpfs
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.faulty_fs import CALLS, ERRORS, LIMIT, faulty_fs
from harness.leaks import unmount_below
from harness.mounts import MountProcess
from kit import fallocate, outcome

pytestmark = pytest.mark.root

CHUNK = 64 << 10


@pytest.fixture(
    scope="module", params=[*((transport, "auto") for transport in ALL_TRANSPORTS), ("unix", "none")], ids="-".join
)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountProcess]:
    """A mount below whose source a test mounts what it needs."""
    transport, cache = request.param
    area = tmp_path_factory.mktemp(f"disks-{transport}-{cache}")
    with EngineProcess(area / "engine", transport).running() as engine:
        mount = MountProcess(engine, engine.share, area / "mnt", f"driver=fuse3,cache={cache}")
        try:
            with mount.running():
                yield mount
        finally:
            unmount_below(str(engine.share))


# ---- file systems


@contextlib.contextmanager
def ext4_on_too_little(point: Path) -> Iterator[Path]:
    """Most of its blocks cannot be written, which shows when pages are written back, after write(2)."""
    with tmpfs(point.with_suffix(".disk")) as disk, ext4(point, disk / "image"):
        yield point


# ---- stories


def fills(top: Path) -> list[object]:
    """Chunk after chunk until no more is taken, and what comes then."""
    fd = os.open(top / "large", os.O_WRONLY | os.O_CREAT, 0o644)
    data = os.urandom(CHUNK)
    told: list[object] = [outcome(os.write, fd, data)]
    while told[-1] == CHUNK:
        told.append(outcome(os.write, fd, data))
    told.append(outcome(os.write, fd, data))
    told += [outcome(fallocate, fd, 0, 0, 64 * MIB), outcome(os.fsync, fd), outcome(os.close, fd)]
    told.append((top / "large").stat().st_size)
    os.truncate(top / "large", CHUNK)
    told.append(outcome((top / "after").write_bytes, data))
    return told


def makes_names(top: Path) -> list[object]:
    """Directories until there are no more inodes, and other names."""
    told: list[object] = []
    while (said := outcome(os.mkdir, top / f"{len(told)}")) is None:
        told.append(said)
    return [
        *told, said, outcome((top / "file").write_bytes, b"x"), outcome(os.symlink, "to", top / "link"),
        outcome(os.rename, top / "0", top / "renamed"), outcome(os.mkdir, top / "last"),
    ]  # fmt: skip


def writes_back_too_much(top: Path) -> list[object]:
    """write(2) is fine; who fsyncs is told, once for each open file."""
    fds = [os.open(top / "file", os.O_RDWR | os.O_CREAT, 0o644) for _ in range(2)]
    told = [outcome(os.pwrite, fds[0], os.urandom(CHUNK), at) for at in range(0, 4 * MIB, CHUNK)]
    told += [outcome(os.fsync, fd) for fd in fds for _ in range(2)]
    return [*told, *(outcome(os.close, fd) for fd in fds)]


def uses(path: Path, in_memory: bool) -> list[object]:
    """Everything that a writer does."""
    fd = os.open(path, os.O_RDWR)
    told: list[object] = [outcome(os.ftruncate, fd, 2 * LIMIT)]
    if in_memory:
        with mmap.mmap(fd, LIMIT) as pages:
            pages[:5] = b"DIRTY"
            told.append(outcome(pages.flush))
    else:
        told += [outcome(os.pwrite, fd, b"x" * size, at) for at, size in ((0, 100), (100, LIMIT), (LIMIT, 100))]
    told += [outcome(call, fd) for call in (os.fsync, os.fsync, os.fdatasync)]
    return [*told, outcome(os.close, fd), outcome(os.truncate, path, 10)]


FileSystem = Callable[[Path], contextlib.AbstractContextManager[Path]]
STORIES: dict[str, tuple[FileSystem, Callable[[Path], list[object]]]] = {
    "tmpfs": (tmpfs, fills),
    "inodes": (tmpfs, makes_names),
    "ext4": (ext4, fills),
    "writeback": (ext4_on_too_little, writes_back_too_much),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_full_disk_is_told_as_on_the_server(mount: MountProcess, name: str) -> None:
    file_system, story = STORIES[name]
    told = []
    for side, top in (("here", mount.engine.share), ("there", mount.point)):
        place = f"{name}-{side}"
        with file_system(mount.engine.share / place):
            told.append(story(top / place))
    here, there = told
    assert there == here
    assert "ENOSPC" in here, "the disk was large enough"


def test_each_call_fails_by_itself(mount: MountProcess) -> None:
    """What a file system says to one call is said to the caller of that call, and of no other; over a quota, too."""
    told: dict[str, dict[tuple[str, bool], list[object]]] = {"here": {}, "there": {}}
    for side, top in (("here", mount.engine.share), ("there", mount.point)):
        with faulty_fs(mount.engine.share / side):
            for name in [f"{call}-{error}" for call in CALLS for error in ERRORS]:
                for in_memory in (False, True):
                    told[side][name, in_memory] = uses(top / side / name, in_memory)
    assert told["there"] == told["here"]
    for (name, in_memory), said in told["here"].items():
        call, _, error = name.partition("-")
        assert error in said or (in_memory and call in ("write", "short")), f"{name} did not fail"
