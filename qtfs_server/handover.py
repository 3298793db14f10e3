"""`engine --upgrade`: one engine hands all that it has open to the next, over a socket in the run directory.

Both talk in messages of JSON over SOCK_SEQPACKET, which carry descriptors (SCM_RIGHTS). The new engine says what it is
and may be refused. Then the old one comes to rest, sends what it has in bounded batches, each of which is confirmed,
and at last, when the new one has confirmed the whole, says that it is the other's, and ends. Until that word the new
engine touches nothing, so that the old one can go on whatever happens; after it the old one does not.

new: what I am → old: what I have, or why not → new: go → (old: a batch → new: so much have I) … → old: that was all →
new: I have it → old: yours.

Sources: unix(7), cmsg(3).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtfs_common import __version__, logs
from qtfs_common.addresses import Address, PcieAddress, ShmAddress
from qtfs_common.errors import QtfsError
from qtfs_common.rings.geometry import Layout
from qtfs_common.rundir import socket_path
from qtfs_server.control import control_name
from qtfs_server.crew import Crew
from qtfs_server.errands import Errands
from qtfs_server.listening import Listening, address_name
from qtfs_server.passing import MEMORY, Passed
from qtfs_server.rings import RingListener
from qtfs_server.server import Server
from qtfs_server.state_file import layout_number

log = logging.getLogger(__name__)

_PROTOCOL = 1
#: Descriptors in one message; the kernel takes 253 (SCM_MAX_FD).
_BATCH = 128
_MESSAGE_BYTES = 65536
#: For the other side's next word; and for the old engine to come to rest besides.
_PATIENCE_S = 10.0
_REST_S = 10.0
#: What an engine opens for itself.
_OWN_DESCRIPTORS = 128

#: A descriptor, and the words that tell what it is.
_Item = tuple[tuple[Any, ...], int]


class HandoverError(QtfsError):
    """An upgrade cannot be, or has come to nothing."""


def upgrade_path(directory: Path, address: Address) -> Path:
    """Where the engine whose first address this is can be asked for all it has."""
    return directory / control_name(address, "upgrade")


class _Talk:
    """One side of the talk."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def say(self, descriptors: Sequence[int] = (), **words: object) -> None:
        socket.send_fds(self._sock, [json.dumps(words).encode()], descriptors)

    def hear(self, timeout_s: float = _PATIENCE_S) -> tuple[dict[str, Any], list[int]]:
        """The other's next message, and the descriptors in it, which are ours."""
        self._sock.settimeout(timeout_s)
        data, descriptors, flags, _ = socket.recv_fds(self._sock, _MESSAGE_BYTES, _BATCH, socket.MSG_CMSG_CLOEXEC)
        if flags & socket.MSG_CTRUNC:
            raise HandoverError("not all descriptors arrived: there are too many (RLIMIT_NOFILE)")
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the other engine has ended, or given up")
        return json.loads(data), descriptors

    def peer(self) -> tuple[int, int]:
        """Process id and user id of the other side."""
        pid, uid, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid


def _in_batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------- the old one


