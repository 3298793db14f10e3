"""Long WRITEs, which the engine begins before all of them has come: cut, held up, refused, too long for the file."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import TRANSPORTS, EngineProcess
from harness.session import MAX_PAYLOAD, Session, attach_stream, receive_exactly
from harness.waiting import wait_until
from harness.wire import HEADER_BYTES, ROOT

from qtfs_common.protocol import OPERATIONS

LIMIT = 64 << 20
#: What stands before the data in a WRITE.
FIXED = HEADER_BYTES + 24 + 24
#: Longer than a worker waits for the rest of a message.
STALL_S = 0.05
WORKERS = 2
#: By then the engine has started others in the places of workers that are held.
WATCHED_S = 1.5


@pytest.fixture(scope="module", params=TRANSPORTS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    area = tmp_path_factory.mktemp(f"early-{request.param}")
    with EngineProcess(area, request.param, workers=WORKERS, limits=(f"--fsize={LIMIT}",)).running() as engine:
        yield engine
        engine.check_log()


@pytest.fixture
def session(target: EngineProcess) -> Iterator[Session]:
    """Slot 0 is the test's means to look; the others write."""
    with Session(target.address, target.share, slots=8) as opened:
        yield opened
    for name in os.listdir(target.share):
        (target.share / name).unlink()
    wait_until(target.is_idle, "the engine to let everything go")


def write_message(handle: int, offset: int, data: bytes, sequence: int, *, flags: int = 0, slot: int = 1) -> bytes:
    body = wire.caller(ROOT) + struct.pack("<QQII", handle, offset, len(data), flags) + data
    return wire.message(OPERATIONS["WRITE"], body, slot=slot, sequence=sequence)


def answer(sock: socket.socket) -> tuple[int, int]:
    """(errno, count) of the reply to a WRITE."""
    head = receive_exactly(sock, HEADER_BYTES)
    assert len(head) == HEADER_BYTES, "the connection was closed"
    length, error = wire.read_header(head)[0], wire.read_header(head)[3]
    body = receive_exactly(sock, length - HEADER_BYTES)
    return error, struct.unpack("<Q", body)[0] if body else 0


def last_sequence(session: Session, slot: int = 1) -> int:
    connection, last = session.engine.attach(session.ticket, slot)
    connection.close()
    return last


def size_of(path: Path) -> int:
    return path.stat().st_size


def somewhere(seed: random.Random, size: int) -> int:
    """A place to cut a message: at its ends, and at the edges of pages, more often than elsewhere."""
    page = FIXED + 4096 * seed.randrange(size // 4096) + seed.choice((-1, 0, 1))
    return seed.choice((seed.randrange(size), page, seed.randrange(FIXED + 2), size - 1 - seed.randrange(4)))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_cut_is_whole_after_its_repetition(session: Session, target: EngineProcess, seed: int) -> None:
    """Of any length, at any place, cut anywhere, with a pause in it or without: half a request does not count."""
    draw = random.Random(seed)
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    expected = bytearray()
    for sequence in range(1, 9):
        offset = draw.choice((0, 4096 * draw.randrange(64), draw.randrange(300_000)))
        data = draw.randbytes(draw.choice((MAX_PAYLOAD, draw.randrange(130_000, MAX_PAYLOAD))))
        message = write_message(opened.handle, offset, data, sequence)
        cut, pause = somewhere(draw, len(message)), draw.choice((0, 0, STALL_S))
        with attach_stream(session.address, session.ticket, 1) as sock:
            first = draw.randrange(cut + 1) if pause else cut
            sock.sendall(message[:first])
            time.sleep(pause)
            sock.sendall(message[first:cut])
        assert last_sequence(session) == sequence - 1
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message)
            assert answer(sock) == (0, len(data))
        expected.extend(bytes(max(0, offset + len(data) - len(expected))))
        expected[offset : offset + len(data)] = data
        assert (target.share / "f").read_bytes() == expected
    session.release(opened.handle)


@pytest.mark.parametrize("seed", range(4))
def test_what_comes_in_pieces_is_written_once_it_is_whole(session: Session, target: EngineProcess, seed: int) -> None:
    """Pieces and pauses of any length: the connection goes back to the epoll and comes again."""
    draw = random.Random(seed)
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    with attach_stream(session.address, session.ticket, 1) as sock:
        for sequence in range(1, 5):
            data = draw.randbytes(draw.randrange(200_000, MAX_PAYLOAD))
            message = write_message(opened.handle, 123 * sequence, data, sequence)
            places = sorted(somewhere(draw, len(message)) for _ in range(6))
            for begin, end in itertools.pairwise((0, *places, len(message))):
                sock.sendall(message[begin:end])
                time.sleep(draw.choice((0, 0.001, STALL_S)))
            assert answer(sock) == (0, len(data))
            with (target.share / "f").open("rb") as file:
                file.seek(123 * sequence)
                assert file.read(len(data)) == data
    session.release(opened.handle)


