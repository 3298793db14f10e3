"""What passes from an engine to the next that lies in no table, and sockets that are never closed in between."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.session import Session
from harness.streams import answer, later, read_body
from harness.wire import ROOT

from qtfs_common.addresses import ShmAddress, UnixAddress, connect_socket
from qtfs_common.rings.shared import bell_path
from qtfs_common.rundir import socket_path


@pytest.fixture(params=ALL_TRANSPORTS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path / "engine", request.param, arguments=("--grace", "30")).running() as running:
        yield running


def open_fifo(session: Session, path: Path) -> int:
    os.mkfifo(path)
    return session.open(session.lookup(ROOT, os.fsencode(path.name)).node, os.O_RDWR | os.O_NONBLOCK).handle


def write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, data)
    os.close(fd)


@pytest.mark.parametrize("size", [100, 5000], ids=["short", "long"])
def test_a_reply_is_said_again(engine: EngineProcess, size: int) -> None:
    """What was read from a FIFO is gone from there; a long reply is kept in memory only."""
    path, data = engine.share / "fifo", os.urandom(size)
    with Session(engine.address, engine.share) as session:
        handle = open_fifo(session, path)
        write(path, data)
        reply = session.ask("READ", read_body(handle))
        assert reply.body == data
        for _ in range(2):
            sequence = session.slot().sequence
            engine.upgrade()
            again = session.reattach()
            assert again.sequence == sequence
            again.sequence -= 1
            assert session.ask("READ", read_body(handle)) == reply
        write(path, b"fresh")
        assert session.call("READ", read_body(handle)) == b"fresh"


def test_unconfirmed_events_come_again(engine: EngineProcess) -> None:
    """In order, with their numbers, and those that follow are numbered on."""
    path = engine.share / "fifo"
    with Session(engine.address, engine.share) as session:
        handle = open_fifo(session, path)
        session.event().confirms = False
        said = []
        for tag in (5, 6):
            later(session, "READ", read_body(handle), tag)
            write(path, b"%d" % tag * 1000)
            said.append(answer(session, "READ", tag))
        engine.upgrade()
        session.lose_event()
        session.reattach()
        session.event().confirms = False
        # The client asks again for what it has not confirmed to have.
        again = []
        for tag in (5, 6):
            again.append(answer(session, "READ", tag))
            later(session, "READ", read_body(handle), tag)
        assert again == said
        session.event().confirms = True
        later(session, "READ", read_body(handle), 7)
        write(path, b"fresh")
        fresh = answer(session, "READ", 7)
        assert fresh.body == b"fresh"
        assert fresh.sequence == said[-1].sequence + 1


def test_no_connect_is_refused(engine: EngineProcess) -> None:
    """Nor does anybody find the socket gone."""
    address = engine.address
    where = UnixAddress(bell_path(address)) if isinstance(address, ShmAddress) else address
    over = threading.Event()
    refused: list[OSError] = []
    count = [0]

    def connect() -> None:
        while not over.is_set():
            try:
                connect_socket(where, 5).close()
                count[0] += 1
            except OSError as error:
                refused.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        for _ in range(4):
            engine.upgrade()
    finally:
        over.set()
        thread.join()
    assert not refused
    assert count[0] > 4


def test_the_control_socket_answers_throughout(engine: EngineProcess) -> None:
    pids = set()
    over = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        while not over.is_set():
            try:
                pids.add(engine.figures()["pid"])
            except (OSError, ValueError) as error:
                failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(4):
            engine.upgrade()
    finally:
        over.set()
        thread.join()
    # An answer that the old one had begun ends with it.
    assert not [error for error in failures if isinstance(error, OSError) and not isinstance(error, ConnectionError)]
    assert not [error for error in failures if isinstance(error, ConnectionRefusedError)]
    assert len(pids) >= 4


def test_somebody_who_says_nothing_changes_nothing(engine: EngineProcess) -> None:
    """Nor does one who says nonsense."""
    [path] = engine.run_dir.glob("upgrade-*.sock")
    pid = engine.pid
    for words in (b"", b"nonsense", b"[]", b'{"upgrade": 1}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, socket_path(path) as short:
            sock.connect(short)
            if words:
                sock.send(words)
    with Session(engine.address, engine.share) as session:
        session.mkdir(ROOT, b"made")
    assert engine.figures()["pid"] == pid
