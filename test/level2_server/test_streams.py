"""FIFOs as an engine serves them: what waits, what is told of readiness, what breaks and is asked again."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import wire
from harness.engine_process import EngineProcess
from harness.session import Session, attach_stream, is_closed_by_peer
from harness.streams import (
    ERR,
    HUP,
    IN,
    OUT,
    PING_TAG,
    POLLABLE,
    STREAM,
    STREAM_READER,
    STREAM_WRITER,
    UNCACHED,
    answer,
    count,
    is_quiet,
    later,
    open_body,
    read_body,
    ready,
    write_body,
)
from harness.waiting import wait_until
from harness.wire import ROOT, Who

from qtfs_common.protocol import OPERATIONS

READ_NONBLOCK, WRITE_NONBLOCK = 1, 8
PIPE_BYTES = 65536


# ---- requests that wait


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


# ---- what is not confirmed, and what makes no sense


MOST_UNCONFIRMED = 64 << 20


def unconfirmed(engine: EngineProcess) -> int:
    """Bytes that the engine keeps for its one session, which has not confirmed them."""
    (held,) = engine.figures()["sessions"]
    return int(held["outbox_bytes"])


def ask_for_megabytes(session: Session, handle: int, tags: range) -> None:
    """READs in one piece on a new event channel that confirms nothing: the engine has them all before it can cut it."""
    session.lose_event()
    request = wire.caller(ROOT) + read_body(handle, 1 << 20)
    op = OPERATIONS["READ"]
    with attach_stream(session.address, session.ticket, wire.EVENT_SLOT) as sock:
        sock.sendall(b"".join(wire.message(op, request, slot=wire.EVENT_SLOT, tag=tag) for tag in tags))
        sock.shutdown(socket.SHUT_WR)
        assert is_closed_by_peer(sock)


@pytest.fixture
def megabyte(session: Session) -> int:
    """A handle of a regular file of a megabyte."""
    handle = session.create(ROOT, b"megabyte")[1].handle
    session.write(handle, 0, bytes(1 << 20))
    return handle


def take_all(session: Session, request: bytes, missing: set[int]) -> Iterator[bytes]:
    """The answers to READs, which are asked again over each fresh event channel; each comes once."""
    while missing:
        session.lose_event()
        with contextlib.suppress(ConnectionError):
            for tag in sorted(missing):
                later(session, "READ", request, tag)
            while missing:
                seen = session.event().seen
                reply = session.event().receive()
                if reply.sequence > seen:
                    assert (reply.op, reply.error) == (OPERATIONS["READ"], 0)
                    missing.remove(reply.tag)
                    yield reply.body
                    session.event().send("PING", tag=PING_TAG)


def test_what_came_before_the_cut_is_not_served(engine: EngineProcess, session: Session, megabyte: int) -> None:
    for begin in (0, 100, 200):
        ask_for_megabytes(session, megabyte, range(begin, begin + 100))
        assert unconfirmed(engine) <= MOST_UNCONFIRMED + (2 << 20)
    assert {len(body) for body in take_all(session, read_body(megabyte, 1 << 20), set(range(300)))} == {1 << 20}


def test_reads_that_wait_do_not_fill_the_outbox(engine: EngineProcess, fifo: Fifo, writing: int) -> None:
    """They leave in the FIFO what there is no room for, and get it when the client has come back and confirmed."""
    session, handle, tags = fifo.session, fifo.open(os.O_RDONLY), set(range(1200))
    for tag in tags:
        later(session, "READ", read_body(handle), tag)
    assert is_quiet(session)
    session.lose_event()
    written = bytearray()
    while select.select([], [writing], [], 0.2)[1]:
        piece = struct.pack("<I", len(written)) * (PIPE_BYTES // 4)
        written += piece[: os.write(writing, piece)]
    assert MOST_UNCONFIRMED < unconfirmed(engine) <= MOST_UNCONFIRMED + (1 << 20)
    got = bytearray()
    answers = take_all(session, read_body(handle), tags)
    while len(got) < len(written):
        got += next(answers)
    assert got == written


def test_nobody_is_told_of_readiness_when_the_outbox_is_full(session: Session, fifo: Fifo, megabyte: int) -> None:
    handle = fifo.open(os.O_RDWR)
    ask_for_megabytes(session, megabyte, range(100))
    body = struct.pack("<QQII", handle, 1, IN, 1)
    assert session.ask("POLL", body).error == errno.ENOMEM
    assert sum(map(len, take_all(session, read_body(megabyte, 1 << 20), set(range(100))))) == 100 << 20
    assert session.ask("POLL", body).error == 0


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
