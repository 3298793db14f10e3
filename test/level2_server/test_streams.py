"""FIFOs and devices as an engine serves them: what waits, what is told of readiness, what breaks and is asked again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import select
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import wire
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import thread_count
from harness.session import Session, attach_stream, is_closed_by_peer
from harness.waiting import wait_until
from harness.wire import ROOT, Reply, Who

from qtfs_common.protocol import OPERATIONS
from qtfs_common.whitelist import Type

STREAM_READER, STREAM_WRITER = 1 << 63, 1 << 63 | 1 << 61
UNCACHED, STREAM = 1, 4
READ_NONBLOCK, WRITE_NONBLOCK = 1, 8
POLLABLE = 2  # bit of a handle
PIPE_BYTES = 65536
IN, OUT, ERR, HUP = select.POLLIN, select.POLLOUT, select.POLLERR, select.POLLHUP
PING_TAG = 999_999


# ---- requests that wait


def open_body(flags: int) -> bytes:
    return struct.pack("<II", flags, 0)


def read_body(handle: int, size: int = 65536, flags: int = 0) -> bytes:
    return struct.pack("<QQII", handle, 0, size, flags)


def write_body(handle: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack("<QQII", handle, 0, len(data), flags) + data


def later(session: Session, op: str, body: bytes, tag: int, node: int = ROOT, who: Who | None = None) -> None:
    """Ask over the event channel."""
    session.event().send(op, wire.caller(node, who or session.who) + body, tag)


def answer(session: Session, op: str, tag: int) -> Reply:
    """The next message of the event channel, which must be that answer."""
    reply = session.event().receive()
    assert (reply.op, reply.tag, reply.flags) == (OPERATIONS[op], tag, 1), reply
    return reply


def is_quiet(session: Session) -> bool:
    """Nothing has come over the event channel, and the engine has seen all that was sent before."""
    session.event().send("PING", tag=PING_TAG)
    reply = session.event().receive()
    return reply.tag == PING_TAG


def count(reply: Reply) -> int:
    return int(struct.unpack("<Q", reply.body)[0])


class Fifo(NamedTuple):
    """A FIFO of the server and its node."""

    session: Session
    path: Path
    node: int

    def open(self, flags: int) -> int:
        """Without waiting; the handle."""
        return self.session.open(self.node, flags | os.O_NONBLOCK).handle

    def outcome(self, flags: int) -> int:
        """The errno of an OPEN on a slot."""
        return self.session.ask("OPEN", open_body(flags), node=self.node).error

    def is_opened(self, flags: int) -> int:
        """The server's own open(2), without waiting."""
        return os.open(self.path, flags | os.O_NONBLOCK)


@pytest.fixture
def fifo(session: Session, share: Path) -> Fifo:
    os.mkfifo(share / "fifo")
    return Fifo(session, share / "fifo", session.lookup(ROOT, b"fifo").node)


