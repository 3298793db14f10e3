"""Peers that break the protocol, by accident or on purpose: their connection ends, nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness import wire
from harness.engine_process import TRANSPORTS, EngineProcess
from harness.session import MAX_PAYLOAD, Session, attach_stream, is_closed_by_peer, receive_exactly, stream
from harness.waiting import wait_until
from harness.wire import EVENT_SLOT, HEADER_BYTES, ROOT

from qtfs_common.addresses import connect_socket
from qtfs_common.protocol import OPERATIONS

SESSION_LIMIT = 8192
MAX_MESSAGE = 1056768
#: Of each transport's rounds of rubbish.
ROUNDS = 400


@pytest.fixture(scope="module", params=TRANSPORTS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that may not write large files: rubbish may well be a valid FALLOCATE of a terabyte."""
    area = tmp_path_factory.mktemp(f"hostile-{request.param}")
    with EngineProcess(area, request.param, workers=2, limits=("--fsize=67108864",)).running() as engine:
        yield engine


@pytest.fixture
def victim(target: EngineProcess) -> Iterator[Session]:
    """Somebody else's session, which must not notice anything; the engine is idle again after it."""
    wait_until(target.is_idle, "the engine to be idle")
    directory = target.share / "victim"
    directory.mkdir(exist_ok=True)
    (directory / "f").write_text("untouched")
    with Session(target.address, directory) as session:
        node = session.lookup(ROOT, b"f").node
        handle = session.open(node).handle
        yield session
        assert session.read(handle, 0, 100) == b"untouched"
        assert os.listdir(directory) == ["f"]
        session.release(handle)
    wait_until(target.is_idle, f"the engine to let everything go; it has {target.figures()}")
    target.check_log()


@pytest.fixture
def attacker(target: EngineProcess, victim: Session) -> Iterator[Session]:
    """A session whose slot 1 the test spoils."""
    directory = target.share / "attacker"
    directory.mkdir(exist_ok=True)
    with Session(target.address, directory) as session:
        yield session


def malformed(engine: EngineProcess) -> int:
    count = engine.figures()["malformed"]
    assert isinstance(count, int)
    return count


@contextlib.contextmanager
def counted(engine: EngineProcess, breaches: int = 1) -> Iterator[None]:
    """The body makes the engine count so many breaches of the protocol."""
    before = malformed(engine)
    yield
    wait_until(lambda: malformed(engine) >= before + breaches, "the breach to be counted")
    assert malformed(engine) == before + breaches


def slot(session: Session) -> tuple[socket.socket, int]:
    """Slot 1 as a bare socket, and the sequence number it is at."""
    connection, last = session.engine.attach(session.ticket, 1)
    sock = socket.socket(fileno=connection.detach())
    sock.settimeout(20)
    return sock, last


def raw(engine: EngineProcess) -> socket.socket:
    sock = connect_socket(engine.address, 10)
    sock.settimeout(20)
    return sock


# ---- framing


@pytest.mark.parametrize("length", [0, 31, SESSION_LIMIT + 1, MAX_MESSAGE, 0xFFFFFFFF])
def test_a_wrong_length_from_a_stranger(target: EngineProcess, victim: Session, length: int) -> None:
    with counted(target), raw(target) as sock:
        sock.sendall(wire.header(length, OPERATIONS["HELLO"]))
        assert is_closed_by_peer(sock)


@pytest.mark.parametrize("length", [0, 31, MAX_MESSAGE + 1, 0xFFFFFFFF])
def test_a_wrong_length_in_a_session(target: EngineProcess, attacker: Session, length: int) -> None:
    sock, _ = slot(attacker)
    with counted(target), sock:
        sock.sendall(wire.header(length, OPERATIONS["READ"]))
        assert is_closed_by_peer(sock)
    assert attacker.getattr(ROOT).nlink, "the session lives on"


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.0\r\n\r\n" * 3, b"SSH-2.0-OpenSSH\r\n" * 3, b"\x16\x03\x01" * 20])
def test_other_protocols(target: EngineProcess, victim: Session, greeting: bytes) -> None:
    with counted(target), raw(target) as sock:
        sock.sendall(greeting)
        assert is_closed_by_peer(sock)


def test_a_long_message_before_mount_is_refused_by_its_header_alone(target: EngineProcess, victim: Session) -> None:
    with counted(target), stream(target.address) as sock:
        sock.sendall(wire.header(SESSION_LIMIT + 1, OPERATIONS["MOUNT"]))
        assert is_closed_by_peer(sock)


# ---- states

