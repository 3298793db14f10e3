"""The engine's control socket: one JSON document for each connection, whose figures are true (doc/control.md)."""

from __future__ import annotations

import json
import re
import socket
import stat
import threading
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import ALL_TRANSPORTS, CHECKOUT, EngineProcess
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_common import __version__
from qtfs_common.addresses import parse_address
from qtfs_server.control import control_name

EXCLUSIVE, UNLOCKED = 1, 2


def documented(section: int, tables: slice) -> set[str]:
    """Keys in the first column of tables of one section of doc/control.md."""
    text = (CHECKOUT / "doc/control.md").read_text().split("\n## ")[section]
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[tables]
    return {key for table in found for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def only_session(engine: EngineProcess) -> dict[str, object]:
    (found,) = engine.figures()["sessions"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("tcp://192.0.2.1:7001", "engine-7001.sock"),
        ("vsock://any:12345", "engine-12345.sock"),
        ("unix:///run/x/e.sock", "engine-e.sock.sock"),
        ("shm:///dev/shm/qtfs.bar", "engine-qtfs.bar.sock"),
        ("pcie://0000:00:05.0/resource2", "engine-0000:00:05.0-resource2.sock"),
    ],
)
def test_the_name_tells_which_engine(address: str, name: str) -> None:
    assert control_name(parse_address(address)) == name


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_the_socket_is_the_owners_alone_and_goes_with_the_engine(tmp_path: Path, transport: str) -> None:
    engine = EngineProcess(tmp_path, transport)
    with engine.running():
        found = engine.control_path.stat()
        assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
        figures = engine.figures()
        assert (figures["version"], figures["pid"]) == (__version__, engine.pid)
        assert figures["addresses"] == [str(engine.address)]
        path = engine.control_path
    assert not path.exists()


def test_every_key_is_documented_and_there(engine: EngineProcess, session: Session) -> None:
    session.getattr(ROOT)
    assert documented(1, slice(0, 1)) == set(engine.figures())
    assert documented(1, slice(1, 2)) == set(only_session(engine))


def test_a_session_is_counted_as_it_grows_and_shrinks(engine: EngineProcess, session: Session) -> None:
    before = only_session(engine)
    assert (before["nodes"], before["lookups"], before["handles"], before["connections"]) == (1, 1, 0, 1)
    entry, opened = session.create(ROOT, b"f")
    for _ in range(3):
        session.lookup(ROOT, b"f")
    session.setlk(opened.handle, 7, EXCLUSIVE, lock={"start": 0, "end": 9})
    session.setlk(opened.handle, 7, EXCLUSIVE, lock={"start": 20, "end": 29})
    session.setlk(opened.handle, 8, EXCLUSIVE, lock={"start": 40, "end": 49})
    full = only_session(engine)
    assert (full["nodes"], full["lookups"], full["handles"]) == (2, 5, 1)
    assert (full["locks"], full["lock_owners"], full["waiting_locks"]) == (3, 2, 0)
    session.setlk(opened.handle, 7, UNLOCKED)
    session.forget((entry.node, 3))
    assert [only_session(engine)[key] for key in ("locks", "lock_owners", "lookups")] == [1, 1, 2]
    session.flush(opened.handle, 8)
    session.release(opened.handle)
    session.forget((entry.node, 1))
    assert {**only_session(engine), "open_nodes": 0} == {**before, "open_nodes": 0}


def test_lookups_of_many_nodes_are_counted(engine: EngineProcess, session: Session, share: Path) -> None:
    """More than one chunk of the node table, every third node looked up twice."""
    nodes = []
    for number in range(1500):
        (share / str(number)).touch()
        nodes.append(session.lookup(ROOT, b"%d" % number).node)
        if number % 3 == 0:
            session.lookup(ROOT, b"%d" % number)
    assert only_session(engine)["lookups"] == 1 + 1500 + 500
    session.forget(*((node, 1) for node in nodes))
    assert [only_session(engine)[key] for key in ("nodes", "lookups")] == [501, 501]


def test_waiting_locks_and_unconfirmed_messages(engine: EngineProcess, session: Session) -> None:
    _, opened = session.create(ROOT, b"f")
    session.setlk(opened.handle, 1, EXCLUSIVE)
    event = session.event()
    assert only_session(engine)["event_channel"] is True
    event.send("SETLKW", wire.caller(ROOT) + session.lock_body(opened.handle, 2, EXCLUSIVE), tag=5)
    wait_until(lambda: only_session(engine)["waiting_locks"] == 1, "the lock to wait")
    session.setlk(opened.handle, 1, UNLOCKED)
    assert event.receive().error == 0
    held = only_session(engine)
    assert held["waiting_locks"] == 0 and held["event_number"] == 1 and held["outbox_bytes"] == 32
    event.send("PING", tag=6)
    assert event.receive().tag == 6
    assert only_session(engine)["outbox_bytes"] == 0


def test_a_session_that_returns_is_counted(engine: EngineProcess, session: Session) -> None:
    before = engine.figures()["resumed"]
    session.reattach(0)
    session.disconnect()
    wait_until(lambda: only_session(engine)["connections"] == 0, "the connections to be gone")
    session.slot(1)
    assert engine.figures()["resumed"] in (before + 1, before + 2)  # reattach may have been without any for a moment


def test_whoever_connects_and_leaves_or_does_not_read_is_no_hindrance(tmp_path: Path) -> None:
    with EngineProcess(tmp_path).running() as engine:
        before = engine.descriptors()
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(engine.control_path))
        assert engine.figures()["connections"] == 0
        wait_until(lambda: engine.descriptors() <= before, "the engine to close its ends")


def test_figures_while_sessions_come_and_go(engine: EngineProcess, share: Path) -> None:
    """The document is whole and the engine lives while what it tells of is being freed."""
    failures: list[object] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                engine.figures()
            except (OSError, json.JSONDecodeError) as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with Session(engine.address, share) as one:
                one.opendir(ROOT)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_without_a_control_socket_the_engine_serves(tmp_path: Path) -> None:
    """Its place is taken by something that is no socket: a warning, and everything else as ever."""
    engine = EngineProcess(tmp_path)
    engine.run_dir.mkdir(mode=0o700)
    (engine.run_dir / "engine-engine.sock.sock").write_text("in the way")
    with engine.running():
        assert "no control socket" in engine.log()
        with Session(engine.address, engine.share) as session:
            assert session.getattr(ROOT).nlink
    assert (engine.run_dir / "engine-engine.sock.sock").read_text() == "in the way"


def test_a_long_run_directory_has_a_control_socket_too(tmp_path: Path) -> None:
    """sun_path of unix(7) has 108 bytes."""
    engine = EngineProcess(tmp_path)
    engine.run_dir = tmp_path / ("r" * 100)
    with engine.running():
        assert len(str(engine.control_path)) > 150 and engine.control_path.is_socket()
        assert engine.figures()["pid"] == engine.pid
    assert not engine.control_path.exists()
