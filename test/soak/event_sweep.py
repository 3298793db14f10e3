"""Every message of the event channel is cut at every byte, once each: nobody waits for ever, and all happens once.

What the server says there unasked is not missed either: READY wakes those who poll, MOUNTS_CHANGED has names looked up
again. To be imported with test/level3_mount on the path, where the processes are that lock. PING is left out: what is
lost with it is the channel, as with any other message.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.fault_proxy import Cut, FaultProxy, Message, no_fault
from harness.waiting import wait_until
from lockers import Locker
from soak.stage import Stage, named
from soak.sweep import Offsets

#: Until what was cut has come after all.
SOON_S = 20.0
_PIECE = 4096
_MOUNT_POINT = "mount-"
_MNT_DETACH = 2
_libc = ctypes.CDLL(None)


class Strike:
    """A fault, once it is armed: the first message of a kind on the event channel is cut at a byte."""

    def __init__(self, proxy: FaultProxy, where: str, operation: str, at: int) -> None:
        self.proxy = proxy
        self.length: int | None = None
        self._kind = where, operation
        self._at = at
        #: What has been asked until now may still be asked again, over a channel that has just come.
        self._since = proxy.latest_tag
        self._asked: set[str] = set()

    def arm(self) -> None:
        self.proxy.fault = self._fault

    def _fault(self, message: Message) -> Cut | None:
        if not message.pair.is_event_channel:
            return None
        if message.where == "request" and message.tag > self._since:
            self._asked.add(message.operation)
        if (message.where, message.operation) != self._kind or self.length:
            return None
        self.length = message.length
        return Cut(self._at)

    def await_request(self, operation: str) -> None:
        """Wait until something that has to wait has been asked over the event channel."""
        wait_until(lambda: operation in self._asked, f"{operation} to be asked over the event channel")

    def happens(self) -> None:
        wait_until(lambda: self.length, f"{self._kind} to be cut at {self._at}")

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The body makes a request that has to wait: it goes to the server over the event channel before we go on."""
        self.arm()
        yield
        if self._kind[0] == "request":
            self.happens()
        else:
            self.await_request(self._kind[1])


@dataclass
class Place:
    """A directory on both sides, and what stands ready there."""

    here: Path
    there: Path
    locker: Locker
    #: Of a FIFO.
    fd_here: int
    fd_there: int


