"""The addresses that an engine listens on, opened by itself or taken over from the engine before it."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qtfs_common import rundir
from qtfs_common.addresses import Address, PcieAddress, ShmAddress, UnixAddress, bound_address, listen_socket
from qtfs_common.rings.geometry import Layout
from qtfs_server.rings import RingListener
from qtfs_server.server import Server

#: Descriptors of one address, by what they are: its lock, and its socket or the bells and the memory of rings.
Descriptors = Mapping[str, int]


def address_name(address: Address) -> str:
    """An address without blanks."""
    return str(address).replace(" ", "%20")


def place_name(address: Address) -> str:
    """The same without its bell: another bell makes no other engine of it."""
    if isinstance(address, PcieAddress | ShmAddress):
        address = dataclasses.replace(address, bell=None)
    return address_name(address)


@dataclasses.dataclass(frozen=True)
class Listening:
    """One address that is listened on, by a socket or by shared memory."""

    address: Address
    heard: socket.socket | RingListener
    lock: rundir.LockFile

    @property
    def name(self) -> str:
        """The address, with the port that the kernel chose; without blanks."""
        return address_name(self._heard_at)

    @property
    def place(self) -> str:
        """The same without its bell."""
        return place_name(self._heard_at)

    @property
    def _heard_at(self) -> Address:
        return self.heard.address if isinstance(self.heard, RingListener) else bound_address(self.heard)

    @contextlib.contextmanager
    def serving(self, server: Server, has_key: bool) -> Iterator[Address]:
        """Let clients come; where, if the kernel chose a port."""
        # Who has a key wants it used. Who may use a Unix socket, or the memory, its own mode says.
        if isinstance(self.heard, RingListener):
            with self.heard.serving(server, False):
                yield self._heard_at
        else:
            server.listen(self.heard.fileno(), has_key and not isinstance(self.address, UnixAddress))
            yield self._heard_at

    def descriptors(self) -> Descriptors:
        """What the next engine needs in order to go on here; -1 for what is not there just now."""
        heard = self.heard
        own = heard.descriptors() if isinstance(heard, RingListener) else {"socket": heard.fileno()}
        return {"lock": self.lock.fileno(), **own}


@contextlib.contextmanager
def listening(
    addresses: Sequence[Address], layout: Layout, directory: Path, taken: Mapping[str, Descriptors]
) -> Iterator[list[Listening]]:
    """Listen on all addresses, each under a lock that names us to a second engine.

    `taken`: descriptors of the engine before us by address, which are ours from now on.
    """
    with contextlib.ExitStack() as stack:
        yield [_open(stack, address, layout, directory, taken.get(address_name(address))) for address in addresses]


def _open(
    stack: contextlib.ExitStack, address: Address, layout: Layout, directory: Path, taken: Descriptors | None
) -> Listening:
    name = ("engine@" + place_name(address).replace("/", "_") + ".lock")[-250:]
    lock = rundir.LockFile(directory / name, taken["lock"]) if taken else rundir.lock_file(name, directory)
    stack.enter_context(lock)
    if isinstance(address, PcieAddress | ShmAddress):
        ring = RingListener(address, layout, directory, taken)
        stack.callback(ring.close)
        return Listening(address, ring, lock)
    sock = stack.enter_context(socket.socket(fileno=taken["socket"]) if taken else listen_socket(address))
    sock.setblocking(False)
    if isinstance(address, UnixAddress):
        stack.callback(Path(address.path).unlink, missing_ok=True)
    return Listening(address, sock, lock)