SESSION_OPERATIONS = ("HELLO", "AUTHENTICATE", "MOUNT", "ATTACH", "DETACH", "PING", "CANCEL")


def in_state(state: str, engine: EngineProcess, session: Session) -> tuple[socket.socket, int]:
    """A socket in a state of doc/protocol.md's table, and its next sequence number."""
    if state == "new":
        return raw(engine), 0
    if state == "trusted":
        return stream(engine.address), 0
    if state == "slot":
        sock, last = slot(session)
        return sock, last + 1
    return attach_stream(engine.address, session.ticket, EVENT_SLOT), 0


ACCEPTED = {
    "new": {"HELLO"},
    "trusted": {"MOUNT", "ATTACH", "PING"},
    "slot": {"PING", "DETACH", *(name for name, number in OPERATIONS.items() if number >= 16)},
    "event": {"SETLKW", "CANCEL", "PING", "DETACH"},
}


@pytest.mark.parametrize("state", ACCEPTED)
def test_operations_in_the_wrong_state(target: EngineProcess, attacker: Session, state: str) -> None:
    wrong = [number for name, number in OPERATIONS.items() if name not in ACCEPTED[state]]
    unknown = [0, *range(8, 16), 55, *range(63, 66), 128, 0x7FFF, 0xFFFF]
    for op in wrong + unknown:
        sock, sequence = in_state(state, target, attacker)
        with counted(target), sock:
            sock.sendall(wire.message(op, wire.caller(ROOT) if op >= 16 else b"", sequence=sequence))
            assert is_closed_by_peer(sock), op
    assert attacker.getattr(ROOT).nlink


@pytest.mark.parametrize("state", ACCEPTED)
def test_a_reply_in_place_of_a_request(target: EngineProcess, attacker: Session, state: str) -> None:
    sock, sequence = in_state(state, target, attacker)
    with counted(target), sock:
        sock.sendall(wire.message(OPERATIONS["PING"], flags=1, sequence=sequence))
        assert is_closed_by_peer(sock)


def test_bodies_of_session_messages_of_the_wrong_length(target: EngineProcess, victim: Session) -> None:
    for state, op, sizes in (
        ("new", "HELLO", (0, 47, 49)),
        ("trusted", "ATTACH", (0, 47, 49)),
        ("trusted", "MOUNT", (0, 7)),
    ):
        for size in sizes:
            sock, _ = in_state(state, target, victim)
            with sock:
                sock.sendall(wire.message(OPERATIONS[op], bytes(size), tag=3))
                assert wire.read_header(sock.recv(1000))[1:] == (OPERATIONS[op], 1, errno.EPROTO, 0, 0, 3)


@pytest.mark.parametrize("state", ["trusted", "slot", "event"])
def test_a_ping_with_a_body(target: EngineProcess, attacker: Session, state: str) -> None:
    sock, _ = in_state(state, target, attacker)
    with counted(target), sock:
        sock.sendall(wire.message(OPERATIONS["PING"], b"x"))
        assert is_closed_by_peer(sock)


# ---- bodies of file operations

#: Operations whose request has one length only.
FIXED = {
    "GETATTR": 16, "SETATTR": 64, "READLINK": 0, "OPEN": 8, "READ": 24, "STATFS": 0, "RELEASE": 24, "FSYNC": 16,
    "LISTXATTR": 16, "FLUSH": 24, "OPENDIR": 8, "READDIR": 24, "RELEASEDIR": 24, "FSYNCDIR": 16, "GETLK": 48,
    "SETLK": 48, "ACCESS": 8, "TMPFILE": 16, "FALLOCATE": 32, "LSEEK": 24, "COPY_FILE_RANGE": 48, "STATX": 24,
    "SYNCFS": 0, "POLL": 24, "KILL": 16, "GETAFFINITY": 16, "PROCESSES": 8, "LIST_MOUNTS": 16,
}  # fmt: skip
#: Those that a name or data follows: the least length, and a body that promises more than comes.
OPEN_ENDED = {
    "MKNOD": (8, None),
    "MKDIR": (8, None),
    "LINK": (8, None),
    "CREATE": (16, None),
    "SYMLINK": (8, struct.pack("<II", 3, 4) + b"abcdef"),
    "RENAME": (24, struct.pack("<QIIII", ROOT, 0, 3, 3, 0) + b"abcde"),
    "WRITE": (24, struct.pack("<QQII", 2, 0, 5, 0) + b"four"),
    "SETXATTR": (16, struct.pack("<IIII", 4, 0, 6, 0) + b"user.x123"),
    "GETXATTR": (16, struct.pack("<IIII", 4, 0, 6, 0) + b"user."),
    "REMOVEXATTR": (16, struct.pack("<IIII", 0, 0, 6, 0) + b"user."),
    "IOCTL": (24, struct.pack("<QIIII", 2, 0x80086601, 8, 0, 0) + b"1234567"),
    "FORGET": (0, bytes(15)),
    "SYSMOUNT": (48, struct.pack("<IIQQIIIIII", 0, 0, 0, 0, 0, 5, 4, 1, 1, 0) + b"tmpfsnoned" + bytes(15)),
    "SYSUMOUNT": (8, struct.pack("<II", 0, 0) + b"a\0b"),
    "SETAFFINITY": (16, struct.pack("<iIQ", 1, 16, 0) + bytes(8)),
}


