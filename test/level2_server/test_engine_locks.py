"""POSIX and flock locks: between sessions, between owners of one session, and with processes of the server."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import EngineProcess
from harness.locking import FLOCK, NOBODY_IN_THE_WAY, READ, UNLOCK, WRITE, Opened
from harness.session import Session, is_closed_by_peer
from harness.waiting import wait_until
from harness.wire import END_OF_FILE, Lock

from qtfs_common.protocol import OPERATIONS

#: F_OFD_SETLK of <asm-generic/fcntl.h>, which Python 3.11 does not name.
OFD_SETLK = 37


@pytest.fixture
def file(share: Path) -> Path:
    path = share / "file"
    path.write_bytes(bytes(1000))
    return path


@pytest.fixture
def one(session: Session, file: Path) -> Opened:
    return Opened(session)


@pytest.fixture
def two(engine: EngineProcess, share: Path, file: Path) -> Iterator[Opened]:
    with Session(engine.address, share) as session:
        yield Opened(session)


# ---- POSIX


def test_locks_of_two_sessions_exclude_each_other(one: Opened, two: Opened) -> None:
    assert one.lock(WRITE, 0, 99) == 0
    assert two.lock(WRITE, 99, 200) == errno.EAGAIN
    assert two.lock(READ, 0, 0) == errno.EAGAIN
    assert two.lock(WRITE, 100, 200) == 0
    assert one.lock(UNLOCK, 0, 99) == 0
    assert two.lock(WRITE, 0, 99) == 0


def test_readers_share_and_exclude_writers(one: Opened, two: Opened) -> None:
    assert one.lock(READ) == two.lock(READ) == 0
    assert one.lock(WRITE) == errno.EAGAIN
    assert two.lock(UNLOCK) == 0
    assert one.lock(WRITE) == 0
    assert two.lock(READ) == errno.EAGAIN


def test_getlk_tells_who_is_in_the_way(one: Opened, two: Opened) -> None:
    assert one.look(WRITE).type == NOBODY_IN_THE_WAY
    two.lock(READ, 10, 19)
    assert one.look(READ).type == NOBODY_IN_THE_WAY
    assert one.look(WRITE) == Lock(10, 19, READ, 0)
    assert one.look(WRITE, 0, 9).type == NOBODY_IN_THE_WAY
    two.lock(WRITE, 500)
    assert one.look(READ, 300, 600) == Lock(500, END_OF_FILE, WRITE, 0)
    assert two.look(WRITE).type == NOBODY_IN_THE_WAY, "its own locks are in nobody's way"


def test_unlocking_the_middle_leaves_both_ends(one: Opened, two: Opened) -> None:
    one.lock(WRITE, 0, 99)
    one.lock(UNLOCK, 40, 59)
    assert two.lock(WRITE, 40, 59) == 0
    assert two.lock(WRITE, 39, 39) == two.lock(WRITE, 60, 60) == errno.EAGAIN


def test_owners_of_one_session_exclude_each_other(one: Opened) -> None:
    assert one.lock(WRITE, owner=1) == 0
    assert one.lock(WRITE, owner=2) == errno.EAGAIN
    assert one.look(WRITE, owner=2).type == WRITE
    other_handle = Opened(one.session)
    assert other_handle.lock(READ, owner=1) == 0, "a lock is the owner's, whichever handle it comes by"
    assert one.lock(READ, owner=2) == 0


@pytest.mark.parametrize("end", [lambda o: o.session.flush(o.handle, 1), lambda o: o.lock(UNLOCK)])
def test_closing_any_handle_ends_the_owners_locks(one: Opened, two: Opened, end: Callable[[Opened], object]) -> None:
    one.lock(WRITE, 0, 9, owner=1)
    one.lock(WRITE, 20, 29, owner=1)
    one.lock(WRITE, 40, 49, owner=2)
    end(Opened(one.session))
    assert two.lock(WRITE, 0, 29) == 0
    assert two.lock(WRITE, 40, 49) == errno.EAGAIN


@pytest.mark.parametrize(("start", "end"), [(1 << 63, 1 << 63), (0, 1 << 63), (5, 4), (END_OF_FILE, 0)])
def test_ranges_that_are_none(one: Opened, start: int, end: int) -> None:
    assert one.lock(WRITE, start, end) == errno.EINVAL
    with pytest.raises(OSError, match="Invalid"):
        one.look(WRITE, start, end)


def test_processes_of_the_server_take_part(one: Opened, file: Path) -> None:
    with file.open("r+b") as local:
        fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
        assert one.lock(WRITE) == errno.EAGAIN
        assert one.look(WRITE) == Lock(0, 9, WRITE, os.getpid())
        assert one.lock(WRITE, 10) == 0
        with pytest.raises(BlockingIOError):
            fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
        one.lock(UNLOCK)
        fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)


# ---- flock


def test_flock_locks_are_the_handles(one: Opened, two: Opened) -> None:
    assert one.lock(WRITE, flags=FLOCK) == 0
    assert two.lock(READ, flags=FLOCK) == errno.EAGAIN
    same = Opened(one.session)
    assert same.lock(READ, flags=FLOCK) == errno.EAGAIN
    assert two.lock(WRITE) == 0, "the two kinds do not see each other"
    assert one.lock(READ, flags=FLOCK) == same.lock(READ, flags=FLOCK) == 0
    one.session.release(one.handle, 1)
    assert two.lock(WRITE, flags=FLOCK) == errno.EAGAIN
    same.lock(UNLOCK, flags=FLOCK)
    assert two.lock(WRITE, flags=FLOCK) == 0


def test_flock_with_processes_of_the_server(one: Opened, file: Path) -> None:
    with file.open() as local:
        fcntl.flock(local, fcntl.LOCK_EX)
        assert one.lock(READ, flags=FLOCK) == errno.EAGAIN
        fcntl.flock(local, fcntl.LOCK_UN)
        assert one.lock(WRITE, flags=FLOCK) == 0
        with pytest.raises(BlockingIOError):
            fcntl.flock(local, fcntl.LOCK_SH | fcntl.LOCK_NB)


# ---- waiting


@pytest.mark.parametrize("flags", [0, FLOCK])
def test_a_free_lock_is_granted_at_once(one: Opened, two: Opened, flags: int) -> None:
    one.wait(WRITE, 7, flags=flags)
    assert one.outcome() == (7, 0)
    assert two.lock(WRITE, flags=flags) == errno.EAGAIN


@pytest.mark.parametrize("flags", [0, FLOCK])
def test_a_wait_ends_when_the_lock_is_given_back(one: Opened, two: Opened, flags: int) -> None:
    one.lock(WRITE, flags=flags)
    two.wait(WRITE, 7, flags=flags)
    assert two.is_waiting()
    one.lock(UNLOCK, flags=flags)
    assert two.outcome() == (7, 0)
    assert one.lock(WRITE, flags=flags) == errno.EAGAIN


GIVING_BACK: dict[str, Callable[[Opened], object]] = {
    "unlock a part": lambda o: o.lock(UNLOCK, 0, 10),
    "downgrade": lambda o: o.lock(READ),
    "close": lambda o: o.session.flush(o.handle, 1),
    "end the session": lambda o: o.session.detach(),
}


@pytest.mark.parametrize("how", GIVING_BACK)
def test_every_way_to_give_a_lock_back_ends_waits(one: Opened, two: Opened, how: str) -> None:
    one.lock(WRITE)
    two.wait(READ, 7, 0, 5)
    assert two.is_waiting()
    GIVING_BACK[how](one)
    assert two.outcome() == (7, 0)


def test_a_wait_for_a_process_of_the_server(one: Opened, file: Path) -> None:
    with file.open("r+b") as local:
        fcntl.lockf(local, fcntl.LOCK_EX)
        one.wait(WRITE, 7)
        assert one.is_waiting()
        fcntl.lockf(local, fcntl.LOCK_UN)
        assert one.outcome() == (7, 0)


def test_many_waits_are_granted_one_after_the_other(one: Opened, two: Opened) -> None:
    one.lock(WRITE)
    for owner in range(100, 150):
        two.wait(WRITE, owner, owner=owner)
    assert two.is_waiting()
    one.lock(UNLOCK)
    granted = []
    for _ in range(50):
        tag, error = two.outcome()
        assert error == 0
        granted.append(tag)
        assert two.lock(UNLOCK, owner=tag) == 0
    assert sorted(granted) == list(range(100, 150))


def test_a_wait_does_not_hold_the_channel(one: Opened, two: Opened) -> None:
    """The event channel answers others while one waits."""
    one.lock(WRITE, 0, 9)
    two.wait(WRITE, 1, 0, 9)
    two.wait(WRITE, 2, 10, 19)
    assert two.outcome() == (2, 0)
    assert two.is_waiting()


# ---- interrupts and losses


def test_cancel_ends_a_wait_with_eintr_and_leaves_no_lock(one: Opened, two: Opened) -> None:
    one.lock(WRITE)
    two.wait(WRITE, 7)
    assert two.is_waiting()
    two.session.event().send("CANCEL", tag=7)
    assert two.outcome() == (7, errno.EINTR)
    one.lock(UNLOCK)
    assert one.look(WRITE).type == NOBODY_IN_THE_WAY


def test_cancel_is_for_one_wait_of_its_own_session(one: Opened, two: Opened) -> None:
    one.lock(WRITE)
    two.wait(WRITE, 7, owner=7)
    two.wait(WRITE, 8, owner=8)
    one.session.event().send("CANCEL", tag=7)
    two.session.event().send("CANCEL", tag=9)
    assert two.is_waiting()
    two.session.event().send("CANCEL", tag=8)
    assert two.outcome() == (8, errno.EINTR)
    one.lock(UNLOCK)
    assert two.outcome() == (7, 0)


def test_cancel_after_the_grant_changes_nothing(one: Opened, two: Opened) -> None:
    one.wait(WRITE, 7)
    assert one.outcome() == (7, 0)
    one.session.event().send("CANCEL", tag=7)
    assert one.is_waiting()
    assert two.lock(WRITE) == errno.EAGAIN


def test_a_lost_event_channel_loses_replies_but_no_locks(one: Opened, two: Opened) -> None:
    """The client asks again over a fresh channel: granted meanwhile or not, it gets one answer."""
    one.lock(WRITE)
    two.wait(WRITE, 7)
    assert two.is_waiting()
    two.session.lose_event()
    two.wait(WRITE, 7)
    assert two.is_waiting()
    one.lock(UNLOCK)
    assert two.outcome() == (7, 0)
    assert two.is_waiting(), "no second answer"
    two.session.lose_event()
    two.wait(WRITE, 7)
    assert two.outcome() == (7, 0), "who holds the lock already gets it again"


def test_asking_twice_is_waiting_once(one: Opened, two: Opened) -> None:
    """What was asked for twice must not be granted after it was cancelled."""
    one.lock(WRITE)
    two.wait(WRITE, 7)
    two.session.lose_event()
    two.wait(WRITE, 7)
    two.session.event().send("CANCEL", tag=7)
    assert two.outcome() == (7, errno.EINTR)
    one.lock(UNLOCK)
    two.session.event().ask("PING")
    assert one.look(WRITE).type == NOBODY_IN_THE_WAY
    assert one.lock(WRITE) == 0


def test_asking_twice_holds_the_file_once(one: Opened, two: Opened, engine: EngineProcess) -> None:
    """It is closed when it is released, as often as its wait was asked for again."""
    handles = sum(session["handles"] for session in engine.figures()["sessions"])
    one.lock(WRITE)
    two.wait(WRITE, 7)
    for _ in range(3):
        two.session.lose_event()
        two.wait(WRITE, 7)
    two.session.event().ask("PING")
    two.session.release(two.handle)
    assert two.outcome() == (7, errno.EINTR)
    assert sum(session["handles"] for session in engine.figures()["sessions"]) == handles - 1


def test_a_wait_ends_with_its_handle(one: Opened, two: Opened) -> None:
    one.lock(WRITE)
    two.wait(WRITE, 7)
    assert two.is_waiting()
    two.session.release(two.handle)
    assert two.outcome() == (7, errno.EINTR)
    one.lock(UNLOCK)
    assert one.look(WRITE).type == NOBODY_IN_THE_WAY


def test_waits_end_with_their_session(one: Opened, two: Opened, engine: EngineProcess) -> None:
    one.lock(WRITE)
    two.wait(WRITE, 7)
    assert two.is_waiting()
    two.session.detach()
    wait_until(lambda: len(engine.figures()["sessions"]) == 1, "the session to end")
    one.lock(UNLOCK)
    assert one.look(WRITE).type == NOBODY_IN_THE_WAY


def test_setlkw_belongs_on_the_event_channel(one: Opened) -> None:
    """It might wait, and a slot has a worker and a thread of the client waiting with it."""
    connection, last = one.session.engine.attach(one.session.ticket, 1)
    with socket.socket(fileno=connection.detach()) as sock:
        sock.sendall(wire.message(OPERATIONS["SETLKW"], one.wait_body(WRITE), slot=1, sequence=last + 1))
        assert is_closed_by_peer(sock)
    assert one.look(WRITE, owner=5).type == NOBODY_IN_THE_WAY


def test_the_locks_of_a_client_that_vanished_end_with_its_grace(tmp_path: Path) -> None:
    """It may come back while the grace lasts, and keeps its locks so long."""
    with EngineProcess(tmp_path, arguments=("--grace", "0.1")).running() as engine:
        (engine.share / "file").touch()
        vanished, other = Session(engine.address, engine.share), Session(engine.address, engine.share)
        gone, waiting = Opened(vanished), Opened(other)
        assert gone.lock(WRITE) == 0 and gone.lock(WRITE, flags=FLOCK) == 0
        waiting.wait(WRITE, 1)
        waiting.wait(WRITE, 2, flags=FLOCK)
        assert waiting.is_waiting()
        vanished.disconnect()
        assert sorted((waiting.outcome(), waiting.outcome())) == [(1, 0), (2, 0)]
        other.detach()
        wait_until(engine.is_idle, "the engine to let everything go")


def test_local_locks_of_an_open_file_description(one: Opened, file: Path) -> None:
    """F_OFD_SETLK of a local process conflicts as well; Linux gives it no pid."""
    with file.open("r+b") as local:
        fcntl.fcntl(local, OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        assert one.lock(WRITE) == errno.EAGAIN
        assert one.look(WRITE) == Lock(0, END_OF_FILE, WRITE, 0)
