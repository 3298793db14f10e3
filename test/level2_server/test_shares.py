"""What one client takes, others do not feel: descriptors, locks, waits, nodes, workers. And many clients at once."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.session import Session, attach_stream
from harness.waiting import wait_until
from harness.wire import HEADER_BYTES, ROOT

from qtfs_common.protocol import OPERATIONS

DESCRIPTORS = 512
CLIENTS, SLOTS = 200, 16
GETATTR = struct.pack("<QII", 0, 0, 0)
SHARED, EXCLUSIVE = 0, 1
#: Of one session: half of 65,536, shares.pyx.
MOST_WAITS = 1 << 15


@pytest.fixture
def small_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine with few descriptors."""
    with EngineProcess(tmp_path, limits=[f"--nofile={DESCRIPTORS}"]).running() as engine:
        (engine.share / "f").write_text("f")
        yield engine
        wait_until(engine.is_idle, "the engine to be idle")


def open_until_refused(session: Session, node: int) -> int:
    """How many times a file can be opened; the refusal must be ENFILE."""
    for count in range(DESCRIPTORS):
        try:
            session.open(node)
        except OSError as error:
            assert error.errno == errno.ENFILE
            return count
    raise AssertionError("nothing was refused")


def test_a_greedy_client_leaves_descriptors_for_others(small_engine: EngineProcess) -> None:
    with Session(small_engine.address, small_engine.share) as greedy:
        most = open_until_refused(greedy, greedy.lookup(ROOT, b"f").node)
        assert DESCRIPTORS // 8 < most < DESCRIPTORS // 2
        with Session(small_engine.address, small_engine.share) as second:
            assert DESCRIPTORS // 32 < open_until_refused(second, second.lookup(ROOT, b"f").node) < most
            with Session(small_engine.address, small_engine.share) as other:
                node = other.lookup(ROOT, b"f").node
                handles = [other.open(node).handle for _ in range(8)]
                assert {other.read(handle, 0, 1) for handle in handles} == {b"f"}


def test_locks_in_many_names_are_refused_before_descriptors_run_out(small_engine: EngineProcess) -> None:
    """Each owner has a descriptor of its own."""
    with (
        Session(small_engine.address, small_engine.share) as greedy,
        Session(small_engine.address, small_engine.share) as other,
    ):
        handle = greedy.open(greedy.lookup(ROOT, b"f").node).handle
        outcomes = [
            greedy.ask("SETLK", greedy.lock_body(handle, owner, SHARED)).error for owner in range(1, DESCRIPTORS)
        ]
        assert outcomes[0] == 0
        assert outcomes[-1] == errno.ENOLCK
        assert other.open(other.lookup(ROOT, b"f").node).handle


def test_unlinked_files_that_a_client_does_not_forget(small_engine: EngineProcess) -> None:
    """Their descriptors are all that keeps them: those that nobody has open go, when they are too many."""
    with (
        Session(small_engine.address, small_engine.share) as greedy,
        Session(small_engine.address, small_engine.share) as other,
    ):
        kept = greedy.open(greedy.mknod(ROOT, b"kept", 0o100644).node, os.O_RDWR).handle
        greedy.unlink(ROOT, b"kept")
        nodes = []
        for i in range(2 * DESCRIPTORS):
            nodes.append(greedy.mknod(ROOT, b"u%d" % i, 0o100644).node)
            greedy.unlink(ROOT, b"u%d" % i)
        assert greedy.getattr(nodes[-1]).nlink == 0
        with pytest.raises(OSError, match="Stale"):
            for node in nodes:
                greedy.getattr(node)
        assert greedy.write(kept, 0, b"still there") == 11
        assert other.open(other.lookup(ROOT, b"f").node).handle


def test_limits_of_a_session(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, arguments=["--max-nodes", "1024", "--max-handles", "16"]).running() as engine:
        for i in range(1100):
            (engine.share / f"f{i}").touch()
        with Session(engine.address, engine.share) as greedy, Session(engine.address, engine.share) as other:
            found = [greedy.lookup(ROOT, b"f%d" % i).node for i in range(1023)]
            with pytest.raises(OSError) as refused:
                greedy.lookup(ROOT, b"f1050")
            assert refused.value.errno == errno.ENFILE
            assert open_until_refused(greedy, found[0]) == 16
            assert other.open(other.lookup(ROOT, b"f1050").node).handle
            greedy.forget((found[1], 1))
            assert greedy.lookup(ROOT, b"f1050").node


@pytest.mark.parametrize("call", ["CREATE", "CREATE of what is there", "TMPFILE"])
def test_a_file_that_is_refused_when_it_is_there_leaves_no_node(tmp_path: Path, call: str) -> None:
    """Its lookup was counted already, and its client never learns of it."""
    with (
        EngineProcess(tmp_path, arguments=["--max-handles", "16"]).running() as engine,
        Session(engine.address, engine.share) as session,
    ):
        (engine.share / "there").touch()
        for number in range(16):
            session.create(ROOT, b"open%d" % number)
        before, descriptors = engine.figures()["sessions"][0], engine.descriptors()
        for number in range(10):
            with pytest.raises(OSError) as refused:
                if call == "TMPFILE":
                    session.tmpfile(ROOT)
                else:
                    session.create(ROOT, b"there" if call != "CREATE" else b"new%d" % number)
            assert refused.value.errno == errno.ENFILE
        after = engine.figures()["sessions"][0]
        assert [after[key] - before[key] for key in ("nodes", "lookups", "handles")] == [0, 0, 0]
        assert not [*engine.share.glob("new*")]
        wait_until(lambda: engine.descriptors() <= descriptors, "the descriptors to be closed")


