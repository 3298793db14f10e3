"""Opening shared memory: finding and mapping a BAR or file, and a client's way to a channel of it.

Channels are taken by locks on the file (open file description locks, fcntl(2)), a byte each, which die with their
process.
Sources: Documentation/PCI/sysfs-pci.rst, fcntl(2), proc_sys_kernel(5).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
import stat
import struct
import threading
import time
import weakref
from pathlib import Path

from qtfs_common.addresses import PcieAddress, ShmAddress, connect_socket
from qtfs_common.errors import ConnectError
from qtfs_common.rings.channel import RingConnection
from qtfs_common.rings.link import Link
from qtfs_common.rings.memory import RingMemory

MAGIC = int.from_bytes(b"QTFSRING", "little")
VERSION = 1
BELL_SOCKET = 1
BELL_LINK = 2
#: The engine's lock; a channel's is so many bytes further on.
ENGINE_LOCK_AT = 0
CHANNEL_LOCKS_AT = 1
#: struct bell_greeting: magic, channel, epoch, instance.
GREETING = struct.Struct("<IIQQ")
_BELL_MAGIC = int.from_bytes(b"BELL", "little")
_LINK_PERIOD_S = 0.05
#: How often an engine's beat is looked at, and how long one that stands still is given.
_BEAT_PERIOD_S = 0.05
_BEAT_PATIENCE_S = 1.0
#: Before the next try where a claim was turned down, doubling.
_BUSY_DELAY_S = 0.02
_LONGEST_DELAY_S = 0.5
_LOOK_AGAIN_S = 0.2

RingAddress = PcieAddress | ShmAddress


def bell_path(address: ShmAddress) -> str:
    """The socket that an engine listens on for the clients of its own machine, unless the address names a bell."""
    return address.path + ".bell"


def greeting(channel: int, epoch: int, instance: int) -> bytes:
    """What is said first on the bell socket."""
    return GREETING.pack(_BELL_MAGIC, channel, epoch, instance)


def boot_id() -> bytes:
    """Which machine, and which start of it, this is: 16 bytes."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def open_memory(address: RingAddress, *, create: bool = False) -> int:
    """A descriptor of the file to map, or of the BAR, write-combining if there is that. Raises OSError."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if isinstance(address, ShmAddress):
        fd = os.open(address.path, flags | (os.O_CREAT if create else 0), 0o600)
    else:
        try:
            fd = os.open(address.sysfs_path + "_wc", flags)
        except FileNotFoundError:
            fd = os.open(address.sysfs_path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def lock_byte(fd: int, at: int) -> bool:
    """Take one byte's lock for this open file description; False if somebody else has it."""
    try:
        _set_lock(fd, at, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock_byte(fd: int, at: int) -> None:
    """Give a byte's lock back. To close the descriptor is not enough while a mapping of it lasts."""
    _set_lock(fd, at, fcntl.F_UNLCK)


def _set_lock(fd: int, at: int, kind: int) -> None:
    # struct flock: l_type, l_whence, l_start, l_len, l_pid
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, at, 1, 0))


# ---------------------------------------------------------------------------------------------------------- connecting


def connect_ring(address: RingAddress, timeout_s: float) -> RingConnection:
    """Claim a channel and have the engine take it up. Raises ConnectError."""
    deadline, delay_s = time.monotonic() + timeout_s, _BUSY_DELAY_S
    try:
        while True:
            connection = _shared(address).connect(deadline)     # the engine may be another by now
            if connection is not None:
                return connection
            if time.monotonic() > deadline:
                raise ConnectError(f"cannot connect to {address}: timed out", errno.ETIMEDOUT)
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
    except OSError as error:
        raise ConnectError(f"cannot connect to {address}: {error.strerror or error}", error.errno or 0) from error


