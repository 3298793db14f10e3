"""An engine's life: handshake, draining, restart, sessions that outlive connections, crowds, and all at once."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from harness import wire
from harness.engine_process import ALL_TRANSPORTS, TRANSPORTS, EngineProcess, everything_below
from harness.fault_proxy import stopped
from harness.session import Session, attach_stream, receive_exactly, stream
from harness.streams import open_body
from harness.waiting import wait_until
from harness.wire import HEADER_BYTES, NOBODY, ROOT

from qtfs_client.connection import HandshakeError, SessionLostError, detach
from qtfs_common.addresses import Address, TcpAddress, connect_socket
from qtfs_common.errors import ConnectError
from qtfs_common.protocol import EVENT, MAGIC, OPERATIONS
from qtfs_common.transport import Connection

KEY = bytes(range(32))


@pytest.fixture(params=TRANSPORTS)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone."""
    with EngineProcess(tmp_path / "engine", request.param).running() as engine:
        yield engine


def hello(address: Address, oldest: int, newest: int, magic: int = MAGIC) -> tuple[int, bytes]:
    """The errno and the body that HELLO is answered with."""
    with connect_socket(address, 10) as sock:
        body = struct.pack("<IHHII32s", magic, oldest, newest, 0, 0, bytes(32))
        sock.sendall(wire.message(OPERATIONS["HELLO"], body))
        head = wire.read_header(receive_exactly(sock, HEADER_BYTES))
        return head[3], receive_exactly(sock, head[0] - HEADER_BYTES)


# ---- handshake


@pytest.mark.parametrize(
    ("oldest", "newest", "error"), [(1, 1, 0), (0, 9, 0), (2, 9, errno.EPROTONOSUPPORT), (0, 0, errno.EPROTONOSUPPORT)]
)
def test_a_version_is_agreed_on(engine: EngineProcess, oldest: int, newest: int, error: int) -> None:
    found, body = hello(engine.address, oldest, newest)
    assert found == error
    version, authentication, features, payload, slots, nonce = struct.unpack("<HHIII32s", body)
    assert (version, authentication, features, payload, slots) == (1, 0, 0, 1 << 20, 64)
    assert nonce != bytes(32) and hello(engine.address, oldest, newest)[1][16:] != nonce


def test_another_magic_is_not_qtfs(engine: EngineProcess) -> None:
    assert hello(engine.address, 1, 1, MAGIC ^ 1) == (errno.EPROTO, b"")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine that other machines could reach, so that it demands the key."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    engine = EngineProcess(tmp_path / "engine", arguments=("--key-file", str(key)))
    engine.listen = "tcp://0.0.0.0:0"
    with engine.running():
        yield engine


def test_the_key_opens_an_engine_that_others_can_reach(guarded: EngineProcess) -> None:
    assert isinstance(guarded.address, TcpAddress)
    address = TcpAddress("127.0.0.1", guarded.address.port)
    with Session(address, guarded.share, key=KEY) as session:
        assert session.slot(1).index == 1 and session.mkdir(ROOT, b"d").node
    for key in (None, bytes(32), KEY[:-1], KEY + b"x"):
        with pytest.raises(HandshakeError) as caught:
            Session(address, guarded.share, key=key)
        assert caught.value.errno == errno.EACCES
    assert "failed to authenticate" in guarded.log()


@pytest.mark.parametrize("op", ["MOUNT", "ATTACH"])
def test_nothing_is_done_for_who_has_not_authenticated(guarded: EngineProcess, op: str) -> None:
    assert isinstance(guarded.address, TcpAddress)
    with connect_socket(TcpAddress("127.0.0.1", guarded.address.port), 10) as sock:
        body = struct.pack("<IHHII32s", MAGIC, 1, 1, 0, 0, bytes(32))
        sock.sendall(wire.message(OPERATIONS["HELLO"], body))
        receive_exactly(sock, HEADER_BYTES + 48)
        sock.sendall(wire.message(OPERATIONS[op], struct.pack("<II", 0, 1) + os.fsencode(guarded.share)))
        assert sock.recv(1000) == b""
    assert guarded.figures()["sessions"] == [] and guarded.figures()["malformed"] == 1


