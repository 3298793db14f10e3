"""The engine's control socket: a Unix socket with mode 0600 in the run directory, which tells the engine's figures.

Whoever connects gets one JSON document (doc/control.md) and the end of the connection; nothing is read from him.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from qtfs_common.addresses import Address, PcieAddress, ShmAddress, UnixAddress, listen_socket
from qtfs_common.errors import QtfsError
from qtfs_common.rundir import socket_path

log = logging.getLogger(__name__)

#: For whoever has connected, to take the document.
_PATIENCE_S = 5.0
#: Before the next try, when descriptors have run out.
_BREATH_S = 0.1


def control_name(address: Address, program: str = "engine") -> str:
    """The file name of the control socket of an engine whose first address this is: by its port, or its path's name."""
    if isinstance(address, PcieAddress):
        place = f"{address.device}-resource{address.resource}"
    elif isinstance(address, UnixAddress | ShmAddress):
        place = PurePath(address.path).name
    else:
        place = str(address.port)
    return f"{program}-{place}.sock"


@contextlib.contextmanager
def controlled(path: Path, figures: Callable[[], dict[str, object]], taken: int = -1) -> Iterator[int]:
    """With a control socket at `path`, if it can be had: the engine is of use without one. Its descriptor, or -1.

    `taken`: the socket of the engine before us, which is ours from now on.
    """
    try:
        listening = socket.socket(fileno=taken) if taken >= 0 else _listen(path)
    except (QtfsError, OSError) as error:
        log.warning("no control socket: %s", error)
        yield -1
        return
    closing = threading.Event()
    thread = threading.Thread(target=_serve, args=(listening, figures, closing), name="control", daemon=True)
    with listening:
        thread.start()
        try:
            yield listening.fileno()
        finally:
            path.unlink(missing_ok=True)
            closing.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def _listen(path: Path) -> socket.socket:
    with socket_path(path) as short:
        return listen_socket(UnixAddress(short))


def _serve(listening: socket.socket, figures: Callable[[], dict[str, object]], closing: threading.Event) -> None:
    """One at a time: who may connect is root or us, and does not keep the others waiting for long."""
    while not closing.is_set():
        try:
            connection, _ = listening.accept()
        except OSError as error:
            if not closing.wait(_BREATH_S):
                log.warning("control socket: %s", error)  # descriptors have run out
            continue
        # A timeout, or somebody who left, ends this answer only.
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_PATIENCE_S)
            connection.sendall(json.dumps(figures()).encode() + b"\n")