def test_every_operation_is_covered() -> None:
    named = {"LOOKUP", "UNLINK", "RMDIR"}  # a name and nothing else: no length is malformed
    assert named | set(FIXED) | set(OPEN_ENDED) | {"SETLKW"} == {n for n, number in OPERATIONS.items() if number >= 16}


def breach(target: EngineProcess, session: Session, op: str, whole: bytes) -> None:
    """Send the body of a request, caller included, which must end the connection."""
    sock, last = slot(session)
    with counted(target), sock:
        sock.sendall(wire.message(OPERATIONS[op], whole, sequence=last + 1))
        assert is_closed_by_peer(sock), (op, whole)


@pytest.mark.parametrize("op", FIXED)
def test_fixed_bodies_of_any_other_length(target: EngineProcess, attacker: Session, op: str) -> None:
    size = FIXED[op]
    for wrong in {max(size - 1, 1), size + 1, size + 8, size // 2 or 3}:
        breach(target, attacker, op, wire.caller(ROOT) + bytes(wrong))


def test_more_handles_in_a_release_than_there_may_be(target: EngineProcess, attacker: Session) -> None:
    breach(target, attacker, "RELEASE", wire.caller(ROOT) + bytes(24 * 65))
    breach(target, attacker, "RELEASE", wire.caller(ROOT))


@pytest.mark.parametrize("op", OPEN_ENDED)
def test_bodies_that_promise_more_than_they_hold(target: EngineProcess, attacker: Session, op: str) -> None:
    least, lying = OPEN_ENDED[op]
    for size in {least // 2, least - 1} if least else set():
        breach(target, attacker, op, wire.caller(ROOT) + bytes(size))
    if lying is not None:
        breach(target, attacker, op, wire.caller(ROOT) + lying)


@pytest.mark.parametrize("size", [1, 23])
def test_a_caller_cut_short(target: EngineProcess, attacker: Session, size: int) -> None:
    breach(target, attacker, "GETATTR", wire.caller(ROOT)[:size])


@pytest.mark.parametrize(("promised", "held"), [(1, 0), (1, 4), (1024, 4088), (1025, 5000), (65535, 5000)])
def test_more_groups_than_there_are(target: EngineProcess, attacker: Session, promised: int, held: int) -> None:
    caller = wire.caller(ROOT)[:-2] + struct.pack("<H", promised)
    breach(target, attacker, "STATFS", caller + bytes(held))


def test_sizes_beyond_the_payload(target: EngineProcess, attacker: Session) -> None:
    handle = attacker.opendir(ROOT)
    for op in ("READ", "READDIR"):
        body = struct.pack("<QQII", handle, 0, MAX_PAYLOAD + 1, 0)
        breach(target, attacker, op, wire.caller(ROOT) + body)
    attacker.release(handle, op="RELEASEDIR")


# ---- rubbish

#: A valid body of every operation that a slot takes; 2 and 3 stand for handles.
VALID: dict[str, bytes] = {
    **{op: bytes(size) for op, size in FIXED.items()},
    "LOOKUP": b"f", "UNLINK": b"x", "RMDIR": b"y", "FORGET": struct.pack("<QQ", 7, 1),
    "MKNOD": struct.pack("<II", 0o100644, 0) + b"n", "MKDIR": struct.pack("<II", 0o755, 0) + b"d",
    "LINK": struct.pack("<Q", ROOT) + b"l", "CREATE": struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"f",
    "SYMLINK": struct.pack("<II", 1, 1) + b"st", "RENAME": struct.pack("<QIIII", ROOT, 0, 1, 1, 0) + b"fg",
    "READ": struct.pack("<QQII", 3, 0, 4096, 0), "WRITE": struct.pack("<QQII", 3, 0, 4, 0) + b"data",
    "READDIR": struct.pack("<QQII", 2, 0, 4096, 1), "SETXATTR": struct.pack("<IIII", 1, 0, 6, 0) + b"user.xv",
    "GETXATTR": struct.pack("<IIII", 9, 0, 6, 0) + b"user.x", "LISTXATTR": struct.pack("<IIII", 99, 0, 0, 0),
    "REMOVEXATTR": struct.pack("<IIII", 0, 0, 6, 0) + b"user.x",
    "IOCTL": struct.pack("<QIIII", 3, 0x5401, 4, 4, 0) + b"1234", "SETLKW": bytes(48),
}  # fmt: skip
INTERESTING = (
    0,
    1,
    0xFF,
    0x7F,
    0x80,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, a number overwritten by an interesting one, cut off, or prolonged."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        choice = rng.randrange(4)
        if choice == 0 and changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        elif choice == 1 and len(changed) >= 8:
            at = rng.randrange(0, len(changed) - 7, 4)
            size = rng.choice((4, 8))
            changed[at : at + size] = (rng.choice(INTERESTING) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif choice == 2:
            del changed[rng.randrange(len(changed) + 1) :]
        else:
            changed += rng.randbytes(rng.randrange(40))
    return bytes(changed)


def ends(sock: socket.socket) -> bool:
    """Say that nothing more comes; True once the peer has closed, perhaps long before."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    return is_closed_by_peer(sock)


def drain(sock: socket.socket, replies: int) -> bool:
    """Read so many replies; False if the peer closed before. Each must be a whole reply."""
    for _ in range(replies):
        try:
            head = receive_exactly(sock, HEADER_BYTES)
        except ConnectionResetError:
            return False
        if len(head) < HEADER_BYTES:
            return False
        length, _, flags, error, _, _, _ = wire.read_header(head)
        assert HEADER_BYTES <= length <= MAX_MESSAGE and flags == 1 and 0 <= error < 200
        body = length - HEADER_BYTES
        if len(receive_exactly(sock, body)) < body:
            return False
    return True


def test_mutated_requests(target: EngineProcess, attacker: Session) -> None:
    """Requests that are almost right, by callers who are root: refused, answered, or the end of the connection."""
    rng = random.Random(20240607)
    before = target.resident_bytes()
    sock, last = slot(attacker)
    for _ in range(ROUNDS):
        op = rng.choice(sorted(VALID))
        body = mutated(rng, wire.caller(ROOT) + VALID[op])
        last += 1
        sock.sendall(wire.message(OPERATIONS[op], body, sequence=last))
        if not drain(sock, 1):
            sock.close()
            sock, last = slot(attacker)
    sock.close()
    assert malformed(target) > ROUNDS // 20, "the rubbish was too good"
    assert target.resident_bytes() - before < 64 << 20
    assert attacker.getattr(ROOT).nlink


@pytest.mark.parametrize("state", ACCEPTED)
def test_random_bytes(target: EngineProcess, attacker: Session, state: str) -> None:
    rng = random.Random(state)
    for _ in range(ROUNDS // 8):
        sock, _ = in_state(state, target, attacker)
        with sock, contextlib.suppress(ConnectionError):
            sock.sendall(rng.randbytes(rng.randrange(1, 300)))
            if rng.random() < 0.5:
                assert ends(sock)
    assert attacker.getattr(ROOT).nlink


def test_mutated_streams_of_several_messages(target: EngineProcess, attacker: Session) -> None:
    """A valid exchange with a few bytes changed anywhere, headers included, sent in pieces of any size."""
    rng = random.Random(7)
    for _ in range(ROUNDS // 4):
        sock, last = slot(attacker)
        parts = [
            wire.message(OPERATIONS[op], wire.caller(ROOT) + VALID[op], sequence=last + 1 + index)
            for index, op in enumerate(rng.choices(sorted(VALID), k=4))
        ]
        data = mutated(rng, b"".join(parts))
        with sock, contextlib.suppress(ConnectionError):
            while data:
                size = rng.randrange(1, 200)
                sock.sendall(data[:size])
                data = data[size:]
            assert ends(sock)
    assert attacker.getattr(ROOT).nlink


def test_mutated_events(target: EngineProcess, attacker: Session) -> None:
    rng = random.Random(11)
    for _ in range(ROUNDS // 4):
        op = rng.choice(("SETLKW", "CANCEL", "PING", "DETACH"))
        if op == "DETACH":
            continue  # it would end the session, rightly
        body = mutated(rng, wire.caller(ROOT) + bytes(48)) if op == "SETLKW" else rng.randbytes(rng.randrange(2))
        with attach_stream(target.address, attacker.ticket, EVENT_SLOT) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(wire.message(OPERATIONS[op], body, tag=rng.getrandbits(64)))
            assert ends(sock)
    assert attacker.getattr(ROOT).nlink


# ---- greed


def in_threads(work: Callable[[], None], count: int, stop: threading.Event) -> contextlib.ExitStack:
    """Run `work` in threads that end when `stop` is set, at the latest with the stack."""
    stack = contextlib.ExitStack()
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
        stack.callback(thread.join)
    stack.callback(stop.set)
    return stack


def test_peers_that_dribble_do_not_hold_the_workers(target: EngineProcess, victim: Session) -> None:
    """More connections than workers send a byte now and then; others are served all the same."""
    stop, started = threading.Event(), threading.Semaphore(0)

    def dribble() -> None:
        with raw(target) as sock:
            sock.sendall(wire.header(SESSION_LIMIT, OPERATIONS["HELLO"]))
            for count in range(SESSION_LIMIT - HEADER_BYTES - 1):
                sock.sendall(b"x")
                if count == 20:
                    started.release()
                if stop.wait(0.002):
                    return

    with in_threads(dribble, 4, stop):
        for _ in range(4):
            started.acquire()
        begin = time.monotonic()
        for _ in range(50):
            victim.getattr(ROOT)
        assert time.monotonic() - begin < 3


def greedy_slot(session: Session, index: int, handle: int, requests: int = 30) -> socket.socket:
    """A slot that has asked for so many megabytes and does not read them."""
    sock = attach_stream(session.address, session.ticket, index)
    for sequence in range(1, requests + 1):
        body = wire.caller(ROOT) + struct.pack("<QQII", handle, 0, MAX_PAYLOAD, 0)
        sock.sendall(wire.message(OPERATIONS["READ"], body, slot=index, sequence=sequence))
    return sock


@pytest.fixture
def big(attacker: Session) -> Iterator[tuple[int, bytes]]:
    """A handle of a file of one payload, and what is in it."""
    data = os.urandom(MAX_PAYLOAD)
    _, opened = attacker.create(ROOT, b"big")
    attacker.write(opened.handle, 0, data)
    yield opened.handle, data


def test_peers_that_do_not_read_hold_nobody(attacker: Session, victim: Session, big: tuple[int, bytes]) -> None:
    """Replies of megabytes that nobody takes: the worker goes on to others, the rest goes out when there is room."""
    handle, data = big
    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(greedy_slot(attacker, index, handle)) for index in (1, 2, 3)]
        for _ in range(50):
            victim.getattr(ROOT)
        for sequence in range(1, 31):
            head = wire.read_header(receive_exactly(greedy[0], HEADER_BYTES))
            assert (head[0], head[5]) == (HEADER_BYTES + MAX_PAYLOAD, sequence)
            assert receive_exactly(greedy[0], MAX_PAYLOAD) == data


def cpu_s(engine: EngineProcess, wall_s: float) -> float:
    """Processor time that the engine takes in so much time."""
    process = psutil.Process(engine.pid)
    before = process.cpu_times()
    time.sleep(wall_s)
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system)


def test_a_peer_that_shuts_its_side_and_does_not_read_costs_nothing(
    target: EngineProcess, attacker: Session, big: tuple[int, bytes]
) -> None:
    with greedy_slot(attacker, 1, big[0]) as sock:
        sock.shutdown(socket.SHUT_WR)
        attacker.getattr(ROOT)
        assert cpu_s(target, 0.3) < 0.15


def test_the_end_of_a_session_cuts_connections_that_do_not_read(
    target: EngineProcess, attacker: Session, big: tuple[int, bytes]
) -> None:
    """What nobody takes must not keep a session, its descriptors and its locks alive."""
    with greedy_slot(attacker, 1, big[0]):
        attacker.detach()
        wait_until(lambda: len(target.figures()["sessions"]) == 1, "the session to end")
        wait_until(lambda: target.figures()["connections"] == 1, "its connections to be closed")


def test_connections_that_come_and_go(target: EngineProcess, victim: Session) -> None:
    for index in range(300):
        with raw(target) as sock:
            if index % 3 == 1:
                sock.sendall(b"\x20")
            elif index % 3 == 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert victim.getattr(ROOT).nlink


def test_sessions_that_are_opened_and_left(target: EngineProcess, victim: Session, share: Path) -> None:
    """Each is detached again by whoever holds it; none costs anything afterwards."""
    for _ in range(50):
        session = Session(target.address, target.share)
        session.opendir(ROOT)
        session.detach()
    wait_until(lambda: len(target.figures()["sessions"]) == 1, "the sessions to end")
