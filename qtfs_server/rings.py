"""Serving clients over shared memory: laying it out, its bell sockets, and clients on other machines.

A client connects to a bell socket and says which channel it has claimed: one of this machine to a Unix socket, one of
another to the bell that the address names. Where it names none, our link comes in its place: it sees the claim in the
memory. So the engine's workers know connections of one kind only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from qtfs_common.addresses import ShmAddress, SocketAddress, UnixAddress, bound_address, listen_socket
from qtfs_common.errors import AddressInUseError, ListenError
from qtfs_common.rings.geometry import Geometry, Layout, LayoutError
from qtfs_common.rings.link import Link
from qtfs_common.rings.memory import RingMemory
from qtfs_common.rings.shared import (
    ENGINE_LOCK_AT,
    MAGIC,
    RingAddress,
    bell_path,
    boot_id,
    greeting,
    lock_byte,
    open_memory,
    unlock_byte,
)
from qtfs_server.server import Server

log = logging.getLogger(__name__)

#: How often claims are looked for while there are clients of other machines, and while there are none.
_LINK_PERIOD_S = 0.05
_IDLE_PERIOD_S = 0.2
_RETRY_S = 1.0
#: An engine on another machine shows within this time that it lives.
_FOREIGN_PATIENCE_S = 1.0


class RingListener:
    """One `shm://` or `pcie://` address that the engine serves."""

    def __init__(
        self, address: RingAddress, layout: Layout, run_dir: Path, taken: Mapping[str, int] | None = None
    ) -> None:
        """Take the memory and lay it out. Raises ListenError.

        `taken`: descriptors of the engine before us (`descriptors`), which are ours from now on.
        """
        self.address = address
        self._layout = layout
        # Beside the file, where clients look for it; nobody but our own link comes for a BAR.
        name = f"bell@{str(dataclasses.replace(address, bell=None)).replace('/', '_')}"
        self._bell_path = bell_path(address) if isinstance(address, ShmAddress) else str(run_dir / name)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._areas: tuple[int, int] | None = None
        self._take(taken)

    # ---- the memory ----

    def _take(self, taken: Mapping[str, int] | None = None) -> None:
        try:
            self._fd = taken["memory"] if taken else open_memory(self.address, create=True)
        except OSError as error:
            raise ListenError(f"cannot listen on {self.address}: {error.strerror}", error.errno or 0) from error
        try:
            with contextlib.ExitStack() as stack:
                self._bells = self._prepare(stack, taken)
                stack.pop_all()
        except BaseException:
            self._release()
            raise
        bell = self.address.bell
        if bell is not None and not isinstance(bell, UnixAddress) and bell.port == 0:
            self.address = dataclasses.replace(self.address, bell=bound_address(self._bells["far_bell"]))

    def _prepare(self, stack: contextlib.ExitStack, taken: Mapping[str, int] | None) -> dict[str, socket.socket]:
        """Lock the file, map it, lay it out; the bell sockets, unless they are there."""
        try:
            if not lock_byte(self._fd, ENGINE_LOCK_AT):
                raise self._in_use()
            geometry = self._geometry()
            self.memory = RingMemory(self._fd)
            self._see_others()
            bells = {}
            for name, address in self._bell_addresses().items():
                bells[name] = socket.socket(fileno=taken[name]) if taken else listen_socket(address)
                stack.enter_context(bells[name]).setblocking(False)
            self._lay_out(geometry)
        except LayoutError as error:
            raise ListenError(f"cannot listen on {self.address}: {error}", errno.EINVAL) from error
        except OSError as error:
            why = error.strerror or error
            raise ListenError(f"cannot listen on {self.address}: {why}", error.errno or 0) from error
        log.info("%s: %d channels, requests of %d and replies of %d bytes", self.address, geometry.channels,
                 geometry.request_bytes, geometry.reply_bytes)
        self._link = Link(self.memory, True)
        return bells

    def _bell_addresses(self) -> dict[str, SocketAddress]:
        """Where clients ring: those of this machine and our own link, and those of other machines that can."""
        near: dict[str, SocketAddress] = {"bell": UnixAddress(self._bell_path)}
        return near if self.address.bell is None else {**near, "far_bell": self.address.bell}

    def _lay_out(self, geometry: Geometry) -> None:
        self.memory.lay_out(geometry, secrets.randbits(63) | 1, boot_id())
        if self.memory.lost:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _geometry(self) -> Geometry:
        """What fits; a file that is empty gets the size that is needed."""
        size = os.fstat(self._fd).st_size
        is_file = isinstance(self.address, ShmAddress)
        geometry = self._fit(None if is_file and size == 0 else size)
        if is_file:
            self._allocate(geometry.total_bytes, size)
        self._areas = (geometry.request_bytes, geometry.reply_bytes)
        return geometry

    def _allocate(self, wanted: int, size: int) -> None:
        """See that no page is missing of what will be used: a tmpfs that is full answers a first touch with SIGBUS."""
        try:
            os.posix_fallocate(self._fd, 0, wanted)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise OSError(error.errno, f"its {wanted} bytes cannot be had: {os.strerror(error.errno or 0)}") from error

    def _fit(self, size: int | None) -> Geometry:
        """Areas as they were, if that can be: clients' kernels have been told how much fits into one message."""
        if self._areas is not None:
            with contextlib.suppress(LayoutError):
                return Layout(self._layout.channels, *self._areas).fit(size)
        return self._layout.fit(size)

    def _in_use(self) -> AddressInUseError:
        return AddressInUseError(f"{self.address} is already in use: is another engine running?", errno.EADDRINUSE)

    def _see_others(self) -> None:
        """An engine of another machine holds no lock that we could see, but it has a beat."""
        magic, _, instance, boot = self.memory.owner()
        if magic != MAGIC or instance == 0 or boot == boot_id():
            return
        first, until = self.memory.pulse(), time.monotonic() + _FOREIGN_PATIENCE_S
        while time.monotonic() < until:
            if self.memory.pulse() != first:
                raise self._in_use()
            time.sleep(_LINK_PERIOD_S)

    # ---- serving ----

    @contextlib.contextmanager
    def serving(self, server: Server, needs_authentication: bool) -> Iterator[None]:
        """Let clients come, also after the memory was taken away and is there again."""
        self._serving = (server, needs_authentication)
        self._listen(*self._serving)
        self.go_on()
        try:
            yield
        finally:
            self.pause()
            self.memory.leave()

    def _listen(self, server: Server, needs_authentication: bool) -> None:
        for bell in self._bells.values():
            server.listen(bell.fileno(), needs_authentication, self.memory)

    def go_on(self) -> None:
        """Begin to look after the memory, once it is served, or again."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._look_after, args=self._serving, name="rings", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop looking after it: who is connected stays."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def descriptors(self) -> dict[str, int]:
        """Of the bell sockets and of the memory, whose lock lies in that one; -1: it was taken away."""
        return {**{name: bell.fileno() for name, bell in self._bells.items()}, "memory": self._fd}

    def close(self) -> None:
        """Give the bell sockets and the lock back; the file stays, as a BAR would."""
        for bell in self._bells.values():
            bell.close()
        if self._fd >= 0:
            for address in self._bell_addresses().values():
                if isinstance(address, UnixAddress):
                    Path(address.path).unlink(missing_ok=True)
            self._release()

    def _release(self) -> None:
        unlock_byte(self._fd, ENGINE_LOCK_AT)
        os.close(self._fd)
        self._fd = -1

    def _look_after(self, server: Server, needs_authentication: bool) -> None:
        while not self._stopping.is_set():
            if self._link.busy:
                self._link.watch(_LINK_PERIOD_S)
            else:
                self._stopping.wait(_IDLE_PERIOD_S)
                self._link.watch(0)
            for number, epoch in self._link.claims():
                self._come_for(number, epoch)
            self.memory.tidy()
            if not self._is_sound():
                self._renew(server, needs_authentication)

    def _is_sound(self) -> bool:
        """Whether the memory is still there, all of it, and is ours by what stands in front."""
        return not self.memory.lost and self.memory.is_ours and os.fstat(self._fd).st_size >= self.memory.size

    def _come_for(self, number: int, epoch: int) -> None:
        """Greet ourselves on behalf of a client of another machine."""
        try:
            with contextlib.ExitStack() as stack:
                bell = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                bell.setblocking(False)
                bell.connect(self._bell_path)
                bell.send(greeting(number, epoch, self.memory.instance))
                stack.pop_all()
                self._link.add(number, epoch, bell.detach())
        except OSError as error:
            log.debug("%s: channel %d: %s", self.address, number, error)

    def _renew(self, server: Server, needs_authentication: bool) -> None:
        """The memory was taken away under us: end all that works in it, wait until it is there again."""
        log.error("%s: the memory is gone (%s); waiting for it", self.address, self._what_happened())
        for bell in self._bells.values():
            server.deafen(bell.fileno())
        self.memory.give_up()
        server.hang_up(self.memory)
        self._link.watch(0)
        self.close()
        while not self._stopping.wait(_RETRY_S):
            # Who still reads or writes file data there must not meet what comes next.
            if self.memory.users == 0 and self._take_again():
                self._listen(server, needs_authentication)
                log.warning("%s: the memory is back", self.address)
                return

    def _what_happened(self) -> str:
        if self.memory.lost:
            return "bus error"
        return "it is shorter now" if self.memory.is_ours else "somebody else wrote into its control block"

    def _take_again(self) -> bool:
        try:
            self._take()
        except ListenError as error:
            log.debug("%s", error)
            return False
        return True