def test_nothing_is_made_for_whom_there_is_no_room(tmp_path: Path) -> None:
    """ENFILE is all that comes of it, as on a file system of the server's own."""
    with EngineProcess(tmp_path, arguments=["--max-nodes", "1024"]).running() as engine:
        for i in range(1023):
            (engine.share / f"f{i}").touch()
        with Session(engine.address, engine.share) as greedy:
            nodes = [greedy.lookup(ROOT, b"f%d" % i).node for i in range(1023)]
            makers: list[Callable[[bytes], object]] = [
                lambda name: greedy.mkdir(ROOT, name),
                lambda name: greedy.mknod(ROOT, name, 0o10644),
                lambda name: greedy.symlink(ROOT, name, b"to"),
                lambda name: greedy.create(ROOT, name),
            ]
            for make in makers:
                with pytest.raises(OSError) as refused:
                    make(b"new")
                assert refused.value.errno == errno.ENFILE
                assert not os.path.lexists(engine.share / "new")
                greedy.forget((nodes.pop(), 1))
                make(b"new")
                (engine.share / "made").mkdir(exist_ok=True)
                (engine.share / "new").rename(engine.share / "made" / str(len(nodes)))
        assert len([*(engine.share / "made").iterdir()]) == len(makers)


def waiting_locks(engine: EngineProcess) -> list[int]:
    return sorted(session["waiting_locks"] for session in engine.figures()["sessions"])


def test_a_client_may_wait_for_half_of_all_locks_that_can_be_awaited(tmp_path: Path) -> None:
    """What comes beyond is refused, and others may wait still."""
    with EngineProcess(tmp_path).running() as engine:
        (engine.share / "f").touch()
        sessions = [Session(engine.address, engine.share) for _ in range(3)]
        holder, greedy, other = sessions
        handles = [session.open(session.lookup(ROOT, b"f").node, os.O_RDWR).handle for session in sessions]
        holder.setlk(handles[0], 1, EXCLUSIVE)
        for owner in range(1, MOST_WAITS + 2):
            body = wire.caller(ROOT) + greedy.lock_body(handles[1], owner, EXCLUSIVE)
            greedy.event().send("SETLKW", body, owner)
        refused = greedy.event().receive()
        assert (refused.tag, refused.error) == (MOST_WAITS + 1, errno.ENOLCK)
        assert waiting_locks(engine) == [0, 0, MOST_WAITS]
        other.event().send("SETLKW", wire.caller(ROOT) + other.lock_body(handles[2], 1, EXCLUSIVE), 1)
        wait_until(lambda: waiting_locks(engine) == [0, 1, MOST_WAITS], "another client's wait")
        for session in (greedy, holder):
            session.detach()
        assert other.event().receive().error == 0
        other.detach()
        wait_until(engine.is_idle, "the engine to be idle")


def burst(session: Session, count: int) -> bytes:
    """So many requests of slot 1, one behind the other."""
    body = wire.caller(ROOT, session.who) + GETATTR
    return b"".join(
        wire.message(OPERATIONS["GETATTR"], body, slot=1, sequence=sequence) for sequence in range(1, count + 1)
    )


def test_clients_that_never_pause_starve_nobody(tmp_path: Path) -> None:
    """As many as there are workers send a hundred thousand requests without a pause."""
    count, workers = 50000, 2
    with EngineProcess(tmp_path, workers=workers).running() as engine, Session(engine.address, engine.share) as other:

        def hammer(data: bytes, session: Session) -> None:
            with attach_stream(session.address, session.ticket, 1) as sock:
                sending = threading.Thread(target=sock.sendall, args=(data,))
                sending.start()
                left = count * (HEADER_BYTES + 104)
                while left > 0:
                    left -= len(sock.recv(1 << 20))
                sending.join()

        def executed() -> int:
            return int(engine.figures()["requests"].get("GETATTR", 0))

        sessions = [Session(engine.address, engine.share) for _ in range(workers)]
        threads = [threading.Thread(target=hammer, args=(burst(s, count), s)) for s in sessions]
        for thread in threads:
            thread.start()
        wait_until(lambda: executed() > 1000, "the burst to begin")
        for _ in range(10):
            other.statfs()
        assert executed() < workers * count // 2
        for thread in threads:
            thread.join()
        for session in sessions:
            session.detach()


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_two_hundred_clients_with_sixteen_channels_each(tmp_path: Path, transport: str) -> None:
    layout = ("--bar-layout", f"channels={CLIENTS * SLOTS},request=144K,reply=144K") if transport == "shm" else ()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sessions: list[Session] = []
    try:
        # The engine is started with a low limit, and raises it as far as it may.
        limits = ["--nofile=1024:8192"]
        with EngineProcess(tmp_path, transport, workers=16, limits=limits, arguments=layout).running() as engine:
            for i in range(CLIENTS):
                sessions.append(Session(engine.address, engine.share, slots=SLOTS))
                sessions[-1].mkdir(ROOT, b"%d" % i)
            for slot in range(SLOTS):
                for session in sessions:
                    session.slot(slot).send("GETATTR", wire.caller(ROOT, session.who) + GETATTR)
            for slot in range(SLOTS):
                assert all(session.slot(slot).receive().error == 0 for session in sessions)
            assert engine.figures()["connections"] == CLIENTS * SLOTS
            assert len(os.listdir(engine.share)) == CLIENTS
            for session in sessions:
                session.detach()
            wait_until(engine.is_idle, "the engine to be idle")
    finally:
        for session in sessions:
            session.disconnect()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
