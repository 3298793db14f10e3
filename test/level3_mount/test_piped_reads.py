"""Over Unix sockets long replies to READ go to the kernel through a pipe (rings.md, 5), and what becomes
of them when the connection, the caller or the server goes wrong meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.fault_proxy import Action, Cut, Garble, Message, Pieces, once
from harness.leaks import environment
from harness.mounts import MountProcess
from harness.waiting import wait_until
from lines import Line, connected

pytestmark = pytest.mark.root

MIB = 1 << 20
KIB = 1 << 10
#: Replies from this on are piped.
LONG = 128 * KIB
DATA = random.Random(7).randbytes(4 * MIB)
SIZES = [LONG - 4096, LONG, LONG + 1, 512 * KIB, MIB - 1, MIB, 3 * MIB]
OFFSETS = [0, 1, 4095, 4096, MIB, len(DATA) - MIB, len(DATA) - LONG - 100, len(DATA) - 100]
HEADER_BYTES = 32


@contextlib.contextmanager
def ends(area: Path, transport: str = "unix", options: str = "cache=none") -> Iterator[Ends]:
    with EngineProcess(area / "engine", transport).running() as engine:
        (engine.share / "f").write_bytes(DATA)
        options = f"driver=fuse3,run_dir={area / 'run'},{options}"
        with MountProcess(engine, engine.share, area / "mnt", options).running() as mount:
            yield Ends(mount, area / "run")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, size: int, at: int) -> bytes:
    """pread(2) into memory that begins with a page, so that the kernel asks for all of it at once."""
    with mmap.mmap(-1, size) as buffer:
        return buffer[: os.preadv(fd, [buffer], at)]


@pytest.mark.parametrize("cache", ["none", "auto"])
@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_long_reads_reach_the_kernel_without_a_copy(tmp_path: Path, transport: str, cache: str) -> None:
    """Over a Unix socket; through a ring they come otherwise, and over TCP it would take longer."""
    with ends(tmp_path, transport, f"cache={cache}") as both, opened(both.mount.point / "f") as fd:
        for at in range(0, len(DATA), MIB):
            assert read_at(fd, MIB, at) == DATA[at : at + MIB]
        piped = both.client["piped"]
        if transport != "unix":
            assert piped == 0
        elif cache == "none":
            assert piped == len(DATA)
        else:
            assert piped > len(DATA) // 2  # the kernel begins to read ahead with less


def test_every_byte_arrives(tmp_path: Path) -> None:
    """Whatever the offset in its page, before the end of the file and past it."""
    with ends(tmp_path) as both, opened(both.mount.point / "f") as fd:
        for size in SIZES:
            for at in OFFSETS:
                assert read_at(fd, size, at) == DATA[at : at + size], (size, at)
            assert (both.client["piped"] > 0) == (size >= LONG)


# -------------------------------------------------------------------------------------------- on a line that goes wrong


@contextlib.contextmanager
def reading(area: Path, options: str = "") -> Iterator[tuple[Line, int]]:
    """A line, and DATA open at its end."""
    with connected(area, f"cache=none,run_dir={area / 'run'},{options}") as line:
        (line.here / "f").write_bytes(DATA)
        with opened(line.there / "f") as fd:
            yield line, fd


def test_cut_anywhere_it_is_read_again(tmp_path: Path) -> None:
    at_header = [1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1]
    places = [*at_header, 88, 4096, 4200, 16 * KIB, 40 * KIB, 500_000, MIB + HEADER_BYTES - 1]
    with reading(tmp_path) as (line, fd):
        for at in places:
            line.proxy.fault = once("reply", "READ", lambda _message, at=at: Cut(at=at))
            before = line.proxy.count("reply", "READ")
            assert read_at(fd, MIB, at) == DATA[at : at + MIB], f"cut at {at}"
            assert line.proxy.count("reply", "READ") == before + 1


def test_what_does_not_fit_into_a_pipe_is_copied(tmp_path: Path) -> None:
    """A reply that comes in many small pieces; later ones of that length are not tried again, shorter ones are."""
    slots: list[int | None] = []

    def hear(message: Message) -> Action | None:
        if (message.where, message.operation) != ("reply", "READ"):
            return None
        slots.append(message.slot)
        return Pieces(1000) if len(slots) == 1 else None

    def grown(size: int, at: int) -> int:
        """How much more was piped by a read that the first one's worker serves: others have not seen the pieces."""
        for _ in range(500):
            before = ends.client["piped"]
            assert read_at(fd, size, at) == DATA[at : at + size]
            if slots[-1] == slots[0]:
                return int(ends.client["piped"] - before)
        raise AssertionError(f"the worker of slot {slots[0]} is never the one that reads: {slots}")

    with reading(tmp_path) as (line, fd):
        ends = Ends(line.mount, tmp_path / "run")
        line.proxy.fault = hear
        assert read_at(fd, MIB, 5) == DATA[5 : MIB + 5]
        assert ends.client["piped"] == 0
        assert grown(MIB, 6) == 0
        assert grown(LONG, 7) == LONG


def _reader(path: Path) -> subprocess.Popen[bytes]:
    command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", "count=1"]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("there", [20 * KIB, 700_000], ids=["its beginning", "most of it"])
def test_who_is_killed_meanwhile_dies_at_once(tmp_path: Path, there: int) -> None:
    """And what comes of the reply afterwards is nobody's."""
    come, go = threading.Event(), threading.Event()

    def hold(_message: Message) -> Action:
        come.set()
        return Pieces(there, go)

    with reading(tmp_path) as (line, fd):
        line.proxy.fault = once("reply", "READ", hold)
        reader = _reader(line.there / "f")
        try:
            assert come.wait(20)
        finally:
            reader.send_signal(signal.SIGKILL)
            assert reader.wait(10) == -signal.SIGKILL
        assert read_at(fd, MIB, MIB) == DATA[MIB : 2 * MIB], "another worker serves it"
        go.set()
        for at in range(0, 3 * MIB, 256 * KIB):
            assert read_at(fd, MIB, at) == DATA[at : at + MIB]


def test_a_server_that_goes_silent_in_the_middle_is_given_up(tmp_path: Path) -> None:
    """Its event channel says nothing either: EIO after the timeout, and afterwards all is well."""
    go = threading.Event()
    with reading(tmp_path, "timeout=2") as (line, fd):

        def hold(message: Message) -> Action | None:
            if message.pair.is_event_channel:
                go.wait(60)
                return None
            return Pieces(700_000, go) if (message.where, message.operation) == ("reply", "READ") else None

        line.proxy.fault = hold
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            read_at(fd, MIB, 0)
        line.proxy.fault = lambda _message: None
        go.set()
        wait_until(lambda: read_at(fd, MIB, MIB) == DATA[MIB : 2 * MIB], "the server to be heard again", 20)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, MIB + HEADER_BYTES + 1), (0, 1 << 31), (0, HEADER_BYTES - 1)],
    ids=["more than was asked for", "endless", "less than a header"],
)
def test_a_reply_of_another_length_than_can_be(tmp_path: Path, at: int, value: int) -> None:
    """The connection is given up, or the call fails; nobody gets what was not in the file."""
    with reading(tmp_path) as (line, fd):
        garble = Garble(at, struct.pack("<I", value), ends=True)
        line.proxy.fault = once("reply", "READ", lambda _message: garble)
        try:
            assert read_at(fd, MIB, 0) == DATA[:MIB]
        except OSError as error:
            assert error.errno == errno.EIO
        assert read_at(fd, MIB, MIB) == DATA[MIB : 2 * MIB]
