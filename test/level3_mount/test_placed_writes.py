"""Over shared memory the kernel puts the data of long WRITEs where the engine reads it (rings.md, 5), and what
becomes of it there when the engine dies.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.freezing_fs import FreezingFs
from harness.mounts import MountProcess
from harness.ring_file import EPOCH, REQUEST_BYTES, RingFile, bar_path
from harness.waiting import wait_until

from qtfs_client.places import place_of
from qtfs_client.remote_host import mount_figures, served_from

pytestmark = pytest.mark.root

MIB = 1 << 20
#: Of a WRITE, that come into a buffer of the client's.
IN_BUFFER = 16384
DATA = random.Random(3).randbytes(16 * MIB)
#: Requests that the client answers by itself, and looks for the next one after each.
KEEP_AWAKE = 200
ATTEMPTS = 50
PIECES = 30
#: So many requests of one session hang in one file system before others are delayed: stuck.pyx.
MOST_OF_MOUNT = 8
PUT_OFF_BYTES = 200_000


Figures: TypeAlias = Callable[[], dict[str, Any]]


@contextlib.contextmanager
def ends(area: Path, transport: str = "shm", options: str = "") -> Iterator[Ends]:
    with EngineProcess(area / "engine", transport).running() as engine:
        options = f"driver=fuse3,cache=none,run_dir={area / 'run'},{options}"
        with MountProcess(engine, engine.share, area / "mnt", options).running() as mount:
            yield Ends(mount, area / "run")


def write_all(path: Path) -> None:
    """DATA, a mebibyte at a time."""
    pieces = [memoryview(DATA)[at : at + MIB] for at in range(0, len(DATA), MIB)]
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            assert file.write(piece) == MIB


@contextlib.contextmanager
def memory_file_system(point: Path) -> Iterator[None]:
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "test", point], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", point], check=True)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_long_writes_are_read_where_the_engine_finds_them(tmp_path: Path, transport: str) -> None:
    """Most of them: who slept when one came has it in a buffer. A socket has no such place."""
    with ends(tmp_path, transport) as both:
        deadline = time.monotonic() + 30
        before = both.client["placed"]
        write_all(both.mount.point / "f")
        while transport == "shm" and both.client["placed"] - before < 8 * (MIB - IN_BUFFER):
            assert time.monotonic() < deadline, "they are copied"
            before = both.client["placed"]
            write_all(both.mount.point / "f")
        assert (both.client["placed"] > 0) == (transport == "shm")
        assert (both.mount.engine.share / "f").read_bytes() == DATA


@pytest.mark.parametrize("size", [IN_BUFFER - 1, IN_BUFFER, IN_BUFFER + 1, IN_BUFFER + 4096, MIB - 1, MIB])
def test_every_byte_arrives(tmp_path: Path, size: int) -> None:
    """At the boundary of the two parts, whatever the offset."""
    draw = random.Random(size)
    places = [draw.randrange(3 * MIB - size) for _ in range(PIECES)]
    pieces = [draw.randbytes(size) for _ in places]
    wanted = bytearray(3 * MIB)
    for at, piece in zip(places, pieces, strict=True):
        wanted[at : at + size] = piece
    with ends(tmp_path) as both:
        fd = os.open(both.mount.point / "f", os.O_RDWR | os.O_CREAT)
        deadline = time.monotonic() + 30
        while (size > IN_BUFFER and both.client["placed"] == 0) or os.fstat(fd).st_size == 0:
            assert time.monotonic() < deadline, "they are copied"
            os.ftruncate(fd, 0)
            os.ftruncate(fd, len(wanted))
            assert [os.pwrite(fd, piece, at) for at, piece in zip(places, pieces, strict=True)] == [size] * PIECES
            assert (both.mount.engine.share / "f").read_bytes() == wanted
        os.close(fd)
        assert (both.client["placed"] > 0) == (size > IN_BUFFER)


def test_other_long_requests_arrive(tmp_path: Path) -> None:
    """tmpfs takes extended attributes of 64 KiB."""
    draw = random.Random(4)
    values = [draw.randbytes(size) for size in (IN_BUFFER - 200, IN_BUFFER, IN_BUFFER + 200, 65536) for _ in range(5)]
    with ends(tmp_path) as both, memory_file_system(both.mount.engine.share / "t"):
        (both.mount.point / "t/f").touch()
        for value in values:
            os.setxattr(both.mount.point / "t/f", "trusted.long", value)
            assert os.getxattr(both.mount.engine.share / "t/f", "trusted.long") == value


def begin_stuck(engine: EngineProcess, figures: Figures, writers: list[Writer]) -> list[bool]:
    """As many as the engine lets hang, and more, which are put off: whether the data of each of these was placed."""
    for writer in writers[:MOST_OF_MOUNT]:
        writer.begin()
    wait_until(lambda: engine.figures()["stuck"] == MOST_OF_MOUNT, "them to be known")
    placed = [placed_by(figures, writer) for writer in writers[MOST_OF_MOUNT:]]
    wait_until(lambda: figures()["pending"] == len(placed), "the others to be put off")
    return placed


def test_data_that_is_put_off_arrives(tmp_path: Path) -> None:
    """The engine begins some of what a frozen file system holds up, and delays the rest."""
    with ends(tmp_path) as both, contextlib.ExitStack() as stack:
        fs = stack.enter_context(FreezingFs(tmp_path / "image", both.mount.engine.share / "ice").mounted())
        figures = figures_of(both, tmp_path)
        files = [fs.point / str(number) for number in range(MOST_OF_MOUNT + 6)]
        for file in files:
            file.touch()
        writers = [Writer(both.mount.point / "ice" / file.name, PUT_OFF_BYTES) for file in files]
        for writer in writers:
            stack.callback(writer.end)
        for _ in range(ATTEMPTS):
            with fs.frozen():
                placed = begin_stuck(both.mount.engine, figures, writers)
            assert [writer.outcome() for writer in writers] == [PUT_OFF_BYTES] * len(writers)
            assert [file.read_bytes() for file in files] == [writer.data for writer in writers]
            if any(placed):
                break
        else:
            pytest.fail("what was put off was not placed")


# ---- the engine dies


class Writer:
    """A process that writes over a file when it is told to, other data each time.

    Not a thread of ours: an engine that we start would begin by closing our files, and wait for itself.
    """

    def __init__(self, path: Path, size: int = MIB) -> None:
        self._path = path
        self._size = size
        self.data = b""
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=self._run, args=(theirs,), daemon=True)
        self._process.start()
        assert self.outcome() == "ready"

    def _run(self, talk: Connection) -> None:
        file, known = os.open(self._path, os.O_WRONLY), os.open(self._path, os.O_RDONLY)
        talk.send("ready")
        while True:
            data = talk.recv()
            for _ in range(KEEP_AWAKE):
                os.close(os.dup(known))
            try:
                talk.send(os.pwrite(file, data, 0))
            except OSError as error:
                talk.send(errno.errorcode[error.errno or 0])

    def begin(self) -> None:
        self.data = os.urandom(self._size)
        self._ours.send(self.data)

    def outcome(self) -> int | str:
        """What came of it: bytes written, or the name of an error."""
        assert self._ours.poll(30), "it waits"
        found: int | str = self._ours.recv()
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._ours.close()


def placed_by(figures: Figures, writer: Writer) -> bool:
    """Whether the data of a write that has just begun lies in shared memory."""
    before = figures()
    writer.begin()
    wait_until(lambda: figures()["requests"] > before["requests"] + KEEP_AWAKE, "the write to be taken up")
    return bool(figures()["placed"] > before["placed"])


def figures_of(both: Ends, area: Path) -> Figures:
    """Of the daemon, found without a question to its mount from now on."""
    place = place_of(os.fsencode(both.mount.point), served_from(str(area / "run")))
    assert place is not None
    return partial(mount_figures, place.mount, str(area / "run"))


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[Ends, Writer]]:
    """A write whose data lies in shared memory, of which the engine, which has been stopped, knows nothing."""
    with ends(tmp_path) as both, contextlib.ExitStack() as stack:
        engine = both.mount.engine
        (engine.share / "f").touch()
        figures = figures_of(both, tmp_path)
        writer = Writer(both.mount.point / "f")
        stack.callback(writer.end)
        for _ in range(ATTEMPTS):
            os.kill(engine.pid, signal.SIGSTOP)
            if placed_by(figures, writer):
                break
            os.kill(engine.pid, signal.SIGCONT)
            assert writer.outcome() == MIB
        else:
            pytest.fail("no write was placed")
        os.truncate(engine.share / "f", 0)
        yield both, writer


def test_data_that_the_engine_did_not_see_is_sent_again(waiting: tuple[Ends, Writer]) -> None:
    both, writer = waiting
    both.mount.engine.kill()
    both.mount.engine.start()
    assert writer.outcome() == MIB
    assert (both.mount.engine.share / "f").read_bytes() == writer.data


@contextlib.contextmanager
def unnoticed(both: Ends) -> Iterator[RingFile]:
    """The engine dies, and is another when the client notices. What both know is changed meanwhile."""
    os.kill(both.mount.pid, signal.SIGSTOP)
    try:
        both.mount.engine.kill()
        with RingFile(bar_path(both.mount.engine)) as ring:
            yield ring
    finally:
        os.kill(both.mount.pid, signal.SIGCONT)


def spoil(ring: RingFile) -> None:
    """What a channel's next user writes, where the data lies."""
    for channel in range(ring.channels):
        begin = ring.request_area(channel)
        ring.map[begin : begin + ring.get(REQUEST_BYTES)] = b"?" * ring.get(REQUEST_BYTES)


def test_data_in_a_channel_that_somebody_else_took_is_not_sent(waiting: tuple[Ends, Writer]) -> None:
    """A client of another machine sees no claim once the engine has gone."""
    both, writer = waiting
    with unnoticed(both) as ring:
        spoil(ring)
        for channel in range(ring.channels):
            ring.set(ring.client_line(channel) + EPOCH, 77)
        both.mount.engine.start()
    assert writer.outcome() == "EIO"
    assert (both.mount.engine.share / "f").read_bytes() == b""
    assert os.listdir(both.mount.point) == ["f"]


def test_data_where_the_next_engine_has_something_else_is_not_sent(waiting: tuple[Ends, Writer]) -> None:
    both, writer = waiting
    with unnoticed(both) as ring:
        spoil(ring)
        both.mount.engine.arguments = ("--bar-layout", "channels=16,request=4M,reply=4M")
        both.mount.engine.start()
    assert writer.outcome() == "EIO"
    assert (both.mount.engine.share / "f").read_bytes() == b""
    assert os.listdir(both.mount.point) == ["f"]