class _Shared:
    """One mapping of this process, for all its channels in it, and the link if the engine is on another machine."""

    def __init__(self, address: RingAddress, fd: int) -> None:
        self.address = address
        found = os.fstat(fd)
        self.identity = (found.st_dev, found.st_ino, found.st_size)
        if found.st_size < mmap.PAGESIZE:
            raise self._fail(f"no engine serves there: it has {found.st_size} bytes", errno.ECONNREFUSED)
        self.memory = RingMemory(fd)
        self._check()
        self._link: Link | None = None
        self._guard = threading.Lock()

    def _fail(self, why: str, number: int) -> ConnectError:
        return ConnectError(f"cannot connect to {self.address}: {why}", number)

    def _check(self) -> None:
        """See that an engine has laid the memory out, in a way that we know and that fits."""
        magic, version, instance, self.boot = self.memory.owner()
        if magic != MAGIC or instance == 0:
            raise self._fail("no engine serves there", errno.ECONNREFUSED)
        if version != VERSION:
            raise self._fail(f"its layout has version {version}, and we know {VERSION}", errno.EPROTONOSUPPORT)
        try:
            self.memory.read_layout()
        except ValueError as error:
            raise self._fail(f"its layout is broken: {error}", errno.EPROTO) from error

    def is_current(self) -> bool:
        """Whether the file is still the one that is mapped, and the engine the one whose layout was read."""
        return not self.memory.lost and self.memory.owner()[2] == self.memory.instance

    # ---- claims ----

    def connect(self, deadline: float) -> RingConnection | None:
        """One attempt with the first channel that is free; None if the engine has not done with its last user.

        Raises ConnectError, or OSError.
        """
        claimed = self._claim()
        if claimed is None:
            return None
        claim, number = claimed
        epoch = secrets.randbits(63) | 1
        try:
            bell, kind = self._bell(number, epoch, deadline)
        except BaseException:
            os.close(claim)
            raise
        connection = RingConnection(self.memory, number, epoch, claim_fd=claim, bell_fd=bell.detach(), bell=kind)
        try:
            if kind == BELL_LINK:
                self._see_beat(deadline)
            else:
                os.write(connection.fileno(), greeting(number, epoch, self.memory.instance))
            if self._is_served(connection, deadline):
                return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def _claim(self) -> tuple[int, int] | None:
        """A descriptor that holds the lock of a channel, and the channel's number. None: one will be free soon."""
        fd = open_memory(self.address)
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == self.identity[:2]:
                # A channel that is served all the same has a client on another machine, or one that has just died.
                served = {number for number in range(self.memory.channels) if self.memory.is_served(number)}
                for number in range(self.memory.channels):
                    if number not in served and lock_byte(fd, CHANNEL_LOCKS_AT + number):
                        return fd, number
                if not any(lock_byte(fd, CHANNEL_LOCKS_AT + number) for number in served):
                    raise self._fail(f"all {self.memory.channels} channels are taken", errno.EBUSY)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _bell(self, number: int, epoch: int, deadline: float) -> tuple[socket.socket, int]:
        """Our end of the channel's bell, and of which kind it is."""
        if self.address.bell is not None:
            return self._bell_between_machines(deadline), BELL_SOCKET
        if isinstance(self.address, ShmAddress) and self.boot == boot_id():
            bell = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                bell.settimeout(max(deadline - time.monotonic(), 0.001))
                bell.connect(bell_path(self.address))
                bell.setblocking(False)
            except BaseException:
                bell.close()
                raise
            return bell, BELL_SOCKET
        ours, far = socket.socketpair()
        ours.setblocking(False)
        far.setblocking(False)
        self._linked().add(number, epoch, far.detach())
        return ours, BELL_LINK

    def _bell_between_machines(self, deadline: float) -> socket.socket:
        assert self.address.bell is not None
        try:
            bell = connect_socket(self.address.bell, max(deadline - time.monotonic(), 0.001))
        except ConnectError as error:
            raise self._fail(str(error), error.errno) from error
        bell.setblocking(False)
        return bell

    def _is_served(self, connection: RingConnection, deadline: float) -> bool:
        while not connection.served:
            left_s = deadline - time.monotonic()
            if connection.hung_up or left_s <= 0:
                return False
            connection.listen_for_bell(min(left_s, _LOOK_AGAIN_S))
        return True

    # ---- another machine ----

    def _see_beat(self, deadline: float) -> None:
        """Raises ConnectError if the engine's heart stands still: it is gone, and has left its layout behind."""
        first, until = self.memory.pulse(), min(deadline, time.monotonic() + _BEAT_PATIENCE_S)
        while self.memory.pulse() == first:
            if time.monotonic() > until:
                raise self._fail("the engine has gone (its beat has stopped)", errno.ECONNREFUSED)
            time.sleep(_BEAT_PERIOD_S)

    def _linked(self) -> Link:
        with self._guard:
            if self._link is None:
                link = Link(self.memory, False)
                try:
                    threading.Thread(target=_run_link, args=(weakref.ref(self), link), daemon=True).start()
                except RuntimeError as error:
                    raise self._fail(str(error), errno.EAGAIN) from None
                self._link = link
            return self._link


def _run_link(owner: weakref.ref[_Shared], link: Link) -> None:
    """Look after channels as long as there are any, or may come to be."""
    while owner() is not None or link.busy:
        link.watch(_LINK_PERIOD_S)


_mappings: dict[RingAddress, _Shared] = {}
_mappings_guard = threading.Lock()


def _shared(address: RingAddress) -> _Shared:
    """The mapping for an address, a new one if the file or the engine has changed."""
    with _mappings_guard:
        fd = open_memory(address)
        with contextlib.closing(os.fdopen(fd, "rb", closefd=True)):
            known = _mappings.get(address)
            found = os.fstat(fd)
            identity = (found.st_dev, found.st_ino, found.st_size)
            if known is not None and known.is_current() and known.identity == identity:
                return known
            _mappings.pop(address, None)
            known = _mappings[address] = _Shared(address, fd)
            return known