# ---- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_signal_ends_the_plain_command(tmp_path: Path, transport: str, number: signal.Signals) -> None:
    """Exit status 0, whatever clients hold, and the socket's file is gone."""
    engine = EngineProcess(tmp_path, transport)
    with engine.running():
        session = Session(engine.address, engine.share)
        session.create(ROOT, b"f")
        session.event()
        os.kill(engine.pid, number)
        assert engine.process is not None and engine.process.wait(10) == 0
        with pytest.raises(ConnectError):
            Session(engine.address, engine.share)
        session.disconnect()
    assert not (tmp_path / "engine.sock").exists()


def test_draining_answers_what_is_being_executed(own: EngineProcess) -> None:
    size = 128 << 20
    with (own.share / "from").open("wb") as file:
        for at in range(0, size, 1 << 16):
            os.pwrite(file.fileno(), b"x", at)
        file.truncate(size)
    session = Session(own.address, own.share)
    source = session.open(session.lookup(ROOT, b"from").node).handle
    target = session.create(ROOT, b"to", os.O_WRONLY)[1].handle
    body = struct.pack("<QQQQQII", source, 0, target, 0, size, 0, 0)
    session.slot(0).send("COPY_FILE_RANGE", wire.caller(ROOT) + body)
    wait_until(lambda: own.figures()["requests"].get("COPY_FILE_RANGE"), "the request to be under way")
    own.stop()
    reply = session.slot(0).receive()
    assert reply.error == 0 and struct.unpack("<Q", reply.body) == (size,)
    session.disconnect()


def test_a_second_engine_at_the_same_address_is_refused(own: EngineProcess, tmp_path: Path) -> None:
    second = EngineProcess(tmp_path / "second")
    for run_dir in (own.run_dir, tmp_path / "elsewhere"):
        second.listen, second.run_dir = str(own.address), run_dir
        begin = len(second.log()) if second.log_path.exists() else 0
        with pytest.raises(AssertionError, match="did not start"):
            second.start()
        assert second.process is not None and second.process.wait(10) == 1
        second.process = None
        message = second.log()[begin:]
        assert message.startswith("engine: ") and message.count("\n") == 1
        assert "already" in message or "in use" in message
    with Session(own.address, own.share) as session:
        assert session.getattr(ROOT).nlink, "the first one goes on"


def test_an_engine_starts_again_after_sigkill(own: EngineProcess) -> None:
    """At the same address, though the dead one left its socket, its lock and open connections."""
    session = Session(own.address, own.share)
    address = own.address
    own.kill()
    own.start()
    assert own.address == address
    with pytest.raises(OSError):
        session.getattr(ROOT)
    session.reattach()
    assert session.getattr(ROOT).nlink
    session.detach()
    with Session(own.address, own.share) as fresh:
        fresh.mkdir(ROOT, b"d")


@pytest.mark.root
@pytest.mark.parametrize("ends", ["killed", "upgraded"])
def test_a_session_whose_root_is_let_go_outlives_its_engine(own: EngineProcess, ends: str) -> None:
    """Its root is let go, and after a while no more than a record; the next engine finds it all the same."""
    with Session(own.address, own.share, let_go=True) as session:
        handle = session.create(ROOT, b"f")[1].handle
        session.write(handle, 0, b"kept")
        before = own.figures()["sessions"][0]
        wait_until(lambda: own.figures()["sessions"][0]["open_nodes"] == 1, "all to be let go but the open file")
        if ends == "killed":
            own.kill()
            own.start()
        else:
            own.upgrade()
        session.reattach()
        assert session.read(handle, 0, 10) == b"kept"
        assert session.lookup(ROOT, b"f").attr.size == 4
        after = own.figures()["sessions"][0]
        assert [after[key] for key in ("id", "nodes", "lookups")] == [before["id"], 2, before["lookups"] + 1]


def test_a_file_without_permission_is_resized_by_the_next_engine(own: EngineProcess) -> None:
    """ftruncate(2) as the first use of a file that is open for writing takes no permission, and loses nothing."""
    path = own.share / "f"
    path.touch()
    path.chmod(0o666)
    with Session(own.address, own.share, who=NOBODY) as session:
        node = session.lookup(ROOT, b"f").node
        handle = session.open(node, os.O_RDWR).handle
        path.chmod(0o400)
        own.kill()
        own.start()
        session.reattach()
        assert session.setattr(node, size=5, handle=handle).size == 5
        assert session.read(handle, 0, 9) == bytes(5)
    assert own.figures()["lost_handles"] == 0


