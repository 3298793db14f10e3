"""Who is measured: ways to reach a directory of this machine, each mounted, and taken down again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import materials
import nothing
import passthrough
import sshfs
from daemons import Daemons, Unavailable
from engine import TRANSPORTS, Engine
from places import Place

LLFUSE = "qtfs llfuse"
SSHFS_UNCACHED = "sshfs uncached"
SSHFS = "sshfs"
PASSTHROUGH = "passthrough_ll"
NOTHING = "nothing"
BARE = "bare directory"


def uncached(transport: str) -> str:
    """The name of qtfs with cache=none."""
    return f"qtfs {transport} none"


def default(transport: str) -> str:
    """The name of qtfs with the default cache."""
    return f"qtfs {transport}"


QTFS = tuple(name(transport) for transport in TRANSPORTS for name in (uncached, default))
NAMES = (*QTFS, LLFUSE, SSHFS_UNCACHED, SSHFS, PASSTHROUGH, NOTHING, BARE)

Mount = Callable[[Path, Path, contextlib.ExitStack], Daemons]


@dataclass(frozen=True)
class Peer:
    """A way to mount a backing directory on another; `mount` leaves on a stack how to undo it.

    `mount_proc` does the same for /proc; None: this way cannot read files that say they are empty. `keeps`: what is
    written there can be read again.
    """

    name: str
    mount: Mount | None
    mount_proc: Mount | None = None
    keeps: bool = True

    def place(self, area: Path, stack: contextlib.ExitStack) -> Place:
        """A fresh directory below `area`, mounted, and /proc. Raises Unavailable."""
        backing = area / self.name.replace(" ", "-")
        backing.mkdir()
        material = str(_material(area))
        if self.mount is None:
            return Place(str(backing), str(backing), "/proc", material)
        top, proc = area / f"{backing.name}.mnt", area / f"{backing.name}.proc"
        top.mkdir()
        daemons = self.mount(backing, top, stack)
        if self.mount_proc is not None:
            proc.mkdir()
            daemons += self.mount_proc(Path("/proc"), proc, stack)
        shown = str(proc) if self.mount_proc else None
        # Two mounts may have one engine.
        servers = tuple(set(daemons.servers))
        return Place(str(top), str(backing), shown, material, daemons.clients, servers, self.keeps)


def _material(area: Path) -> Path:
    path = area / "material"
    if not path.exists():
        materials.make(path)
    return path


def _all_peers(area: Path) -> list[Peer]:
    """In the order of NAMES."""
    engines = {transport: Engine(area, transport) for transport in TRANSPORTS}
    mounts = [
        *(engine.mounter(*options) for engine in engines.values() for options in (("cache=none",), ())),
        engines["unix"].mounter("driver=llfuse"),
    ]
    return [
        *(Peer(name, mount, mount) for name, mount in zip((*QTFS, LLFUSE), mounts, strict=True)),
        Peer(SSHFS_UNCACHED, sshfs.mounter(*sshfs.UNCACHED), sshfs.mounter(*sshfs.UNCACHED, "direct_io")),
        Peer(SSHFS, sshfs.mounter(), sshfs.mounter("direct_io")),
        Peer(PASSTHROUGH, passthrough.mount),
        Peer(NOTHING, nothing.mount, keeps=False),
        Peer(BARE, None),
    ]


@contextlib.contextmanager
def mounted(names: Sequence[str], area: Path) -> Iterator[tuple[dict[str, Place], list[str]]]:
    """Where each of these peers is to be measured, and notes on those that cannot be."""
    places, notes = {}, []
    with contextlib.ExitStack() as stack:
        for peer in _all_peers(area):
            if peer.name in names:
                try:
                    places[peer.name] = peer.place(area, stack)
                except Unavailable as reason:
                    notes.append(f"{peer.name} is left out: {reason}")
        yield places, notes