class Upgrades:
    """Waits for the next engine, and hands over to it."""

    def __init__(
        self, sock: socket.socket, server: Server, errands: Errands, crew: Crew, listening: list[Listening],
        control: int,
    ) -> None:  # fmt: skip
        """`control`: the descriptor of the control socket, or -1."""
        self._sock = sock
        self._server = server
        self._errands = errands
        self._crew = crew
        self._listening = listening
        self._control = control

    def fileno(self) -> int:
        """Readable when somebody asks."""
        return self._sock.fileno()

    def serve_one(self) -> bool:
        """Answer somebody. True: all that this engine had is another's now, and it must do nothing any more but end."""
        with contextlib.suppress(OSError):
            connection, _ = self._sock.accept()
            with connection:
                return self._answer(_Talk(connection))
        return False

    def _answer(self, talk: _Talk) -> bool:
        try:
            wish, _ = talk.hear()
            why = self._hindrance(wish, talk.peer()[1])
            if why:
                log.warning("an upgrade is refused: %s", why)
                talk.say(refused=why)
                return False
            held = self._server.figures()["descriptors"]
            talk.say(held=held, version=__version__, environment=_of_systemd())
            if not talk.hear()[0].get("go"):
                return False
        except Exception as error:  # whatever the other one says, we serve on
            log.warning("an upgrade was not begun: %s", error)
            return False
        return self._hand_over(talk)

    def _hindrance(self, wish: dict[str, Any], uid: int) -> str:
        """Why the other engine cannot go on in our place; empty: it can."""
        ours = {one.name for one in self._listening}
        if uid not in (0, os.geteuid()):
            return f"user {uid} may not have what this engine has"
        if wish.get("upgrade") != _PROTOCOL or wish.get("layout") != layout_number():
            theirs = wish.get("version")
            return f"what version {theirs} keeps of sessions differs from version {__version__}: restart instead"
        if set(wish.get("addresses", ())) != ours:
            return f"this engine listens at {', '.join(sorted(ours))}, and nowhere else"
        if any(fd < 0 for one in self._listening for fd in one.descriptors().values()):
            return "shared memory was taken away"
        without = self._server.without_file()
        return f"there was no room for a file of session {without[0]}: it would end" if without else ""

    def _hand_over(self, talk: _Talk) -> bool:
        rings = [one.heard for one in self._listening if isinstance(one.heard, RingListener)]
        log.warning("handing over to process %d", talk.peer()[0])
        try:
            for ring in rings:
                ring.pause()
            if not self._crew.come_to_rest(_REST_S):
                log.warning("a request is stuck in the backing file system; handing over all the same")
            self._send_all(talk)
            talk.say(yours=True)
            logs.notify(f"MAINPID={talk.peer()[0]}")
            return True
        except Exception as error:
            log.warning("the upgrade has come to nothing: %s; this engine goes on", error)
        self._crew.go_on()
        for ring in rings:
            ring.go_on()
        return False

    def _send_all(self, talk: _Talk) -> None:
        without = self._server.without_file()
        if without:
            raise HandoverError(f"there was no room for a file of session {without[0]}")
        sent = 0
        with contextlib.ExitStack() as stack:
            for batch in _in_batches(self._items(stack)):
                talk.say([fd for _, fd in batch], items=[words for words, _ in batch])
                sent += len(batch)
                _expect(talk, sent)
            talk.say(all=sent)
            _expect(talk, sent)

    def _items(self, stack: contextlib.ExitStack) -> Iterator[_Item]:
        """All there is to be passed on. Files of ours close with the stack."""
        for one in self._listening:
            for kind, fd in one.descriptors().items():
                yield ("address", one.name, kind), fd
        yield ("upgrade",), self._sock.fileno()
        if self._control >= 0:
            yield ("control",), self._control
        yield ("mounts",), _file_with(stack, json.dumps(self._errands.mounts.belongings()).encode())
        for name, descriptors, memory in self._server.belongings():
            yield ("session", name, MEMORY, 0, 0), _file_with(stack, memory)
            for *what, fd in descriptors:
                yield ("session", name, *what), fd


def _of_systemd() -> dict[str, str]:
    """How systemd is told of our state, and what it keeps for us: the next engine takes our place there, too."""
    return {name: os.environ[name] for name in ("NOTIFY_SOCKET", "FDSTORE") if name in os.environ}


def _expect(talk: _Talk, count: int) -> None:
    """See that the other has that many descriptors."""
    if talk.hear()[0].get("have") != count:
        raise HandoverError("the other engine has not got everything")