@pytest.fixture
def reading(fifo: Fifo) -> Iterator[int]:
    """The server's own reading end."""
    fd = fifo.is_opened(os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def writing(fifo: Fifo) -> Iterator[int]:
    """The server's own writing end; a reader stands by, so that it can be opened."""
    fd = fifo.is_opened(os.O_RDWR)
    yield fd
    os.close(fd)


# ---- opening


def test_a_fifo_is_no_file_to_be_created_or_truncated(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    opened = session.open(fifo.node, os.O_WRONLY | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK)
    assert opened.flags == UNCACHED | STREAM
    assert opened.handle & POLLABLE
    assert session.write(opened.handle, 77, b"data") == 4
    assert os.read(reading, 10) == b"data"
    session.release(opened.handle)
    body = struct.pack("<IIII", os.O_WRONLY, 0o644, 0, 0) + b"fifo"
    assert session.ask("CREATE", body).error == errno.ESTALE


def test_its_aliases_look_regular(fifo: Fifo) -> None:
    session = fifo.session
    true = session.getattr(fifo.node)
    assert stat.S_ISFIFO(true.mode)
    for alias, size in ((STREAM_READER, 0), (STREAM_WRITER, 1 << 62)):
        seen = session.getattr(fifo.node | alias)
        assert seen.mode == stat.S_IFREG | stat.S_IMODE(true.mode)
        assert (seen.ino, seen.size, seen.rdev) == (true.ino, size, 0)
        opened = session.open(fifo.node | alias, os.O_RDWR | os.O_NONBLOCK)
        session.release(opened.handle)
        mode, size_of_statx = struct.unpack_from("<H10xQ", session.statx(fifo.node | alias), 60)
        assert (mode, size_of_statx) == (seen.mode, size)


def test_openers_that_need_not_wait(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
        session.release(session.open(fifo.node, flags).handle)


def test_a_writer_without_reader(fifo: Fifo) -> None:
    assert fifo.outcome(os.O_WRONLY | os.O_NONBLOCK) == errno.ENXIO
    assert fifo.outcome(os.O_WRONLY) == errno.EINPROGRESS


def test_openers_wait_for_each_other(fifo: Fifo, engine: EngineProcess) -> None:
    session = fifo.session
    assert fifo.outcome(os.O_RDONLY) == errno.EINPROGRESS
    later(session, "OPEN", open_body(os.O_RDONLY), 1, fifo.node)
    assert is_quiet(session)
    later(session, "OPEN", open_body(os.O_WRONLY), 2, fifo.node)
    replies = {reply.tag: reply for reply in (session.event().receive(), session.event().receive())}
    assert [replies[tag].error for tag in (1, 2)] == [0, 0]
    reader, writer = (wire.opened(replies[tag].body) for tag in (1, 2))
    assert {reader.flags, writer.flags} == {UNCACHED | STREAM}
    assert session.write(writer.handle, 0, b"hello") == 5
    assert session.read(reader.handle, 0, 100) == b"hello"
    session.release(writer.handle)
    assert session.read(reader.handle, 0, 100) == b"", "the end: nobody writes any more"


def test_an_open_waits_for_a_process_of_the_server(fifo: Fifo) -> None:
    session = fifo.session
    later(session, "OPEN", open_body(os.O_WRONLY), 1, fifo.node)
    assert is_quiet(session)
    fd = os.open(fifo.path, os.O_RDONLY)  # it counts as a writer, so this need not wait for ever
    handle = wire.opened(answer(session, "OPEN", 1).body).handle
    assert session.write(handle, 0, b"x") == 1
    assert os.read(fd, 10) == b"x"
    os.close(fd)


def test_an_open_waits_as_its_caller(fifo: Fifo) -> None:
    fifo.path.chmod(0o040)
    session = fifo.session
    for who, error in ((Who(1000, 1000), errno.EACCES), (Who(1000, 1000, (1, 7)), 0), (Who(1000, 7), 0)):
        os.chown(fifo.path, 0, 7)
        with contextlib.closing(_descriptor(fifo.path)):
            later(session, "OPEN", open_body(os.O_RDONLY), 1, fifo.node, who)
            reply = answer(session, "OPEN", 1)
        assert reply.error == error
        if not error:
            session.release(wire.opened(reply.body).handle)


class _descriptor:
    """Both ends of a FIFO, open."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR)

    def close(self) -> None:
        os.close(self.fd)


def test_cancelled_openers(fifo: Fifo, engine: EngineProcess) -> None:
    session = fifo.session
    for tag in range(50):
        later(session, "OPEN", open_body(os.O_RDONLY), tag, fifo.node)
    session.event().send("CANCEL", tag=7)
    assert answer(session, "OPEN", 7).error == errno.EINTR
    for tag in (*range(7), *range(8, 50)):
        session.event().send("CANCEL", tag=tag)
    assert {session.event().receive()[2::3] for _ in range(49)} == {(errno.EINTR, tag) for tag in range(50) if tag != 7}
    session.event().send("CANCEL", tag=7)
    session.event().send("CANCEL", tag=12345)
    assert is_quiet(session), "who does not wait any more is not cancelled"
    assert fifo.outcome(os.O_WRONLY | os.O_NONBLOCK) == errno.ENXIO, "no reader is left"


def test_read_only_sessions_write_to_fifos(engine: EngineProcess, share: Path) -> None:
    """As a file system does that is mounted ro."""
    os.mkfifo(share / "fifo")
    fd = os.open(share / "fifo", os.O_RDWR)
    with Session(engine.address, share, read_only=True) as session:
        handle = session.open(session.lookup(ROOT, b"fifo").node, os.O_WRONLY).handle
        assert session.write(handle, 0, b"x") == 1
    assert os.read(fd, 10) == b"x"
    os.close(fd)


# ---- reading and writing


def test_a_read_waits_on_the_event_channel_only(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    assert session.ask("READ", read_body(handle, flags=READ_NONBLOCK)).error == errno.EAGAIN
    assert session.ask("READ", read_body(handle)).error == errno.EINPROGRESS
    later(session, "READ", read_body(handle, flags=READ_NONBLOCK), 3)
    assert answer(session, "READ", 3).error == errno.EAGAIN
    later(session, "READ", read_body(handle), 4)
    assert is_quiet(session)
    os.write(writing, b"news")
    assert answer(session, "READ", 4).body == b"news"
    os.write(writing, b"more")
    later(session, "READ", read_body(handle, 3), 5)
    assert answer(session, "READ", 5).body == b"mor"
    assert session.read(handle, 0, 100) == b"e"


def test_readers_are_served_in_their_order(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    for tag in range(1, 6):
        later(session, "READ", read_body(handle, 2), tag)
    assert is_quiet(session)
    os.write(writing, b"aabbccdde")
    assert [session.event().receive()[5:] for _ in range(5)] == list(enumerate([b"aa", b"bb", b"cc", b"dd", b"e"], 1))


def test_a_reader_sees_the_end(fifo: Fifo) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    assert session.read(handle, 0, 10) == b"", "nobody writes"
    fd = fifo.is_opened(os.O_WRONLY)
    later(session, "READ", read_body(handle), 1)
    assert is_quiet(session)
    os.close(fd)
    reply = answer(session, "READ", 1)
    assert (reply.error, reply.body) == (0, b"")


def test_a_write_waits_until_all_is_written(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_WRONLY)
    data = random.Random(1).randbytes(3 * PIPE_BYTES + 17)
    assert session.write(handle, 0, data[:PIPE_BYTES], WRITE_NONBLOCK) == PIPE_BYTES
    assert session.ask("WRITE", write_body(handle, b"x", WRITE_NONBLOCK)).error == errno.EAGAIN
    assert session.ask("WRITE", write_body(handle, b"x")).error == errno.EINPROGRESS
    later(session, "WRITE", write_body(handle, data[PIPE_BYTES:]), 1)
    assert is_quiet(session)
    got = b""
    while len(got) < len(data):
        wait_until(lambda: select.select([reading], [], [], 0)[0], "something to read")
        got += os.read(reading, 50000)
    assert count(answer(session, "WRITE", 1)) == len(data) - PIPE_BYTES
    assert got == data


def test_a_write_that_need_not_wait_may_write_a_part(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_WRONLY)
    assert session.write(handle, 0, bytes(2 * PIPE_BYTES)) == PIPE_BYTES
    os.read(reading, 8192)
    assert session.write(handle, 0, bytes(10000), WRITE_NONBLOCK) == 8192


def test_short_writes_are_whole(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_WRONLY)
    session.write(handle, 0, bytes(PIPE_BYTES - 100))
    assert session.ask("WRITE", write_body(handle, bytes(4096))).error == errno.EINPROGRESS
    later(session, "WRITE", write_body(handle, b"x" * 4096), 1)
    assert is_quiet(session)
    assert len(os.read(reading, 1 << 20)) == PIPE_BYTES - 100, "not even a part of it was there"
    assert count(answer(session, "WRITE", 1)) == 4096
    assert os.read(reading, 1 << 20) == b"x" * 4096


def test_writers_without_readers(fifo: Fifo) -> None:
    session = fifo.session
    fd = fifo.is_opened(os.O_RDONLY)
    handle = fifo.open(os.O_WRONLY)
    later(session, "WRITE", write_body(handle, bytes(PIPE_BYTES + 1)), 1)
    later(session, "WRITE", write_body(handle, b"none of it"), 2)
    assert is_quiet(session)
    os.close(fd)
    replies = {reply.tag: reply for reply in (session.event().receive(), session.event().receive())}
    assert count(replies[1]) == PIPE_BYTES, "what was written counts"
    assert replies[2].error == errno.EPIPE
    assert session.ask("WRITE", write_body(handle, b"x")).error == errno.EPIPE


def test_cancelled_reads_and_writes(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    writer = fifo.open(os.O_WRONLY)
    reader = fifo.open(os.O_RDONLY)
    later(session, "READ", read_body(reader), 1)
    session.event().send("CANCEL", tag=1)
    assert answer(session, "READ", 1).error == errno.EINTR
    later(session, "WRITE", write_body(writer, bytes(PIPE_BYTES + 5000)), 2)
    later(session, "WRITE", write_body(writer, b"x"), 3)
    assert is_quiet(session)
    session.event().send("CANCEL", tag=3)
    assert answer(session, "WRITE", 3).error == errno.EINTR
    session.event().send("CANCEL", tag=2)
    assert count(answer(session, "WRITE", 2)) == PIPE_BYTES, "the part that was written"
    session.event().send("CANCEL", tag=2)
    assert is_quiet(session)
    assert len(os.read(reading, 1 << 20)) == PIPE_BYTES
    assert session.write(writer, 0, b"y") == 1, "others are not affected"


def test_release_ends_what_waits(fifo: Fifo, writing: int, engine: EngineProcess) -> None:
    """Only a killed caller's request can be left then; its client waits for an answer to forget it."""
    session = fifo.session
    before = engine.descriptors()
    handle = fifo.open(os.O_RDWR)
    for tag in (1, 2):
        later(session, "READ", read_body(handle), tag)
    later(session, "WRITE", write_body(handle, bytes(PIPE_BYTES + 1)), 3)
    # That has filled the pipe, so the reads have got it: they are asked again until they wait.
    answered = [session.event().receive() for _ in range(3)]
    assert {reply.error for reply in answered} == {0}
    for tag in (4, 5):
        later(session, "READ", read_body(handle), tag)
    assert is_quiet(session)
    session.release(handle)
    assert {answer(session, "READ", tag).error for tag in (4, 5)} == {errno.EINTR}
    assert session.ask("READ", read_body(handle)).error == errno.ESTALE
    assert is_quiet(session)
    wait_until(lambda: engine.descriptors() == before + 1, "the descriptor to be closed")


def test_release_over_the_event_channel(fifo: Fifo) -> None:
    """A file that was opened for somebody who has died meanwhile."""
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    later(session, "RELEASE", struct.pack("<QQII", handle, 0, 0, 0), 9)
    assert answer(session, "RELEASE", 9).error == 0
    assert fifo.outcome(os.O_WRONLY | os.O_NONBLOCK) == errno.ENXIO


# ---- once


def test_a_repeated_read_gives_the_same_bytes(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    data = random.Random(2).randbytes(40000)
    os.write(writing, data)
    for size in (10, 600, 30000):  # short replies are kept in another place than long ones
        message = wire.message(
            OPERATIONS["READ"],
            wire.caller(ROOT) + read_body(handle, size),
            slot=1,
            sequence=session.slot(1).sequence + 1,
        )
        got = []
        for _ in range(3):
            with attach_stream(session.address, session.ticket, 1) as sock:
                sock.sendall(message)
                got.append(sock.recv(32 + size, 0x100))
        assert got[1:] == got[:1] * 2
        assert got[0][32:] == data[:size]
        data = data[size:]
        session.slot(1).sequence += 1
    session.reattach(1)
    assert session.read(handle, 0, 100000, slot=1) == data


def test_a_repeated_write_writes_once(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_WRONLY)
    message = wire.message(
        OPERATIONS["WRITE"], wire.caller(ROOT) + write_body(handle, b"once"), slot=1, sequence=1, tag=3
    )
    for _ in range(3):
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message)
            assert sock.recv(40, 0x100)[32:] == struct.pack("<Q", 4)
    assert os.read(reading, 100) == b"once"


def test_what_was_not_confirmed_comes_again(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    channel = session.event()
    channel.confirms = False
    got = []
    for tag in range(1, 6):
        os.write(writing, b"%d" % tag)
        later(session, "READ", read_body(handle), tag)
        got.append(answer(session, "READ", tag))
    assert [reply.sequence for reply in got] == [1, 2, 3, 4, 5]
    session.lose_event()
    again = session.event()
    assert [again.receive() for _ in range(5)] == got, "all of it, in order"
    for tag in (1, 5):
        again.confirms = False
        later(session, "READ", read_body(handle), tag)
    assert is_quiet(session), "their answers are on the way already"
    again.confirms, again.seen = True, 3
    again.send("PING", tag=PING_TAG)
    again.receive()
    session.lose_event()
    third = session.event()
    assert [third.receive() for _ in range(2)] == got[3:], "what was confirmed does not come"
    assert is_quiet(session)


def test_a_request_that_comes_again_waits_once(fifo: Fifo, writing: int, engine: EngineProcess) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    later(session, "OPEN", open_body(os.O_RDONLY), 8, session.mknod(ROOT, b"other", stat.S_IFIFO | 0o600).node)
    later(session, "READ", read_body(handle, 4), 6)
    for _ in range(3):
        session.lose_event()
        later(session, "READ", read_body(handle, 4), 6)
        later(session, "OPEN", open_body(os.O_RDONLY), 8, session.lookup(ROOT, b"other").node)
    assert is_quiet(session)
    os.write(writing, b"12345678")
    assert answer(session, "READ", 6).body == b"1234"
    fd = os.open(fifo.path.with_name("other"), os.O_WRONLY)
    answer(session, "OPEN", 8)
    assert is_quiet(session)
    assert session.read(handle, 0, 10) == b"5678"
    assert engine.figures()["sessions"][0]["handles"] == 2
    os.close(fd)


#: A program that says 20,000 numbers.
NUMBERS = """
import struct, sys
for number in range(20000):
    sys.stdout.buffer.write(struct.pack("<I", number))
    if number % 7 == 0:
        sys.stdout.flush()
"""


def test_numbered_bytes_across_many_cuts(fifo: Fifo) -> None:
    """The connection breaks while data comes: at every point of the exchange, sooner or later."""
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    with open(fifo.path, "wb") as end:
        source = subprocess.Popen([sys.executable, "-I", "-S", "-c", NUMBERS], stdout=end)
    chance = random.Random(3)
    got = b""
    tag = 0
    seen = 0
    while len(got) < 80000:
        tag += 1
        request = read_body(handle, chance.choice([4, 100, 3000]))
        later(session, "READ", request, tag)
        while chance.random() < 0.3:
            session.lose_event()
            later(session, "READ", request, tag)
        reply = session.event().receive()
        while reply.sequence <= seen:
            reply = session.event().receive()
        seen = reply.sequence
        assert (reply.tag, reply.error) == (tag, 0)
        got += reply.body
    assert source.wait() == 0
    assert struct.unpack("<20000I", got) == tuple(range(20000))


def test_opens_across_many_cuts(fifo: Fifo, engine: EngineProcess) -> None:
    """However often an OPEN is repeated, it makes one handle."""
    session = fifo.session
    chance = random.Random(4)
    seen = 0
    for tag in range(1, 101):
        later(session, "OPEN", open_body(os.O_WRONLY), tag, fifo.node)
        fd = -1
        for step in range(4):
            if step == tag % 4:
                fd = fifo.is_opened(os.O_RDONLY)
            if chance.random() < 0.7:
                session.lose_event()
                later(session, "OPEN", open_body(os.O_WRONLY), tag, fifo.node)
        reply = session.event().receive()
        while reply.sequence <= seen:
            reply = session.event().receive()
        seen = reply.sequence
        assert (reply.tag, reply.error) == (tag, 0)
        session.release(wire.opened(reply.body).handle)
        assert os.read(fd, 1) == b"", "no other writer was opened"
        os.close(fd)
    assert engine.figures()["sessions"][0]["handles"] == 0


# ---- readiness


def test_what_is_ready(fifo: Fifo) -> None:
    session = fifo.session
    reader = fifo.open(os.O_RDONLY)
    assert session.poll(reader, IN | OUT) == 0
    writer = fifo.open(os.O_WRONLY)
    assert session.poll(reader, IN | OUT) == 0
    assert session.poll(writer, IN | OUT) == OUT
    session.write(writer, 0, bytes(PIPE_BYTES))
    assert (session.poll(reader, IN), session.poll(writer, OUT)) == (IN, 0)
    assert session.poll_and_count(reader, IN | OUT) == (IN, PIPE_BYTES)
    assert session.poll_and_count(writer, OUT) == (0, 0)
    assert session.getattr(fifo.node | STREAM_READER).size == 0, "whatever there is: programs believe it"
    session.release(writer)
    assert session.poll(reader, IN) == IN | HUP
    session.read(reader, 0, PIPE_BYTES)
    assert session.poll(reader, IN) == session.poll(reader, 0) == HUP
    writer = fifo.open(os.O_WRONLY)
    session.release(reader)
    assert session.poll(writer, OUT) == OUT | ERR


def ready(session: Session) -> int:
    """The tag of the READY that comes next."""
    message = session.event().receive()
    assert (message.op, message.flags, message.error, message.body) == (OPERATIONS["READY"], 0, 0, b"")
    return message.tag


def test_ready_comes_once_for_each_poll_and_arrival(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    assert session.poll(handle, IN, notify=70) == 0
    assert is_quiet(session)
    os.write(writing, b"a")
    assert ready(session) == 70
    os.write(writing, b"b")
    assert is_quiet(session), "nobody has asked since"
    assert session.poll(handle, IN, notify=71) == IN
    assert is_quiet(session), "what POLL itself has told is no news"
    os.write(writing, b"c")
    assert ready(session) == 71, "every arrival is, though the file was ready all the time"
    for notify in (72, 73, 74):
        assert session.poll(handle, IN, notify=notify) == IN
    os.write(writing, b"d")
    assert ready(session) == 74
    assert is_quiet(session)
    session.poll(handle, IN)
    os.write(writing, b"e")
    assert is_quiet(session), "that POLL wanted no notice"


def test_interest_that_grows_is_no_edge(fifo: Fifo, writing: int) -> None:
    """An epoll tells how a file stands when it is asked for more; a client was told that by POLL itself."""
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    os.write(writing, b"x")
    for number, events in enumerate((0, IN, IN | select.POLLPRI, IN | OUT, IN | OUT | select.POLLRDHUP)):
        for _ in range(5):
            session.poll(handle, events, notify=number)
            assert is_quiet(session), hex(events)
    os.write(writing, b"y")
    assert ready(session) == 4


def test_ready_for_hang_up_and_error(fifo: Fifo) -> None:
    session = fifo.session
    fd = fifo.is_opened(os.O_RDWR)
    reader = fifo.open(os.O_RDONLY)
    assert session.poll(reader, 0, notify=1) == 0
    os.close(fd)
    assert ready(session) == 1
    assert session.poll(reader, 0) == HUP
    writer = fifo.open(os.O_WRONLY)
    session.write(writer, 0, bytes(PIPE_BYTES))
    assert session.poll(writer, OUT, notify=2) == 0
    session.release(reader)
    assert ready(session) == 2
    assert session.poll(writer, OUT) & ERR


def test_ready_for_room(fifo: Fifo, reading: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_WRONLY)
    session.write(handle, 0, bytes(PIPE_BYTES))
    assert session.poll(handle, OUT, notify=1) == 0
    os.read(reading, PIPE_BYTES)
    assert ready(session) == 1
    assert session.poll(handle, OUT) == OUT


def test_ready_is_repeated_until_it_is_confirmed(fifo: Fifo, writing: int) -> None:
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    session.event()
    session.poll(handle, IN, notify=5)
    session.lose_event()
    os.write(writing, b"x")
    assert ready(session) == 5
    session.lose_event()
    assert ready(session) == 5
    assert is_quiet(session)
    session.lose_event()
    assert is_quiet(session)


def test_a_reader_that_waits_and_one_that_polls(fifo: Fifo, writing: int) -> None:
    """Of two programs on one handle, one may wait in read(2) and the other in poll(2)."""
    session = fifo.session
    handle = fifo.open(os.O_RDONLY)
    later(session, "READ", read_body(handle, 1), 1)
    session.poll(handle, IN, notify=2)
    os.write(writing, b"ab")
    assert {(reply.op, reply.tag) for reply in (session.event().receive(), session.event().receive())} == {
        (OPERATIONS["READ"], 1),
        (OPERATIONS["READY"], 2),
    }
    assert session.poll(handle, IN) == IN


def test_ordinary_files_are_always_ready(session: Session, share: Path) -> None:
    (share / "f").touch()
    handle = session.open(session.lookup(ROOT, b"f").node, os.O_RDWR).handle
    assert not handle & POLLABLE
    session.event()
    assert session.poll(handle, IN | OUT | select.POLLPRI, notify=1) == IN | OUT
    assert is_quiet(session)


# ---- the ends of sessions and clients


def test_thousands_wait_when_the_session_ends(engine: EngineProcess, share: Path) -> None:
    """No thread and no descriptor stays."""
    os.mkfifo(share / "silent")
    os.mkfifo(share / "full")
    fds = [os.open(share / name, os.O_RDWR | os.O_NONBLOCK) for name in ("silent", "full")]
    os.write(fds[1], bytes(PIPE_BYTES))
    before = engine.descriptors()
    threads = thread_count(engine.pid)
    with Session(engine.address, share) as session:
        nodes = [session.lookup(ROOT, name).node for name in (b"silent", b"full")]
        alone = session.mknod(ROOT, b"alone", stat.S_IFIFO | 0o600).node
        handles = [session.open(node, os.O_RDWR).handle for node in nodes]
        for tag in range(2000):
            later(session, "READ", read_body(handles[0]), 4 * tag)
            later(session, "WRITE", write_body(handles[1], bytes(100)), 4 * tag + 1)
        for tag in range(500):
            later(session, "OPEN", open_body(os.O_RDONLY), 4 * tag + 2, alone)
        assert is_quiet(session)
        assert session.statfs(), "slots go on"
        assert thread_count(engine.pid) > threads
    wait_until(lambda: engine.descriptors() == before, "the descriptors to be closed")
    with pytest.raises(OSError) as refused:
        os.open(share / "alone", os.O_WRONLY | os.O_NONBLOCK)
    assert refused.value.errno == errno.ENXIO, "no reader is left"
    for fd in fds:
        os.close(fd)
    wait_until(lambda: thread_count(engine.pid) <= threads, "threads that nobody needs to end", 15)


def test_a_client_that_does_not_read(engine: EngineProcess, share: Path) -> None:
    """It harms nobody else; when it reads again it finds all, in order."""
    os.mkfifo(share / "fifo")
    os.mkfifo(share / "other")
    source = os.open(share / "fifo", os.O_RDWR)
    fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 1 << 20)
    with Session(engine.address, share) as silent, Session(engine.address, share) as other:
        handle = silent.open(silent.lookup(ROOT, b"fifo").node, os.O_RDWR).handle
        for tag in range(20):
            os.write(source, bytes([tag]) * (1 << 19))
            later(silent, "READ", read_body(handle, 1 << 20), tag)
            wait_until(lambda: not select.select([source], [], [], 0)[0], "the engine to read it")
        both = other.open(other.lookup(ROOT, b"other").node, os.O_RDWR).handle
        for tag in range(50):
            later(other, "READ", read_body(both), tag)
            other.write(both, 0, b"ping")
            assert answer(other, "READ", tag).body == b"ping"
        for tag in range(20):
            assert answer(silent, "READ", tag).body == bytes([tag]) * (1 << 19)
    os.close(source)


def test_a_client_that_confirms_nothing_is_cut_off(engine: EngineProcess, share: Path) -> None:
    os.mkfifo(share / "fifo")
    source = os.open(share / "fifo", os.O_RDWR)
    fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 1 << 20)
    with Session(engine.address, share) as session:
        handle = session.open(session.lookup(ROOT, b"fifo").node, os.O_RDWR).handle
        session.event().confirms = False
        with pytest.raises(OSError):
            for tag in range(200):
                os.write(source, bytes(1 << 20))
                later(session, "READ", read_body(handle, 1 << 20), tag)
                answer(session, "READ", tag)
        assert 60 <= tag <= 70
        session.statfs()
    os.close(source)
    wait_until(engine.is_idle, "the engine to let it go")
    assert engine.resident_bytes() < 400 << 20


BAD = {
    "POLL, short": ("POLL", struct.pack("<QQI", 1, 1, 1), True),
    "POLL, long": ("POLL", struct.pack("<QQIIQ", 1, 1, 1, 1, 1), True),
    "READ, short": ("READ", struct.pack("<QQI", 1, 0, 1), False),
    "READ, too much": ("READ", struct.pack("<QQII", 1, 0, (1 << 20) + 1, 0), False),
    "WRITE, less data": ("WRITE", struct.pack("<QQII", 1, 0, 5, 0) + b"1234", False),
    "WRITE, more data": ("WRITE", struct.pack("<QQII", 1, 0, 3, 0) + b"1234", False),
    "OPEN, long": ("OPEN", bytes(9), False),
    "RELEASE, short": ("RELEASE", bytes(8), False),
    "GETATTR": ("GETATTR", bytes(16), False),
    "POLL": ("POLL", bytes(24), False),
    "LOOKUP": ("LOOKUP", b"name", False),
    "READY": ("READY", b"", False),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_messages_end_their_connection(session: Session, case: str) -> None:
    op, body, on_slot = BAD[case]
    session.event()
    index = 1 if on_slot else wire.EVENT_SLOT
    with attach_stream(session.address, session.ticket, index) as sock:
        sock.sendall(wire.message(OPERATIONS[op], wire.caller(ROOT) + body, slot=index, sequence=1))
        assert is_closed_by_peer(sock)
    session.statfs()


def test_cancel_with_a_body_ends_the_connection(session: Session) -> None:
    with attach_stream(session.address, session.ticket, wire.EVENT_SLOT) as sock:
        sock.sendall(wire.message(OPERATIONS["CANCEL"], b"x", slot=wire.EVENT_SLOT))
        assert is_closed_by_peer(sock)


def test_handles_that_are_none(session: Session) -> None:
    for op, body in (
        ("POLL", struct.pack("<QQII", 4711, 1, 1, 1)),
        ("READ", read_body(4711)),
        ("WRITE", write_body(4711, b"x")),
    ):
        assert session.ask(op, body).error == errno.ESTALE
    later(session, "READ", read_body(4711), 1)
    assert answer(session, "READ", 1).error == errno.ESTALE
    later(session, "OPEN", open_body(0), 2, 4711)
    assert answer(session, "OPEN", 2).error == errno.ESTALE


# ---- devices


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that names all of /dev, and in its share the device `named`."""
    area = tmp_path_factory.mktemp("devices")
    rules = {kind: [area / "share", "/dev", "/proc"] for kind in everything_below("/")}
    rules[Type.OPEN] = [area / "share", area / "share/named", "/dev", "/proc"]
    with EngineProcess(area, rules=rules).running() as engine:
        yield engine


@pytest.fixture
def dev(devices: EngineProcess) -> Iterator[Session]:
    with Session(devices.address, "/dev") as session:
        yield session
    wait_until(devices.is_idle, "the engine to let everything go")


@pytest.mark.root
def test_only_named_devices_are_opened(devices: EngineProcess) -> None:
    numbers = os.makedev(1, 5)
    (devices.share / "below").mkdir(exist_ok=True)
    for name in ("named", "unnamed", "below/named"):
        os.mknod(devices.share / name, stat.S_IFCHR | 0o666, numbers)
    os.link(devices.share / "unnamed", devices.share / "other-name")
    with Session(devices.address, devices.share) as session:
        named = session.lookup(ROOT, b"named")
        assert (stat.S_IFMT(named.attr.mode), named.attr.rdev) == (stat.S_IFCHR, 1 << 8 | 5)
        handle = session.open(named.node, os.O_RDONLY).handle
        assert session.read(handle, 12345, 100) == bytes(100)
        for path in ("unnamed", "below/named", "other-name"):
            node = session.walk(path).node
            for flags in (os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK, os.O_RDWR):
                reply = session.ask("OPEN", open_body(flags), node=node)
                assert reply.error == errno.EACCES, path
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=named.node, who=Who(1000, 1000)).error == 0
        os.chmod(devices.share / "named", 0o600)
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=named.node, who=Who(1000, 1000)).error == errno.EACCES
    for name in ("named", "unnamed", "below/named", "other-name"):
        (devices.share / name).unlink()


@pytest.mark.root
def test_an_unnamed_device_is_refused_before_it_is_opened(devices: EngineProcess) -> None:
    """Opening the slave of a locked pty fails with EIO, a device that is none with ENXIO: neither must show."""
    os.mknod(devices.share / "none", stat.S_IFCHR | 0o666, os.makedev(250, 77))
    with Session(devices.address, devices.share) as session:
        node = session.lookup(ROOT, b"none").node
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=node).error == errno.EACCES
    (devices.share / "none").unlink()
    os.mknod(devices.share / "named", stat.S_IFCHR | 0o666, os.makedev(250, 77))
    with Session(devices.address, devices.share) as session:
        node = session.lookup(ROOT, b"named").node
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=node).error == errno.ENXIO
    (devices.share / "named").unlink()


def test_sockets_cannot_be_opened(session: Session, share: Path) -> None:
    os.mknod(share / "socket", stat.S_IFSOCK | 0o666)
    assert session.ask("OPEN", open_body(os.O_RDWR), node=session.lookup(ROOT, b"socket").node).error == errno.ENXIO


def test_memory_devices(dev: Session) -> None:
    handles = {name: dev.open(dev.lookup(ROOT, name).node, os.O_RDWR).handle for name in (b"null", b"zero", b"full")}
    assert dev.read(handles[b"null"], 0, 10) == b""
    assert dev.write(handles[b"null"], 0, bytes(100000)) == 100000
    assert dev.read(handles[b"zero"], 0, 100000) == bytes(100000)
    assert dev.ask("WRITE", write_body(handles[b"full"], b"x")).error == errno.ENOSPC
    random_handle = dev.open(dev.lookup(ROOT, b"urandom").node).handle
    one, two = (dev.read(random_handle, 0, 64) for _ in range(2))
    assert len(one) == len(two) == 64 and one != two
    assert dev.poll(handles[b"zero"], IN | OUT, notify=1) == IN | OUT
    later(dev, "READ", read_body(handles[b"zero"], 10), 1)
    assert answer(dev, "READ", 1).body == bytes(10)
    later(dev, "WRITE", write_body(handles[b"null"], b"12345"), 2)
    assert count(answer(dev, "WRITE", 2)) == 5
    assert dev.ask("IOCTL", struct.pack("<QIIII", handles[b"null"], termios.TIOCGWINSZ, 0, 8, 0)).error == errno.ENOTTY


TCGETS2, TCSETS2, TIOCGPTN, TIOCSPTLCK = 0x802C542A, 0x402C542B, 0x80045430, 0x40045431


def test_a_pty(dev: Session) -> None:
    master = dev.open(dev.lookup(ROOT, b"ptmx").node, os.O_RDWR).handle
    number = struct.unpack("<I", dev.ioctl(master, TIOCGPTN, out_size=4))[0]
    dev.ioctl(master, TIOCSPTLCK, struct.pack("<I", 0))
    slave = dev.open(dev.walk(f"pts/{number}").node, os.O_RDWR).handle
    settings = bytearray(dev.ioctl(slave, TCGETS2, out_size=44))
    flags = struct.unpack_from("<I", settings, 12)[0]
    struct.pack_into("<I", settings, 12, flags & ~(termios.ICANON | termios.ECHO))
    dev.ioctl(slave, TCSETS2, bytes(settings))
    assert dev.ioctl(slave, TCGETS2, out_size=44) == bytes(settings)
    later(dev, "READ", read_body(slave), 1)
    assert is_quiet(dev)
    dev.write(master, 0, b"keys")
    assert answer(dev, "READ", 1).body == b"keys"
    assert dev.poll(master, IN, notify=2) == 0
    dev.write(slave, 0, b"out\n")
    assert ready(dev) == 2
    assert dev.read(master, 0, 100) == b"out\r\n"
    dev.release(slave)
    assert dev.poll(master, IN) & HUP
    # Hostile: what would reach beyond the device, or into the engine's memory.
    for command in (
        termios.TIOCSTI,
        termios.TIOCSCTTY,
        termios.TIOCCONS,
        termios.TIOCSWINSZ,
        0x5441,
        0x5413,
        0xFFFFFFFF,
    ):
        body = struct.pack("<QIIII", master, command, 8, 8, 0) + bytes(8)
        assert dev.ask("IOCTL", body).error == errno.ENOTTY, hex(command)
    assert dev.ask("IOCTL", struct.pack("<QIIII", master, TIOCGPTN, 0, 3, 0)).error == errno.EINVAL
    assert dev.ask("IOCTL", struct.pack("<QIIII", master, TCSETS2, 43, 0, 0) + bytes(43)).error == errno.EINVAL


@pytest.mark.root
def test_a_block_device(devices: EngineProcess, tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(1 << 20))
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    loop = made.stdout.strip()
    try:
        with Session(devices.address, "/dev") as session:
            node = session.lookup(ROOT, os.fsencode(os.path.basename(loop))).node
            assert stat.S_ISBLK(session.getattr(node).mode)
            assert session.getattr(node | STREAM_READER).size == 1 << 20
            opened = session.open(node, os.O_RDWR)
            assert opened.flags == UNCACHED
            assert session.write(opened.handle, 5000, b"here") == 4
            assert session.read(opened.handle, 4998, 8) == b"\0\0here\0\0"
            assert session.read(opened.handle, (1 << 20) - 2, 100) == b"\0\0"
            session.fsync(opened.handle)
            assert struct.unpack("<Q", session.ioctl(opened.handle, 0x80081272, out_size=8))[0] == 1 << 20
            assert session.ask("WRITE", write_body_at(opened.handle, 1 << 20, b"x")).error == errno.ENOSPC
            session.release(opened.handle)
        assert backing.read_bytes()[4998:5006] == b"\0\0here\0\0"
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


def write_body_at(handle: int, offset: int, data: bytes) -> bytes:
    return struct.pack("<QQII", handle, offset, len(data), 0) + data


# ---- pseudo files


def test_poll_of_the_mount_table(devices: EngineProcess, tmp_path: Path) -> None:
    """The engine's own; a bind mount in its namespace changes it."""
    with Session(devices.address, "/proc") as session:
        handle = session.open(session.walk(f"{devices.pid}/mounts").node).handle
        assert handle & POLLABLE
        text = session.read(handle, 0, 1 << 20)
        assert session.poll(handle, IN | select.POLLPRI, notify=1) == IN
        assert is_quiet(session)
        subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
        try:
            assert ready(session) == 1
            assert session.poll(handle, IN | select.POLLPRI) == IN | select.POLLPRI | ERR
        finally:
            subprocess.run(["umount", tmp_path], check=True)
        assert text