def _begun(call: Callable[..., Any], *arguments: object) -> Future[Any]:
    """A call in a thread that nobody waits for if it hangs: it ends with the mount."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _lock(place: Place, number: int, strike: Strike) -> None:
    """Somebody waits for a lock, gets it, and gives it back."""
    with (place.here / "f").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with strike.asking():
            place.locker.wait()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert place.locker.says() == "done"
        strike.happens()
        assert _is_locked(place)
        assert place.locker.unlock() == "done"
        assert not _is_locked(place)


def _is_locked(place: Place) -> bool:
    with (place.here / "f").open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _cancel(place: Place, number: int, strike: Strike) -> None:
    """Somebody waits for a lock, and catches a signal."""
    with (place.here / "f").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        strike.arm()
        place.locker.order("w", "wait", 0, 0)
        strike.await_request("SETLKW")
        os.kill(place.locker.pid, signal.SIGALRM)
        strike.happens()
        assert place.locker.says() == "EINTR"
    assert not _is_locked(place)


def _open(place: Place, number: int, strike: Strike) -> None:
    """Of a FIFO that nobody writes to yet."""
    name = f"fifo-{number:05}"
    os.mkfifo(place.here / name)
    with contextlib.ExitStack() as stack:
        with strike.asking():
            opening = _begun(os.open, place.there / name, os.O_RDONLY)
        writer = os.open(place.here / name, os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, writer)
        reader = opening.result(SOON_S)
        stack.callback(os.close, reader)
        strike.happens()
        os.write(writer, b"text")
        assert os.read(reader, 100) == b"text"


def _read(place: Place, number: int, strike: Strike) -> None:
    line = b"%05d\n" % number
    with strike.asking():
        reading = _begun(os.read, place.fd_there, 100)
    os.write(place.fd_here, line)
    assert reading.result(SOON_S) == line
    strike.happens()


def _write(place: Place, number: int, strike: Strike) -> None:
    """To a FIFO that is full."""
    line = b"%05d\n" % number
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(place.fd_here, bytes(_PIECE))
    with strike.asking():
        writing = _begun(os.write, place.fd_there, line)
    got = b""

    def take() -> bool:
        nonlocal got
        with contextlib.suppress(BlockingIOError):
            got += os.read(place.fd_here, 1 << 20)
        return len(got) > filled

    wait_until(take, "the line", SOON_S)
    assert writing.result(SOON_S) == len(line)
    strike.happens()
    take()
    assert got == bytes(filled) + line


def _poll(place: Place, number: int, strike: Strike) -> None:
    line = b"%05d\n" % number
    poller = select.poll()
    poller.register(place.fd_there, select.POLLIN)
    before = strike.proxy.count("reply", "POLL")
    strike.arm()
    polling = _begun(poller.poll, 4 * SOON_S * 1000)  # which asks once more when its time is over
    wait_until(lambda: strike.proxy.count("reply", "POLL") > before, "POLL")
    os.write(place.fd_here, line)
    assert polling.result(SOON_S) == [(place.fd_there, select.POLLIN)]
    strike.happens()
    assert os.read(place.fd_there, 100) == line


def _mount(place: Place, number: int, strike: Strike) -> None:
    """The server mounts something on a directory whose name is known. It stays until the end."""
    name = f"{_MOUNT_POINT}{number:05}"
    here, there = place.here / name, place.there / name
    here.mkdir()
    assert os.listdir(there) == []
    strike.arm()
    # Directly: a process that we start closes our files of the mount first, and our proxy stands still as long.
    assert _libc.mount(b"none", os.fsencode(here), b"tmpfs", 0, None) == 0
    (here / "file").touch()
    wait_until(lambda: os.listdir(there) == ["file"], "what is mounted", SOON_S)
    strike.happens()


#: Which messages are cut, and what makes them be sent.
SWEPT: list[tuple[str, str, Callable[[Place, int, Strike], None]]] = [
    ("request", "SETLKW", _lock),
    ("reply", "SETLKW", _lock),
    ("request", "CANCEL", _cancel),
    ("request", "OPEN", _open),
    ("reply", "OPEN", _open),
    ("request", "READ", _read),
    ("reply", "READ", _read),
    ("request", "WRITE", _write),
    ("reply", "WRITE", _write),
    ("reply", "READY", _poll),
    ("reply", "MOUNTS_CHANGED", _mount),
]


@contextlib.contextmanager
def _made(stage: Stage, name: str) -> Iterator[Place]:
    here, there = stage.engine.share / name, stage.mount.point / name
    here.mkdir()
    (here / "f").touch()
    os.mkfifo(here / "fifo")
    with contextlib.ExitStack() as stack:
        locker = Locker(there / "f", "flock")
        stack.callback(locker.caller.end)
        fds = []
        for side, flags in ((here, os.O_NONBLOCK), (there, 0)):
            fds.append(os.open(side / "fifo", os.O_RDWR | flags))
            stack.callback(os.close, fds[-1])
        yield Place(here, there, locker, *fds)
        for path in here.glob(f"{_MOUNT_POINT}*"):
            _libc.umount2(os.fsencode(path), _MNT_DETACH)


def sweep_events(stage: Stage, every: int = 1, seed: int = 0) -> int:
    """How many cuts there were; see `soak.sweep.sweep`. The stage has to keep names for ever (cache=always)."""
    proxy = stage.proxy
    assert proxy is not None, "no connection can be cut over shared memory"
    cuts = 0
    for where, operation, act in SWEPT:
        kind = f"events: {where} {operation}"
        with named(stage.transport, kind, seed), _made(stage, f"{operation}-{where}") as place:
            offsets = Offsets(every, f"{seed} {where} {operation}")
            try:
                for number, at in offsets:
                    strike = Strike(proxy, where, operation, at)
                    act(place, number, strike)
                    assert strike.length is not None
                    offsets.lengths.append(strike.length)
                    cuts += 1
            finally:
                proxy.fault = no_fault
        stage.check_nothing_is_open()
    stage.faults["cut"] += cuts
    return cuts
