"""Shared memory whose bell is a socket that the address names: for clients of other machines, and of ours."""

from __future__ import annotations

import dataclasses
import errno
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import EngineProcess
from harness.ring_file import BELL, BOOT, BY_LINK, LINE_BEAT, SLEEPING, RingFile, bar_path
from harness.session import Session, is_closed_by_peer
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_client.connection import Engine
from qtfs_common.addresses import ShmAddress, TcpAddress, UnixAddress, connect_socket
from qtfs_common.errors import ConnectError
from qtfs_common.rings import shared

#: Well above the limit for strangers on a bell, and below that for all who have not begun a session.
STRANGERS_S = 30.0


@pytest.fixture(params=["unix", "tcp"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine with three channels and such a bell, in memory that another machine seems to have laid out."""
    arguments = ("--bar-layout", "channels=3,request=256K,reply=256K")
    engine = EngineProcess(tmp_path / "engine", "shm", arguments=arguments)
    bells = {"unix": f"unix://{tmp_path}/far.sock", "tcp": "tcp://127.0.0.1:0"}
    engine.listen += f"?bell={bells[request.param]}"
    with engine.running():
        with RingFile(bar_path(engine)) as ring:
            ring.set(BOOT, 1)
        yield engine
        shared._mappings.clear()  # then their links end
    assert not (tmp_path / "far.sock").exists()


def at(engine: EngineProcess, bell: UnixAddress | TcpAddress | None) -> ShmAddress:
    """The engine's address with another bell."""
    assert isinstance(engine.address, ShmAddress)
    return dataclasses.replace(engine.address, bell=bell)


def refusal(address: ShmAddress) -> ConnectError:
    with pytest.raises(ConnectError) as caught:
        Engine(address, timeout_s=0.5).connect().close()
    return caught.value


def sleep_and_be_woken(session: Session, ring: RingFile, number: int) -> None:
    """Both sides sleep, until a request and its reply ring."""
    engines, clients = ring.engine_line(number) + SLEEPING, ring.client_line(number) + SLEEPING
    wait_until(lambda: ring.get(engines, 4) & 1, "the engine to sleep")
    session.slot().send("GETATTR", wire.caller(ROOT) + bytes(16))
    assert session.slot().receive().error == 0
    assert not ring.get(clients, 4) & BY_LINK


def test_a_client_rings_by_it(own: EngineProcess) -> None:
    """And nobody looks after the memory in its place."""
    data = os.urandom(65_536)
    with Session(own.address, own.share) as session, RingFile(bar_path(own)) as ring:
        assert ring.get(ring.client_line(0) + BELL, 4) == 1
        handle = session.create(ROOT, b"f")[1].handle
        for size in (0, 1, 5000, 65_536) * 5:
            assert session.write(handle, 0, data[:size]) == size
            assert session.read(handle, 0, size) == data[:size]
        for _ in range(3):
            sleep_and_be_woken(session, ring, 0)
        assert ring.get(ring.client_line(0) + LINE_BEAT) == 0
        assert not [thread for thread in threading.enumerate() if "_run_link" in thread.name]
    wait_until(own.is_idle, f"the engine to let everything go; it has {own.figures()}")


def test_the_engine_rings_who_says_that_he_sleeps(own: EngineProcess) -> None:
    """By a byte: nothing else wakes a client that has stopped looking."""
    with Session(own.address, own.share) as session, RingFile(bar_path(own)) as ring:
        connection = session.slot().connection
        connection.listen_for_bell(0)  # what rang until now
        for _ in range(3):
            ring.set(ring.client_line(0) + SLEEPING, 1, 4)
            session.slot().send("GETATTR", wire.caller(ROOT) + bytes(16))
            assert select.select([connection.fileno()], [], [], 10)[0]
            assert set(os.read(connection.fileno(), 64)) == {0}
            assert session.slot().receive().error == 0
            assert not select.select([connection.fileno()], [], [], 0)[0]


def test_clients_with_and_without_share_the_memory(own: EngineProcess) -> None:
    """Who does not know the bell is looked after by links, as it is between machines."""
    with Session(own.address, own.share) as rings, Session(at(own, None), own.share) as looks:
        with RingFile(bar_path(own)) as ring:
            assert [ring.get(ring.client_line(number) + BELL, 4) for number in (0, 1)] == [1, 2]
        for _ in range(50):
            assert rings.getattr(ROOT).nlink == looks.getattr(ROOT).nlink


def test_an_engine_that_is_killed_and_comes_again(own: EngineProcess) -> None:
    session = Session(own.address, own.share)
    own.kill()
    refused = refusal(at(own, own.address.bell))
    assert refused.errno == errno.ECONNREFUSED
    assert str(refused).startswith(f"cannot connect to {own.address}: cannot connect to {own.address.bell}: ")
    own.start()
    with pytest.raises(ConnectionResetError):
        session.getattr(ROOT)
    session.reattach()
    assert session.getattr(ROOT).nlink >= 2
    session.detach()


def test_another_bell_makes_no_other_engine_of_it(own: EngineProcess, tmp_path: Path) -> None:
    """What was open goes on; but a running engine is not replaced by one that listens elsewhere."""
    session = Session(own.address, own.share)
    handle = session.create(ROOT, b"f")[1].handle
    for listen in (f"shm://{bar_path(own)}", f"shm://{bar_path(own)}?bell=tcp://127.0.0.1:0"):
        own.kill()
        (tmp_path / "far.sock").unlink(missing_ok=True)
        own.listen, own._address = listen, None
        own.start()
        session.engine = Engine(own.address)
        session.reattach()
        assert session.write(handle, 0, b"on") == 2
    address, own.listen, own._address = own.address, f"shm://{bar_path(own)}", None
    with pytest.raises(AssertionError, match="the engine that runs refuses: this engine listens at"):
        own.upgrade()
    own._address = address
    session.detach()


def test_an_engine_that_takes_over(own: EngineProcess) -> None:
    with Session(own.address, own.share) as session:
        for _ in range(2):
            own.upgrade()
            session.reattach()
            assert session.getattr(ROOT).nlink >= 2
        connect_socket(own.address.bell).close()


def test_memory_that_is_laid_out_again(own: EngineProcess) -> None:
    own.expect_log("the memory is gone")
    session = Session(own.address, own.share)
    os.truncate(bar_path(own), 0)
    wait_until(lambda: "the memory is back" in own.log(), "the engine to take it again")
    with pytest.raises(OSError, match="reset by peer"):
        session.getattr(ROOT)
    session.reattach()
    assert session.getattr(ROOT).nlink >= 2
    session.detach()


def test_somebody_elses_bell(own: EngineProcess, tmp_path: Path) -> None:
    """It is in time that the client gives up, and neither engine takes harm."""
    with EngineProcess(tmp_path / "other", "unix").running() as other:
        assert isinstance(other.address, UnixAddress)
        assert refusal(at(own, other.address)).errno == errno.ETIMEDOUT
        for engine in (own, other):
            with Session(engine.address, engine.share) as session:
                assert session.getattr(ROOT).nlink >= 2
            wait_until(engine.is_idle, "the engine to let everything go")


@pytest.mark.parametrize(
    "said", [b"", b"BELL", b"BELL" + bytes(20), b"\xff" * 24, bytes(range(256)) * 20],
    ids=["nothing", "part", "no channel", "no bell", "too much"],
)
def test_rubbish_on_the_bell(own: EngineProcess, said: bytes) -> None:
    """Who has not seen the memory cannot know what to say there."""
    with Session(own.address, own.share) as session:
        with connect_socket(own.address.bell) as bell:
            bell.sendall(said)
            assert session.getattr(ROOT).nlink >= 2
            if len(said) >= 24:
                assert is_closed_by_peer(bell)
        wait_until(lambda: own.figures()["connections"] == 1, "the stranger to be gone")
        assert session.getattr(ROOT).nlink >= 2


@pytest.mark.slow
@pytest.mark.parametrize("own", ["tcp"], indirect=True)
def test_who_does_not_say_on_the_bell_what_he_wants_is_cut(own: EngineProcess) -> None:
    """After ten seconds: anybody may reach it. Who has a channel stays."""
    assert isinstance(own.address, ShmAddress) and own.address.bell is not None
    with (
        Session(own.address, own.share) as session,
        connect_socket(own.address.bell) as silent,
        connect_socket(own.address.bell) as slow,
    ):
        slow.sendall(b"BELL")
        for bell in (silent, slow):
            bell.settimeout(STRANGERS_S)
            assert bell.recv(1) == b""
        wait_until(lambda: own.figures()["connections"] == 1, "the strangers to be forgotten")
        assert session.getattr(ROOT).nlink >= 2
