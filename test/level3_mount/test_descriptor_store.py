"""systemd's file descriptor store: what has no name any more survives an engine that is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import outcome
from pairs import Pair, mounted

pytestmark = pytest.mark.root

MOST = 16


@pytest.fixture(params=ALL_TRANSPORTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with mounted(tmp_path, request.param, kept=MOST) as made:
        yield made


def wait_for_kept(pair: Pair, count: int) -> None:
    wait_until(lambda: len(pair.engine.kept()) == count, f"{count} descriptors to be kept")


def _unlink(pair: Pair) -> None:
    (pair.there / "f").unlink()


def _rename_over(pair: Pair) -> None:
    (pair.there / "other").touch()
    (pair.there / "other").rename(pair.there / "f")


@pytest.mark.parametrize("remove", [_unlink, _rename_over])
def test_an_open_file_that_lost_its_name(pair: Pair, remove: object) -> None:
    with (pair.there / "f").open("w+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(b"before ")
        remove(pair)  # type: ignore[operator]
        wait_for_kept(pair, 1)
        for _ in range(2):
            pair.replace_engine()
            file.write(b"after ")
        assert os.pread(file.fileno(), 100, 0) == b"before after after "
        assert os.fstat(file.fileno()).st_nlink == 0
        assert len(pair.engine.kept()) == 1
    wait_for_kept(pair, 0)


def test_a_file_that_never_had_one(pair: Pair) -> None:
    nameless = os.open(pair.there, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.write(nameless, b"before ")
        wait_for_kept(pair, 1)
        pair.replace_engine()
        os.write(nameless, b"after")
        assert os.pread(nameless, 100, 0) == b"before after"
    finally:
        os.close(nameless)
    wait_for_kept(pair, 0)


def test_a_directory_that_was_removed(pair: Pair) -> None:
    (pair.there / "d").mkdir()
    directory = os.open(pair.there / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (pair.there / "d").rmdir()
        wait_for_kept(pair, 1)
        pair.replace_engine()
        assert os.listdir(directory) == []
        assert os.fstat(directory).st_nlink == 0
    finally:
        os.close(directory)
    wait_for_kept(pair, 0)


def test_another_mount_removes_it(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix", kept=MOST) as pair:
        other = MountProcess(pair.engine, pair.here, tmp_path / "other")
        with other.running(), (pair.there / "f").open("w+b", buffering=0) as file:
            file.write(b"before ")
            (other.point / "f").unlink()
            wait_for_kept(pair, 1)
            pair.replace_engine()
            file.write(b"after")
            assert os.pread(file.fileno(), 100, 0) == b"before after"


def test_what_has_a_name_is_not_kept(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix", kept=MOST) as pair, contextlib.ExitStack() as stack:
        for name in ("f", "last"):
            stack.enter_context((pair.there / name).open("xb"))
        os.link(pair.there / "f", pair.there / "g")
        (pair.there / "f").unlink()
        (pair.there / "last").unlink()
        wait_for_kept(pair, 1)


def test_no_more_than_allowed(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix", kept=MOST) as pair, contextlib.ExitStack() as stack:
        files = [stack.enter_context((pair.there / f"{n}").open("w+b", buffering=0)) for n in range(MOST + 4)]
        for number, file in enumerate(files):
            file.write(b"%d" % number)
            (pair.there / f"{number}").unlink()
        wait_until(lambda: "keeps no more than 16" in pair.engine.log(), "the engine to complain")
        assert len(pair.engine.kept()) == MOST
        pair.replace_engine()
        found = [outcome(os.pread, file.fileno(), 10, 0) for file in files]
        good = [text for number, text in enumerate(found) if text == b"%d" % number]
        assert len(good) == MOST
        assert {text for text in found if isinstance(text, str)} <= {"EIO", "ESTALE"}


def test_sigterm_and_start_keep_fifos_as_well(pair: Pair) -> None:
    os.mkfifo(pair.here / "fifo")
    (pair.here / "gone").touch()
    fifo = os.open(pair.there / "fifo", os.O_RDWR)
    try:
        with (pair.there / "gone").open("r+b", buffering=0) as gone:
            (pair.here / "gone").unlink()
            gone.write(b"before ")
            os.write(fifo, b"before ")
            pair.engine.stop()
            pair.engine.start()
            gone.write(b"after")
            os.write(fifo, b"after")
            assert os.pread(gone.fileno(), 100, 0) == b"before after"
            assert os.read(fifo, 100) == b"before after"
            wait_for_kept(pair, 1)
    finally:
        os.close(fifo)


def test_an_upgrade_goes_on_with_the_store(pair: Pair) -> None:
    with (pair.there / "f").open("w+b", buffering=0) as file:
        (pair.there / "f").unlink()
        wait_for_kept(pair, 1)
        pair.engine.upgrade()
        file.write(b"before ")
        pair.replace_engine()
        file.write(b"after")
        assert os.pread(file.fileno(), 100, 0) == b"before after"
    wait_for_kept(pair, 0)


def test_what_belongs_to_nobody_is_given_back(tmp_path: Path) -> None:
    """The session has gone for good, and so has the file."""
    with mounted(tmp_path, "unix", kept=MOST) as pair:
        file = os.open(pair.there / "f", os.O_CREAT | os.O_RDWR)
        (pair.there / "f").unlink()
        wait_for_kept(pair, 1)
        pair.engine.kill()
        pair.engine.forget_sessions()
        pair.engine.start()
        wait_for_kept(pair, 0)
        outcome(os.close, file)