def _file_with(stack: contextlib.ExitStack, content: bytes) -> int:
    """A file without a name that holds some bytes, to be read from its beginning."""
    fd = os.memfd_create("qtfs")
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextlib.contextmanager
def upgrade_socket(path: Path, taken: int = -1) -> Iterator[socket.socket | None]:
    """The socket that a next engine asks at, if it can be had. `taken`: that of the engine before us, ours now."""
    try:
        sock = socket.socket(fileno=taken) if taken >= 0 else _listen(path)
    except OSError as error:
        log.warning("this engine cannot be upgraded: %s: %s", path, error.strerror)
        yield None
        return
    with sock:
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """Who holds the lock of our address is us: a socket that is there is nobody's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        path.unlink(missing_ok=True)
        os.fchmod(sock.fileno(), 0o600)
        with socket_path(path) as short:
            sock.bind(short)
        sock.listen(1)
    except BaseException:
        sock.close()
        raise
    return sock


# ---------------------------------------------------------------------------------------------------------- the new one


@dataclass
class Taken:
    """What an engine has from the one before it; nothing, if there was none."""

    #: Descriptors of each address, by what they are.
    addresses: dict[str, dict[str, int]] = field(default_factory=dict)
    #: Of each session, by the name of its file.
    sessions: dict[str, Passed] = field(default_factory=dict)
    mounts: dict[str, list[tuple[int, int, bool]]] = field(default_factory=dict)
    control: int = -1
    upgrade: int = -1


class Takeover:
    """The talk with the engine before us. QtfsError: there is none, it refuses, or it has gone on by itself."""

    def __init__(self, addresses: Sequence[Address], directory: Path) -> None:
        self._addresses = addresses
        self._stack = contextlib.ExitStack()
        self._talk = _Talk(self._connected(upgrade_path(directory, addresses[0])))
        self._count = 0

    def __enter__(self) -> Takeover:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def _connected(self, path: Path) -> socket.socket:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        sock.settimeout(_PATIENCE_S)
        try:
            with socket_path(path) as short:
                sock.connect(short)
        except OSError as error:
            self._stack.close()
            why = f"{path}: {error.strerror or error}"
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                why = f"no engine that listens at {self._addresses[0]} runs here: start one without --upgrade"
            raise HandoverError(why) from error
        return sock

    def receive(self, layout: Layout, descriptor_limit: int) -> Taken:
        """Everything, while the engine before us waits. Nothing of it may be changed yet."""
        with self._explained():
            self._begin(descriptor_limit)
            taken = self._receive_all()
        for address in self._addresses:
            if isinstance(address, PcieAddress | ShmAddress):
                layout.fit(os.fstat(taken.addresses[address_name(address)]["memory"]).st_size)
        return taken

    def confirm(self) -> None:
        """Have the engine before us end; then everything is ours."""
        with self._explained():
            self._talk.say(have=self._count)
            if not self._talk.hear()[0].get("yours"):
                raise HandoverError("the engine goes on by itself")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            raise HandoverError("the engine that ran has died: start one without --upgrade") from error
        except (OSError, ValueError, LookupError) as error:
            raise HandoverError(f"the upgrade has come to nothing: {error}") from error

    def _begin(self, descriptor_limit: int) -> None:
        names = [address_name(address) for address in self._addresses]
        self._talk.say(upgrade=_PROTOCOL, layout=layout_number(), version=__version__, addresses=names)
        answer, _ = self._talk.hear()
        if "refused" in answer:
            raise HandoverError(f"the engine that runs refuses: {answer['refused']}")
        needed = answer["held"] + _OWN_DESCRIPTORS
        if needed > descriptor_limit:
            raise HandoverError(f"{needed} descriptors are needed, and {descriptor_limit} allowed (RLIMIT_NOFILE)")
        for name, value in answer["environment"].items():
            os.environ.setdefault(name, value)
        self._talk.say(go=True)

    def _receive_all(self) -> Taken:
        taken = Taken()
        sessions: dict[str, list[tuple[int, int, int, int]]] = {}
        answer, descriptors = self._talk.hear(_PATIENCE_S + 2 * _REST_S)
        while "items" in answer:
            for words, fd in zip(answer["items"], descriptors, strict=True):
                if words[0] == "session":
                    sessions.setdefault(words[1], []).append((*words[2:], fd))
                else:
                    _place(taken, words, fd)
            self._count += len(descriptors)
            self._talk.say(have=self._count)
            answer, descriptors = self._talk.hear()
        if answer["all"] != self._count:
            raise HandoverError("something is missing")
        taken.sessions = {name: Passed(items) for name, items in sessions.items()}
        return taken


def _place(taken: Taken, words: list[str], fd: int) -> None:
    """Put a descriptor that is not a session's where it belongs."""
    if words[0] == "address":
        taken.addresses.setdefault(words[1], {})[words[2]] = fd
    elif words[0] == "mounts":
        with open(fd, "rb") as file:
            taken.mounts = json.load(file)
    elif words[0] == "control":
        taken.control = fd
    else:
        taken.upgrade = fd