def _die_in_release(engine: EngineProcess, handle: int) -> None:
    """Kill an engine and leave a handle's entry as a RELEASE has it for a moment: unused, its number the same."""
    engine.kill()
    (tables,) = (engine.run_dir / "sessions").iterdir()
    # The members of struct handle (session.pxd) from `generation` on: pins, index, next_free, flags.
    entry = struct.pack("<III", handle >> 34, 0, handle >> 2 & 0xFFFFFFFF)
    with tables.open("r+b") as file:
        (at,) = (begin + data.index(entry) for begin, data in _written(file) if entry in data)
        flags = os.pread(file.fileno(), 4, at + 16)
        assert flags[0] & 1, "it is in use"
        os.pwrite(file.fileno(), bytes(4), at + 16)


def _written(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The parts of a sparse file that are no holes, and where they begin."""
    end = 0
    with contextlib.suppress(OSError):  # ENXIO behind the last one
        while True:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            yield begin, os.pread(file.fileno(), end - begin, begin)


def test_a_handle_that_was_just_released_leaves_its_number_to_nobody(own: EngineProcess) -> None:
    """The client repeats a RELEASE in which the engine died: it must not end another file's handle."""
    (own.share / "f").touch()
    with Session(own.address, own.share) as session:
        node = session.lookup(ROOT, b"f").node
        old = session.open(node).handle
        _die_in_release(own, old)
        own.start()
        session.reattach()
        new = session.open(node).handle
        assert new != old
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            session.release(old)
        assert session.read(new, 0, 9) == b""


def test_an_engine_that_was_stopped_goes_on(own: EngineProcess) -> None:
    """SIGCONT interrupts its wait for signals after the time of that wait is up: once, Python made nonsense of it."""
    with Session(own.address, own.share) as session:
        for _ in range(3):
            with stopped(own.pid):
                time.sleep(1.2)  # the wait takes a second at most
            assert session.getattr(ROOT).nlink
    own.reload(everything_below(own.share))
    assert own.exit_status() is None


# ---- sessions and their connections


@pytest.fixture
def brief(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine whose sessions end as soon as it looks (each second) and nobody is connected."""
    with EngineProcess(tmp_path / "brief", arguments=("--grace", "0")).running() as engine:
        yield engine


def test_a_session_outlives_its_connections_for_the_grace_time(engine: EngineProcess, share: Path) -> None:
    with Session(engine.address, share) as session:
        made, opened = session.create(ROOT, b"f")
        session.write(opened.handle, 0, b"kept")
        sequence = session.slot(0).sequence
        for slot in list(session.slots.values()):
            slot.connection.close()
        session.slots.clear()
        wait_until(lambda: engine.figures()["connections"] == 0, "the connection to be gone")
        assert session.slot(0).sequence == sequence
        assert session.read(opened.handle, 0, 10) == b"kept" and session.getattr(made.node).size == 4


def test_after_the_grace_time_all_is_given_back(brief: EngineProcess) -> None:
    before = brief.descriptors()
    sessions = [Session(brief.address, brief.share) for _ in range(5)]
    for number, session in enumerate(sessions):
        session.create(ROOT, b"%d" % number)
        session.opendir(ROOT)
        session.disconnect()
    wait_until(brief.is_idle, "the sessions to expire")
    assert brief.descriptors() == before
    with pytest.raises(SessionLostError):
        sessions[0].engine.attach(sessions[0].ticket, 0)
    assert "is gone for" in brief.log()


def test_a_connected_session_does_not_expire(brief: EngineProcess) -> None:
    with Session(brief.address, brief.share) as session:
        gone = Session(brief.address, brief.share)
        gone.disconnect()
        wait_until(lambda: len(brief.figures()["sessions"]) == 1, "the other session to expire")
        assert session.getattr(ROOT).nlink


def test_tcp_asks_silent_peers_whether_they_live(tmp_path: Path) -> None:
    """A client machine without power never says goodbye; /proc/net/tcp shows the running keepalive timer as 02."""
    with EngineProcess(tmp_path, "tcp").running() as engine, Session(engine.address, engine.share) as session:
        assert isinstance(engine.address, TcpAddress)
        session.getattr(ROOT)
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        port = f":{engine.address.port:04X}"
        ours = [row for row in rows if row[3] == "01" and (row[1].endswith(port) or row[2].endswith(port))]
        assert len(ours) == 2, "the connection, seen from both sides"
        # A timer for unacknowledged data may run in its place for a moment.
        assert {row[5].split(":")[0] for row in ours} <= {"01", "02"}


# ---- crowds


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many descriptors for the test itself as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_thousand_idle_connections(own: EngineProcess, descriptors: None) -> None:
    """Some have said hello, some have not, some are sessions: who works does not notice, and nothing is left."""
    before = own.descriptors()
    with contextlib.ExitStack() as stack:
        for index in range(2000):
            if index % 10 == 0:
                stack.enter_context(Session(own.address, own.share))
            elif index % 2:
                stack.enter_context(stream(own.address))
            else:
                stack.enter_context(connect_socket(own.address, 10))
        wait_until(lambda: own.figures()["connections"] == 2000, "all to be accepted")
        with Session(own.address, own.share) as session:
            begin = time.monotonic()
            for number in range(200):
                session.mkdir(ROOT, b"%d" % number)
            assert time.monotonic() - begin < 3
    wait_until(own.is_idle, "the engine to let everything go")
    assert own.descriptors() == before


def test_more_connections_than_descriptors(tmp_path: Path, descriptors: None) -> None:
    """Those that are too many are turned away; those that are in go on, and room is found again."""
    engine = EngineProcess(tmp_path, limits=("--nofile=128",))
    with engine.running():
        with Session(engine.address, engine.share) as session, contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(connect_socket(engine.address, 10))
            for number in range(20):
                session.release(session.create(ROOT, b"%d" % number)[1].handle)
            assert engine.descriptors() <= 128
        wait_until(engine.is_idle, "the engine to let everything go")
        with Session(engine.address, engine.share) as session:
            assert session.lookup(ROOT, b"19").attr.mode


# ---- all at once


class Walker:
    """A client that does what comes to its mind, and knows what must hold whatever the others do."""

    ALLOWED = frozenset(
        {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
    )

    def __init__(self, session: Session, seed: int) -> None:
        self.session = session
        self.rng = random.Random(seed)
        self.directories = [ROOT]
        self.held: list[tuple[int, int]] = []

    def name(self) -> bytes:
        return b"%d" % self.rng.randrange(30)

    def step(self) -> None:
        act = self.rng.choice(
            (self.look, self.look, self.make, self.write, self.remove, self.move, self.list, self.drop)
        )
        try:
            act(self.rng.choice(self.directories))
        except OSError as error:
            if error.errno not in self.ALLOWED:
                raise

    def look(self, parent: int) -> None:
        found = self.session.lookup(parent, self.name())
        self.held.append((found.node, 1))
        self.session.getattr(found.node)

    def make(self, parent: int) -> None:
        found = self.session.mkdir(parent, self.name())
        self.held.append((found.node, 1))
        if len(self.directories) < 5:
            self.directories.append(found.node)

    def write(self, parent: int) -> None:
        made, opened = self.session.create(parent, self.name(), os.O_RDWR)
        self.held.append((made.node, 1))
        try:
            self.session.write(opened.handle, 0, b"x" * 100)
            assert self.session.read(opened.handle, 0, 100) == b"x" * 100
        finally:
            self.session.release(opened.handle)

    def remove(self, parent: int) -> None:
        self.rng.choice((self.session.unlink, self.session.rmdir))(parent, self.name())

    def move(self, parent: int) -> None:
        self.session.rename(parent, self.name(), self.rng.choice(self.directories), self.name())

    def list(self, parent: int) -> None:
        handle = self.session.opendir(parent)
        try:
            found = list(self.session.entries(handle, 2000, plus=True))
        finally:
            self.session.release(handle, op="RELEASEDIR")
        names = [d.name for d in found]
        assert len(names) == len(set(names))
        self.held += [(d.entry.node, 1) for d in found if d.entry is not None]

    def drop(self, parent: int) -> None:
        if len(self.directories) == 5:
            self.directories[1:] = []
            self.session.forget(*self.held)
            self.held.clear()


@pytest.mark.parametrize("descriptors", [128, 20000])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_clients_in_one_tree(tmp_path: Path, transport: str, descriptors: int) -> None:
    """Eight clients make, move, remove and list the same few names while rules are read again."""
    engine = EngineProcess(tmp_path, transport, limits=(f"--nofile={descriptors}",))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with Session(engine.address, engine.share) as session:
                walker = Walker(session, seed)
                for _ in range(250):
                    walker.step()
                session.forget(*walker.held)
        except BaseException as failure:
            failures.append(failure)

    with engine.running():
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            engine.reload(everything_below(engine.share))
        for thread in threads:
            thread.join()
        assert failures == []
        wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


def test_sixteen_slots_at_once_share_one_session(own: EngineProcess) -> None:
    """As a client with sixteen threads does: the same handles, the same nodes, no lock of its own."""
    failures: list[BaseException] = []
    with Session(own.address, own.share, slots=16) as session:
        made, opened = session.create(ROOT, b"shared")
        for index in range(16):
            session.slot(index)

        def work(index: int) -> None:
            try:
                for number in range(100):
                    session.write(opened.handle, index * 8, struct.pack("<Q", number), slot=index)
                    assert session.read(opened.handle, index * 8, 8, slot=index) == struct.pack("<Q", number)
                    assert session.lookup(ROOT, b"shared", slot=index).node == made.node
                    if number % 10 == 0:
                        session.release(session.open(made.node, slot=index).handle, slot=index)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert (own.share / "shared").read_bytes() == struct.pack("<Q", 99) * 16
        session.forget((made.node, 1601))
        session.release(opened.handle)
        assert own.figures()["sessions"][0]["nodes"] == 1


def test_a_detach_while_other_slots_work(own: EngineProcess) -> None:
    """The session ends under requests that are being executed; nothing is freed too early or left."""
    for _ in range(20):
        session = Session(own.address, own.share, slots=4)
        socks = [attach_stream(own.address, session.ticket, index) for index in (1, 2, 3)]
        for sock in socks:
            body = wire.caller(ROOT) + struct.pack("<QII", 0, 0, 0)
            for sequence in range(1, 40):
                sock.sendall(wire.message(OPERATIONS["GETATTR"], body, sequence=sequence))
        session.detach()
        for sock in socks:
            with contextlib.suppress(ConnectionError):
                while sock.recv(65536):
                    pass
            sock.close()
    wait_until(own.is_idle, "the engine to let everything go")


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize("slot", [0, EVENT])
def test_a_session_is_over_once_its_detach_is_answered(transport: str, slot: int, tmp_path: Path) -> None:
    """What came before the answer, as on an event channel, is not taken for it."""
    with EngineProcess(tmp_path / "engine", transport).running() as engine:
        session = Session(engine.address, engine.share)
        connection = session.slot().connection
        if slot == EVENT:
            connection = session.event().connection
            session.event().send("OPEN", wire.caller(node=1 << 40) + open_body(os.O_RDONLY), tag=1)
            wait_until(lambda: engine.figures()["sessions"][0]["event_number"] == 1, "an answer that nobody reads")
        with stopped(engine.pid), pytest.raises(TimeoutError):
            detach(connection, 0.2, slot=slot)
        wait_until(lambda: not engine.figures()["sessions"], "the session to end")
        session.disconnect()
        session = Session(engine.address, engine.share)
        detach(session.slot().connection if slot == 0 else session.event().connection, 10, slot=slot)
        assert engine.figures()["sessions"] == []
        session.disconnect()


class _Talkative:
    """The connection of an engine that always has something else to say."""

    def send(self, data: bytes, timeout_s: float) -> None:
        pass

    def receive(self, timeout_s: float) -> tuple[int, ...]:
        return (OPERATIONS["PING"], 1, 0, EVENT, 0, 0)


@pytest.mark.timeout(20)
def test_an_engine_that_says_other_things_for_ever_does_not_keep_a_detach() -> None:
    with pytest.raises(TimeoutError):
        detach(cast(Connection, _Talkative()), 0.2)


def test_a_socket_that_is_shut_in_the_middle_of_a_reply(own: EngineProcess) -> None:
    data = os.urandom(1 << 20)
    (own.share / "big").write_bytes(data)
    with Session(own.address, own.share) as session:
        handle = session.open(session.lookup(ROOT, b"big").node).handle
        for cut in (0, 1, 31, 32, 33, 100_000, 1 << 20):
            with attach_stream(own.address, session.ticket, 1) as sock:
                body = wire.caller(ROOT) + struct.pack("<QQII", handle, 0, 1 << 20, 0)
                sock.sendall(wire.message(OPERATIONS["READ"], body, sequence=1))
                receive_exactly(sock, cut)
        assert session.read(handle, 0, 1 << 20) == data
    wait_until(own.is_idle, "the engine to let everything go")
