"""Following the server's mounts: names that lead elsewhere since the server mounted something, and `-o propagate`.

One thread for the main mount and all its *children*, the mounts that stand for mounts of the server. When the server
says that its mounts changed, the thread has the kernel look the names concerned up again. With `propagate` it then asks
for the list of mounts, compares it with what is mounted here, and makes both equal; so it does not matter how many
changes came meanwhile.

A child has a session of its own, which does not keep the server from unmounting. Its threads are started by the first
request; until then it costs a connection and some descriptors. A child that somebody unmounts here stays away until the
server's mount is another one. Children go when the server's mount goes, whoever uses them, and with the main mount.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import resource
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qtfs_client.connection import Engine, HandshakeError, encode
from qtfs_client.drivers.apart import place_of, take_away
from qtfs_client.mountpoint import PROC
from qtfs_client.options import MountOptions
from qtfs_client.remote_host import RemoteHost
from qtfs_common import mountinfo, remote_calls
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import OPERATIONS
from qtfs_common.remote_calls import MountRecord
from qtfs_common.transport import Connection

if TYPE_CHECKING:
    from qtfs_client.drivers.fuse3.driver import Fuse3Driver

log = logging.getLogger(__name__)

#: Changes come in groups; and the names of all sessions have to be looked at before anything is mounted.
_SETTLE_S = 0.01
_RETRY_S = 1.0
_ANSWER_S = 5.0
_JOIN_S = 5.0
_MOST_ATTEMPTS = 3
#: What is not made a mount of its own: qtfs, or a client on the server itself would see its own mounts for ever; and
#: what a look at it would mount.
_LEFT_OUT = (b"fuse.qtfs", b"autofs")
_CALLER_BYTES = 24
#: What this machine may have again soon: processes, memory, descriptors.
_SHORT = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR)


@dataclasses.dataclass(slots=True)
class _Child:
    """A mount that stands for one of the server's."""

    record: MountRecord
    path: str  # its mount point
    driver: Fuse3Driver
    local_id: int  # in our mountinfo
    interruptions: int  # of the main mount when it was made
    thread: threading.Thread | None = None  # None: nobody has used it yet

    @property
    def key(self) -> tuple[bytes, int]:
        return self.record.path, self.record.id


class _OwnSlot:
    """How calls of the thread get to the server: remote_host.Way."""

    def __init__(self, ask: Callable[[str, bytes], bytes]) -> None:
        self._ask = ask

    def call(self, operation: str, body: bytes) -> bytes:
        """The reply's body. Raises OSError, QtfsError, ValueError."""
        return self._ask(operation, body)

    def close(self) -> None:
        """The channel stays the thread's."""