def test_the_beginning_is_written_before_the_end_has_come(session: Session, target: EngineProcess) -> None:
    """That it is begun at all. Whoever stops in the middle holds nobody, and may go on later."""
    data = os.urandom(MAX_PAYLOAD)
    path = target.share / "f"
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    message = write_message(opened.handle, 0, data, 1)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(message[: len(message) // 2])
        wait_until(lambda: size_of(path) >= 400_000, "the first half to be written")
        sock.sendall(message[len(message) // 2 :])
        assert answer(sock) == (0, len(data))
    assert path.read_bytes() == data
    session.release(opened.handle)


def test_peers_that_stop_in_the_middle_hold_no_worker(session: Session, target: EngineProcess) -> None:
    """More of them than there are workers: others are served, and no worker has to stand in for one that is held."""
    data = os.urandom(MAX_PAYLOAD)
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    socks = []
    try:
        for slot in range(1, 8):
            message = write_message(opened.handle, slot * MAX_PAYLOAD, data, 1, slot=slot)
            socks.append(attach_stream(session.address, session.ticket, slot))
            socks[-1].sendall(message[: 100_000 * slot])
        begin = time.monotonic()
        for _ in range(50):
            session.getattr(ROOT)
        assert time.monotonic() - begin < 3
        while time.monotonic() - begin < WATCHED_S:
            session.getattr(ROOT)
        wait_until(lambda: target.figures()["workers"] == WORKERS, "the workers to be free")
    finally:
        for sock in socks:
            sock.close()
    session.release(opened.handle)


@pytest.mark.parametrize("seed", range(4))
def test_appends_are_never_begun_early(session: Session, target: EngineProcess, seed: int) -> None:
    """What is cut is not there, so its repetition is there once."""
    draw = random.Random(seed)
    path = target.share / "log"
    _, opened = session.create(ROOT, b"log", os.O_WRONLY | os.O_APPEND)
    expected = b""
    for sequence in range(1, 7):
        data = draw.randbytes(draw.randrange(150_000, MAX_PAYLOAD))
        message = write_message(opened.handle, 0, data, sequence, flags=2)
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message[: somewhere(draw, len(message))])
            time.sleep(draw.choice((0, STALL_S)))
        assert path.read_bytes() == expected
        for _ in range(2):  # the second time as if the reply had been lost
            with attach_stream(session.address, session.ticket, 1) as sock:
                sock.sendall(message)
                assert answer(sock) == (0, len(data))
        expected += data
        assert path.read_bytes() == expected
    session.release(opened.handle)


def test_a_file_that_cannot_grow_further_takes_a_part(session: Session, target: EngineProcess) -> None:
    """As write(2) has it: how much there was room for, and the error the next time."""
    data = os.urandom(MAX_PAYLOAD)
    path = target.share / "f"
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(write_message(opened.handle, LIMIT - 300_000, data, 1))
        assert answer(sock) == (0, 300_000)
        sock.sendall(write_message(opened.handle, LIMIT, data, 2))
        assert answer(sock)[0] == 27  # EFBIG
        sock.sendall(write_message(opened.handle, 0, data, 3))
        assert answer(sock) == (0, len(data))
    with path.open("rb") as file:
        assert file.read(len(data)) == data
        file.seek(LIMIT - 300_000)
        assert file.read() == data[:300_000]
    session.release(opened.handle)


def test_what_may_not_be_written_is_not(session: Session, target: EngineProcess) -> None:
    """A handle for reading, none at all, and a message whose lengths do not agree."""
    data = os.urandom(MAX_PAYLOAD)
    path = target.share / "f"
    path.write_bytes(b"as it was")
    reading = session.open(session.lookup(ROOT, b"f").node).handle
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(write_message(reading, 0, data, 1))
        assert answer(sock)[0] == 9  # EBADF
        sock.sendall(write_message(0x7777777777, 0, data, 2))
        assert answer(sock)[0] != 0
    writing = session.open(session.lookup(ROOT, b"f").node, os.O_RDWR).handle
    body = wire.caller(ROOT) + struct.pack("<QQII", writing, 0, len(data) - 1, 0) + data
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(wire.message(OPERATIONS["WRITE"], body, slot=1, sequence=3))
        assert receive_exactly(sock, 1) == b""
    assert path.read_bytes() == b"as it was"
    for handle in (reading, writing):
        session.release(handle)
