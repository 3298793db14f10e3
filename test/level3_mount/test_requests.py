"""What a mount asks of the server: work that belongs there is done there, and durability is the server's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import syncfs
from places import Place

pytestmark = pytest.mark.root


def requests(engine: EngineProcess) -> dict[str, int]:
    found: dict[str, int] = engine.figures()["requests"]
    return found


@contextmanager
def asked(place: Place) -> Iterator[dict[str, int]]:
    """Filled at the end of the body with how many requests of each operation it took."""
    before = requests(place.engine)
    counts: dict[str, int] = {}
    yield counts
    after = requests(place.engine)
    counts.update({op: count - before.get(op, 0) for op, count in after.items() if count != before.get(op, 0)})


@pytest.fixture
def fd(place: Place) -> Iterator[int]:
    (place.here / "f").write_bytes(b"x" * (1 << 20))
    opened = os.open(place.there / "f", os.O_RDWR)
    yield opened
    os.close(opened)


@pytest.mark.parametrize(("call", "op"), [(os.fsync, "FSYNC"), (os.fdatasync, "FSYNC")])
def test_a_sync_returns_when_the_server_has_synced(place: Place, fd: int, call: Callable[[int], None], op: str) -> None:
    with asked(place) as counts:
        os.write(fd, b"data")
        call(fd)
    assert counts["WRITE"] >= 1 and counts[op] == 1


def test_a_directory_is_synced_too(place: Place) -> None:
    directory = os.open(place.there, os.O_RDONLY)
    with asked(place) as counts:
        os.fsync(directory)
    os.close(directory)
    assert counts["FSYNCDIR"] == 1


def test_written_data_is_on_the_server_once_the_file_is_closed(place: Place) -> None:
    (place.there / "new").write_bytes(b"y" * 300_000)
    assert (place.here / "new").read_bytes() == b"y" * 300_000


def test_written_data_is_on_the_server_at_once(place: Place, fd: int) -> None:
    """There is no write-back cache: what write(2) has accepted another client can read."""
    os.pwrite(fd, b"now", 100)
    with (place.here / "f").open("rb") as file:
        assert os.pread(file.fileno(), 3, 100) == b"now"


def test_who_reads_in_sequence_is_read_ahead_of(place: Place, fd: int) -> None:
    """In requests of half a MiB. libfuse 2 agrees on the kernel's 128 KiB, of which 1 MiB takes eight."""
    with asked(place) as counts:
        assert len(os.read(fd, 1 << 20)) == 1 << 20
    assert counts["READ"] <= (4 if place.kind.driver == "fuse3" else 8)


def test_copies_do_not_cross_the_wire(place: Place, fd: int) -> None:
    target = os.open(place.there / "copy", os.O_RDWR | os.O_CREAT, 0o644)
    with asked(place) as counts:
        copied = os.copy_file_range(fd, target, 1 << 20, 0, 0)
    os.close(target)
    assert copied == 1 << 20 and (place.here / "copy").read_bytes() == b"x" * (1 << 20)
    if place.kind.driver == "fuse3":
        assert counts.get("COPY_FILE_RANGE") == 1 and not {"READ", "WRITE"} & set(counts)


def test_syncfs_reaches_the_server_or_is_documented_not_to(place: Place, fd: int) -> None:
    """Linux sends no SYNCFS for FUSE mounts other than virtiofs; data is written through already."""
    os.pwrite(fd, b"end", 0)
    assert syncfs(fd) == 0
    with (place.here / "f").open("rb") as file:
        assert file.read(3) == b"end"


def _has_size(path: Path, size: int) -> bool:
    return path.stat().st_size == size


def test_what_the_server_changes_is_seen_at_once_or_after_a_second(place: Place) -> None:
    """With cache=none every look asks; otherwise names and attributes are believed for a second."""
    patience_s = 0.0 if place.kind.cache == "none" else 3.0
    (place.here / "f").write_text("one")
    for text in ("two", "three", "fourteen"):
        (place.here / "f").write_text(text)
        seen = partial(_has_size, place.there / "f", len(text))
        wait_until(seen, "the new size", patience_s)
        assert (place.there / "f").read_text() == text
    os.rename(place.here / "f", place.here / "g")
    assert os.listdir(place.there) == ["g"]
    wait_until(lambda: not (place.there / "f").exists(), "the old name to vanish", patience_s)


def test_a_mount_that_ends_at_once_leaves_no_session(place: Place, tmp_path: Path) -> None:
    """Not even for the grace time: the engine is told, whatever channels there were by then."""
    before = len(place.engine.figures()["sessions"])
    options = f"driver={place.kind.driver},cache={place.kind.cache}"
    for number in range(5):
        with MountProcess(place.engine, place.here, tmp_path / str(number), options).running():
            pass
        assert len(place.engine.figures()["sessions"]) == before


def test_a_second_mount_of_the_same_engine_is_another_session(
    place: Place, tmp_path: Path, mount: tuple[object, MountProcess]
) -> None:
    """Each ends by itself and leaves the other alone."""
    before = len(place.engine.figures()["sessions"])
    options = f"driver={place.kind.driver},cache={place.kind.cache}"
    with MountProcess(place.engine, place.here, tmp_path / "second", options).running() as second:
        (second.point / "from-second").write_text("x")
        assert len(place.engine.figures()["sessions"]) == before + 1
        assert (place.here / "from-second").read_text() == "x"
    assert (place.there / "from-second").read_text() == "x"
