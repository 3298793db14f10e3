"""FUSE drivers: ways to hand the kernel's requests to the engine. One interface, and which to take."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Protocol

from qtfs_client.connection import Engine, Ticket
from qtfs_client.options import MountExit, MountOptions
from qtfs_common.errors import QtfsError
from qtfs_common.transport import Connection


class MountError(QtfsError):
    """The file system cannot be attached to the mount point; the text says why."""

    exit_code = MountExit.FAILURE


class Driver(Protocol):
    """One mount. The calls come in this order, all but `unmount` from the thread that made the driver."""

    #: Whether it can show the server's mounts as mounts of their own.
    propagates: bool

    def __init__(self, options: MountOptions, engine: Engine, connection: Connection, ticket: Ticket) -> None:
        """Take over slot 0 of a session, past MOUNT."""

    @property
    def ticket(self) -> Ticket:
        """What joins the session as it is now. From any thread."""

    def forget_name(self, directory: int, name: bytes) -> None:
        """Make the kernel look a name up again, in a directory given by its node. Not from a handler of requests."""

    def figures(self) -> dict[str, object]:
        """Counters for the control socket, see doc/control.md. From any thread."""

    def mount(self) -> None:
        """Attach the file system to the mount point. Raises MountError."""

    def serve(self) -> None:
        """Answer the kernel until the file system is unmounted, from here or elsewhere."""

    def unmount(self) -> None:
        """End `serve`: processes that still use the mount get ENOTCONN. From any thread; may be repeated."""

    def close(self) -> None:
        """End the session on the engine and give back everything; also after a failure of any of the above."""


#: In the order in which `auto` tries them.
_DRIVERS = {
    "fuse3": ("qtfs_client.drivers.fuse3.driver", "Fuse3Driver"),
    "llfuse": ("qtfs_client.drivers.llfuse_driver", "LlfuseDriver"),
}


def choose(name: str) -> type[Driver]:
    """The driver called `name`; of `auto`, the first one whose library is installed. Raises MountError."""
    reasons = []
    for candidate in _DRIVERS if name == "auto" else (name,):
        module, attribute = _DRIVERS[candidate]
        try:
            driver: type[Driver] = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            reasons.append(f"driver {candidate} cannot be used here: {error}")
        else:
            return driver
    raise MountError("; ".join(reasons), MountExit.SYSTEM)


def mount_options(options: MountOptions) -> Iterator[str]:
    """What every driver asks libfuse for, mount.fuse3(8): who may use the mount, and its name in /proc/mounts."""
    yield f"fsname={options.source}"
    yield "subtype=qtfs"
    yield "ro" if options.read_only else "rw"
    yield from options.kernel_flags
    if options.allow_other or options.allow_root:
        # The kernel knows no allow_root: it lets everybody in, and the driver only the owner and root.
        yield "allow_other"
    if options.cache != "none":
        # With cache=none every call asks the server, which decides; otherwise cached modes have to be enforced here.
        yield "default_permissions"
