"""Locks that processes of the server hold: the engine queues for them as a local process does, and never too long."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.locking import FLOCK, NOBODY_IN_THE_WAY, READ, UNLOCK, WRITE, Opened
from harness.session import Session
from harness.waiting import wait_until


@pytest.fixture
def file(share: Path) -> Path:
    path = share / "file"
    path.touch()
    return path


@pytest.fixture
def one(session: Session, file: Path) -> Opened:
    return Opened(session)


@contextmanager
def locally_locked(file: Path, flags: int = 0) -> Iterator[None]:
    with file.open("r+b") as local:
        (fcntl.flock if flags & FLOCK else fcntl.lockf)(local, fcntl.LOCK_EX)
        yield


def in_the_kernel(file: Path, queued: bool) -> list[str]:
    """Locks of a file that are held, or waited for: proc_locks(5)."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    wanted = f":{file.stat().st_ino}"
    return [" ".join(words) for words in lines if ("->" in words) == queued and any(w.endswith(wanted) for w in words)]


def until_queued(file: Path) -> None:
    wait_until(lambda: in_the_kernel(file, True), "the engine to queue")


def until_not_queued(file: Path) -> None:
    wait_until(lambda: not in_the_kernel(file, True), "the engine to queue no more")


@pytest.mark.parametrize("flags", [0, FLOCK])
def test_it_is_granted_what_it_has_queued_for(one: Opened, file: Path, flags: int) -> None:
    with locally_locked(file, flags):
        one.wait(WRITE, 7, flags=flags)
        until_queued(file)
        assert one.is_waiting()
    assert one.outcome() == (7, 0)
    assert len(in_the_kernel(file, False)) == 1
    assert one.lock(UNLOCK, flags=flags) == 0
    assert not in_the_kernel(file, False)


def test_only_the_range_that_was_asked_for(one: Opened, file: Path) -> None:
    with locally_locked(file):
        one.wait(READ, 7, 10, 19)
        until_queued(file)
    assert one.outcome() == (7, 0)
    assert one.lock(WRITE, 0, 9, owner=2) == one.lock(WRITE, 20, 29, owner=2) == one.lock(READ, 10, 19, owner=2) == 0
    assert one.lock(WRITE, 10, 10, owner=2) == errno.EAGAIN


def test_an_owner_that_holds_something_already(one: Opened, file: Path) -> None:
    assert one.lock(WRITE, 100, 199) == 0
    with file.open("r+b") as local:
        fcntl.lockf(local, fcntl.LOCK_EX, 10, 0)
        one.wait(WRITE, 7, 0, 9)
        until_queued(file)
    assert one.outcome() == (7, 0)
    assert one.lock(UNLOCK, 0, 9) == 0
    assert one.lock(WRITE, 0, 99, owner=2) == 0
    assert one.lock(WRITE, 100, 100, owner=2) == errno.EAGAIN


@pytest.mark.parametrize("flags", [0, FLOCK])
def test_many_wait_and_one_queues(one: Opened, file: Path, flags: int) -> None:
    handles = {tag: one.session.open(one.node, 2).handle for tag in range(1, 21)}
    with locally_locked(file, flags):
        for one.handle in handles.values():
            one.wait(WRITE, tag := next(t for t, h in handles.items() if h == one.handle), owner=tag, flags=flags)
        until_queued(file)
        assert len(in_the_kernel(file, True)) == 1
    granted = []
    for _ in handles:
        tag, error = one.outcome()
        assert error == 0
        granted.append(tag)
        one.handle = handles[tag]
        assert one.lock(UNLOCK, owner=tag, flags=flags) == 0
    if flags & FLOCK:
        granted.sort()  # the local process may unlock while the waits are tried one after the other
    assert granted == list(handles)


@pytest.mark.parametrize("flags", [0, FLOCK])
@pytest.mark.parametrize("end", ["cancel", "release", "detach"])
def test_nobody_queues_for_a_wait_that_has_ended(
    engine: EngineProcess, share: Path, one: Opened, file: Path, end: str, flags: int
) -> None:
    with Session(engine.address, share) as other, locally_locked(file, flags):
        waiting = Opened(other)
        waiting.wait(WRITE, 7, flags=flags)
        until_queued(file)
        if end == "cancel":
            other.event().send("CANCEL", tag=7)
            assert waiting.outcome() == (7, errno.EINTR)
        elif end == "release":
            other.release(waiting.handle)
            assert waiting.outcome() == (7, errno.EINTR)
        else:
            other.detach()
        until_not_queued(file)
    assert one.lock(WRITE, flags=flags) == 0
    assert len(in_the_kernel(file, False)) == 1


def test_more_files_than_threads_that_queue(engine: EngineProcess, share: Path, session: Session) -> None:
    """The others are polled."""
    files = [share / f"file-{number}" for number in range(20)]
    for path in files:
        path.touch()
    local = [path.open("r+b") for path in files]
    for each in local:
        fcntl.lockf(each, fcntl.LOCK_EX)
    opened = [Opened(session, path.name) for path in files]
    for number, each in enumerate(opened):
        each.wait(WRITE, number + 1)
    wait_until(lambda: sum(len(in_the_kernel(path, True)) for path in files) == 4, "four files to be queued for")
    for number in reversed(range(len(files))):
        local[number].close()
        assert opened[number].outcome() == (number + 1, 0)


@pytest.mark.parametrize("flags", [0, FLOCK])
def test_an_engine_that_queues_can_be_stopped(tmp_path: Path, flags: int) -> None:
    with EngineProcess(tmp_path).running() as engine:
        file = engine.share / "file"
        file.touch()
        with Session(engine.address, engine.share) as session, locally_locked(file, flags):
            one = Opened(session)
            one.wait(WRITE, 7, flags=flags)
            until_queued(file)
            engine.stop()
            assert not in_the_kernel(file, True)


def test_a_deadlock_behind_a_queue_is_found(one: Opened, file: Path) -> None:
    with file.open("r+b") as local:
        fcntl.lockf(local, fcntl.LOCK_EX, 1, 0)
        assert one.lock(WRITE, 1, 1, owner=1) == one.lock(WRITE, 2, 2, owner=2) == 0
        one.wait(WRITE, 21, 0, 1, owner=2)
        one.wait(WRITE, 11, 2, 2, owner=1)
        assert one.outcome() == (11, errno.EDEADLK)
    assert one.lock(UNLOCK, 1, 1, owner=1) == 0
    assert one.outcome() == (21, 0)
    assert one.look(WRITE, owner=2).type == NOBODY_IN_THE_WAY