def _raise_descriptor_limit() -> None:
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Follower:
    """The thread and its children. What begins with an underscore belongs to the thread."""

    def __init__(self, main: Fuse3Driver, options: MountOptions, engine: Engine) -> None:
        self._main = main
        self._options = options
        self._engine = engine
        self._children: dict[bytes, _Child] = {}
        self._attempts: dict[tuple[bytes, int], int] = {}
        self._dismissed: set[tuple[bytes, int]] = set()  # unmounted here, or impossible
        self._ended: list[_Child] = []
        self._closing: list[threading.Thread] = []
        self._sources: dict[int, _Child | None] = {}  # descriptors that are polled, and whose they are
        self._poller = select.poll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._due_s: float | None = None  # when the mounts are to be compared
        self._channel: tuple[Connection, int, int, int] | None = None  # connection, epoch, slot, last sequence

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The thread runs; at the end it takes the children away."""
        thread = threading.Thread(target=self._run, name="mounts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            os.eventfd_write(self._bell, 1)
            thread.join(_JOIN_S)
            if not thread.is_alive():
                os.close(self._bell)

    def used(self) -> list[str]:
        """Mount points of the children that somebody has used, for any thread."""
        return [child.path for child in list(self._children.values()) if child.thread is not None]

    # ---------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        if self._options.propagate:
            _raise_descriptor_limit()
        try:
            self._listen(self._bell, None)
            self._listen(self._main.mounted.changes_fd, None)
            while not self._stopping:
                self._attend()
        except Exception:
            log.exception("the server's mounts are no longer followed")
        finally:
            self._remove(list(self._children.values()))
            self._drop_channel()
            for thread in self._closing:
                thread.join(_JOIN_S)

    def _listen(self, fd: int, child: _Child | None) -> None:
        self._sources[fd] = child
        self._poller.register(fd, select.POLLIN)

    def _deafen(self, fd: int) -> None:
        if self._sources.pop(fd, self) is not self:
            self._poller.unregister(fd)

    def _attend(self) -> None:
        """Sleep until there is something to do, and do it."""
        left_s = None if self._due_s is None else max(0.0, self._due_s - time.monotonic())
        for fd, events in self._poller.poll(None if left_s is None else left_s * 1000):
            self._take(fd, events)
        self._bury_ended()
        if self._due_s is not None and time.monotonic() >= self._due_s:
            self._due_s = None
            self._listen_again()
            self._compare()

    def _take(self, fd: int, events: int) -> None:
        child = self._sources.get(fd)
        if fd == self._bell:
            os.eventfd_read(self._bell)
        elif fd == self._main.mounted.changes_fd:
            self._expire_names(self._main)
            if self._options.propagate:
                self._due_s = time.monotonic() + _SETTLE_S
        elif child is not None and child.thread is not None:
            self._expire_names(child.driver)
        elif child is not None and events & select.POLLERR:
            self._ended.append(child)
        elif child is not None:
            self._wake(child)

    def _expire_names(self, driver: Fuse3Driver) -> None:
        for body in driver.mounted.take_changes():
            try:
                for directory, name in remote_calls.stale_names(body):
                    driver.mounted.expire_name(directory, name)
            except ValueError as error:
                log.warning("the server sent a malformed MOUNTS_CHANGED: %s", error)

    # ---------------------------------------------------------------------------------------------------- the listing

    def _list(self) -> list[MountRecord]:
        """The server's mounts below our root, parents first. Raises QtfsError, OSError, ValueError."""
        return RemoteHost(_OwnSlot(self._ask)).mounts()

    def _ask(self, operation: str, body: bytes) -> bytes:
        """One request over a slot that no worker has."""
        connection, epoch, slot, sequence = self._own_channel()
        request = encode(OPERATIONS[operation], _own_caller() + body, slot=slot, sequence=sequence + 1)
        try:
            connection.send(request, _ANSWER_S)
            _op, _flags, error, _slot, answered, _tag, reply = connection.receive(_ANSWER_S)
        except OSError:
            self._drop_channel()
            raise
        if answered != sequence + 1:
            self._drop_channel()
            raise ValueError("an answer to something else")
        self._channel = connection, epoch, slot, sequence + 1
        if error:
            raise OSError(error, os.strerror(error))
        return bytes(reply)

    def _own_channel(self) -> tuple[Connection, int, int, int]:
        if self._channel is not None and self._channel[1] != self._main.epoch:
            self._drop_channel()
        if self._channel is None:
            epoch, ticket = self._main.epoch, self._main.ticket
            connection, sequence = self._engine.attach(ticket, ticket.slots - 1)
            self._channel = connection, epoch, ticket.slots - 1, sequence
        return self._channel

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel[0].close()
            self._channel = None

    # --------------------------------------------------------------------------------------------------- comparing

    def _compare(self) -> None:
        """Make the children equal to the server's mounts."""
        try:
            wanted = {r.path: r for r in self._list() if r.type not in _LEFT_OUT and _is_plain(r.path)}
            self._see_what_is_lost()
        except (QtfsError, OSError, ValueError) as error:
            log.info("the server's mounts cannot be listed now: %s", error)
            self._due_s = time.monotonic() + _RETRY_S
            return
        keys = {(record.path, record.id) for record in wanted.values()}
        self._dismissed &= keys
        self._attempts = {key: count for key, count in self._attempts.items() if key in keys}
        self._remove([child for child in self._children.values() if child.key not in keys])
        for path in sorted(wanted):
            if self._stopping or self._main.mounted.stopping:
                return
            if path not in self._children and (path, wanted[path].id) not in self._dismissed:
                self._add(wanted[path])

    def _see_what_is_lost(self) -> None:
        """Notice children that are no longer mounted: taken away by somebody, or by the kernel with a changed name."""
        here = mountinfo.read(PROC)
        self._lose([child for child in self._children.values() if child.local_id not in here])

    def _lose(self, lost: list[_Child]) -> None:
        for child in lost:
            # While the server is out of reach the kernel drops names, and unmounts what is on them.
            if child.interruptions == self._main.interruptions:
                self._dismissed.add(child.key)
        self._remove(lost)

    def _bury_ended(self) -> None:
        """See to children that have ended by themselves."""
        ended, self._ended = self._ended, []
        ended = [child for child in ended if self._children.get(child.record.path) is child]
        if ended:
            self._lose(ended)
            # Some may have to come back.
            self._due_s = self._due_s or time.monotonic() + _SETTLE_S

    # --------------------------------------------------------------------------------------------------- children

    def _add(self, record: MountRecord) -> None:
        key = record.path, record.id
        relative = os.fsdecode(record.path)
        options = dataclasses.replace(
            self._options,
            source=os.path.join(self._options.source, relative),
            mountpoint=os.path.join(self._options.mountpoint, relative),
        )
        for child in list(self._children.values()):
            # The way leads through it, and nobody but this thread could wake it.
            if child.thread is None and _is_below(record.path, child.record.path) and not self._wake(child):
                return
        self._attempts[key] = self._attempts.get(key, 0) + 1
        try:
            self._look_up_again(record.path, options.mountpoint)
            if not place_of(options.mountpoint).is_directory:
                self._dismissed.add(key)  # a file that is mounted on a file needs no mount to be seen
                return
            child = self._mounted(record, options)
        except (HandshakeError, OSError) as error:
            self._note_failure(key, options.source, error)
        except QtfsError as error:
            log.info("%s: %s", options.source, error)
            self._due_s = time.monotonic() + _RETRY_S
        else:
            self._children[record.path] = child
            self._listen(child.driver.mounted.device_fd, child)

    def _look_up_again(self, path: bytes, mountpoint: str) -> None:
        """See that the kernel's name for a mount point is of now. When it finds that a name leads elsewhere than it
        thought, it unmounts what is mounted there; and what tells it to look may come to another session first.
        """
        above = [child for child in self._children.values() if _is_below(path, child.record.path)]
        driver = max(above, key=lambda child: len(child.record.path)).driver if above else self._main
        directory, name = os.path.split(mountpoint)
        driver.mounted.expire_name(place_of(directory).node, os.fsencode(name))

    def _note_failure(self, key: tuple[bytes, int], source: str, error: Exception) -> None:
        """Try again if it may be that the server's mount was just going, or something is short; else say so, once."""
        if getattr(error, "errno", 0) in _SHORT:
            log.info("%s: %s", source, error)
            self._due_s = time.monotonic() + _RETRY_S
            return
        if getattr(error, "errno", 0) in (errno.ENOENT, errno.ESTALE, errno.ENOTCONN) and \
                self._attempts[key] < _MOST_ATTEMPTS:
            self._due_s = time.monotonic() + _RETRY_S
            return
        self._dismissed.add(key)
        log.warning("the server's mount %s is not shown as a mount of its own: %s", source, error)

    def _mounted(self, record: MountRecord, options: MountOptions) -> _Child:
        """A session on one of the server's mounts, mounted. Raises QtfsError, OSError."""
        interruptions = self._main.interruptions
        session = self._engine.mount(
            options.source, read_only=options.read_only, slots=options.channels, watch=True, let_go=True
        )
        driver = type(self._main)(options, self._engine, *session, is_child=True)
        try:
            return _Child(record, options.mountpoint, driver, driver.mount_child(), interruptions)
        except BaseException:
            driver.close()
            raise

    def _wake(self, child: _Child) -> bool:
        """Start the threads of a child that the kernel has asked something; False: not now, but soon."""
        self._deafen(child.driver.mounted.device_fd)
        thread = threading.Thread(target=self._serve, args=(child,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("%s: %s", child.path, error)
            self._due_s = self._due_s or time.monotonic() + _RETRY_S
            return False
        child.thread = thread
        self._listen(child.driver.mounted.changes_fd, child)
        return True

    def _listen_again(self) -> None:
        """To children that got no thread: what the kernel asked of them is still there."""
        for child in self._children.values():
            device = child.driver.mounted.device_fd
            if child.thread is None and device not in self._sources:
                self._listen(device, child)

    def _serve(self, child: _Child) -> None:
        """A child's own thread, to its end."""
        try:
            child.driver.serve_child()
        except Exception:
            log.exception("the mount of %s ends", os.fsdecode(child.record.path))
        finally:
            self._ended.append(child)
            if not self._stopping:
                os.eventfd_write(self._bell, 1)

    def _remove(self, children: list[_Child]) -> None:
        """Take children away, and what is mounted on them, the innermost first."""
        going = {child.record.path for child in children}
        for path in list(self._children):
            if any(_is_below(path, above) for above in going):
                going.add(path)
        removed = [self._children.pop(path) for path in sorted(going, reverse=True)]
        for child in removed:
            self._deafen(child.driver.mounted.device_fd)
            self._deafen(child.driver.mounted.changes_fd)
            _take_away(child)
            child.driver.end()
        if removed:
            self._closing = [thread for thread in self._closing if thread.is_alive()]
            self._close(removed)

    def _close(self, children: list[_Child]) -> None:
        """In a thread of its own, if the system grants one: the server may take its time."""
        thread = threading.Thread(target=_end_sessions, args=(children,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            _end_sessions(children)
        else:
            self._closing.append(thread)


def _is_below(path: bytes, directory: bytes) -> bool:
    """Whether a relative path lies below another."""
    return path.startswith(directory + b"/")


def _is_plain(path: bytes) -> bool:
    """Whether it leads down from the root, name by name."""
    return not {b"", b".", b".."} & set(path.split(b"/"))


def _take_away(child: _Child) -> None:
    """Unmount a child if it is still there. If not, its number may be another mount's already."""
    if child.driver.mounted.has_ended:
        return
    for _ in range(_MOST_ATTEMPTS):
        try:
            take_away(child.path, child.local_id)
            return
        except OSError as error:
            log.warning("%s: %s", child.path, error.strerror)
            time.sleep(_SETTLE_S)


def _end_sessions(children: list[_Child]) -> None:
    """Of children that were taken away."""
    for child in children:
        if child.thread is not None:
            child.thread.join(_JOIN_S)
        if child.thread is None or not child.thread.is_alive():
            child.driver.close()


def _own_caller() -> bytes:
    """The `caller` record of a request of our own: root, on the session's root."""
    return (1).to_bytes(8, "little") + bytes(_CALLER_BYTES - 8)
