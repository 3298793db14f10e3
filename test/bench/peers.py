"""Who is measured: ways to reach a directory of this machine, each mounted, and taken down again."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from operations import Place

CHECKOUT = Path(__file__).resolve().parents[2]
_SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
_PASSTHROUGH = ("/usr/share/doc/libfuse3-dev/examples", "/usr/share/doc/fuse3-devel", "/usr/share/doc/fuse3/examples")
_WHITELIST = (
    *("Mount", "Open", "Read", "Write", "Readdir", "Mkdir"),
    *("Rmdir", "Create", "Unlink", "Rename", "Setattr", "Setxattr"),
)
_TIMEOUT_S = 20.0

QTFS_UNIX = "qtfs unix none"
QTFS_TCP = "qtfs tcp none"
QTFS_UNIX_DEFAULT = "qtfs unix"
QTFS_TCP_DEFAULT = "qtfs tcp"
SSHFS_UNCACHED = "sshfs uncached"
SSHFS = "sshfs"
PASSTHROUGH = "passthrough_ll"
BARE = "bare directory"
_SSHFS = {SSHFS_UNCACHED: ("dir_cache=no", "attr_timeout=0", "entry_timeout=0"), SSHFS: ()}


class Unavailable(Exception):
    """A peer cannot be measured here; says why."""


Mount = Callable[[Path, Path, contextlib.ExitStack], None]


@dataclass(frozen=True)
class Peer:
    """A way to mount a backing directory on another; `mount` leaves on a stack how to undo it.

    `mount_proc` does the same for /proc; None: this way cannot read files that say they are empty.
    """

    name: str
    mount: Mount | None
    mount_proc: Mount | None = None

    def place(self, area: Path, stack: contextlib.ExitStack) -> Place:
        """A fresh directory below `area`, mounted, and /proc. Raises Unavailable."""
        backing = area / self.name.replace(" ", "-")
        backing.mkdir()
        if self.mount is None:
            return Place(str(backing), str(backing), "/proc")
        top, proc = area / f"{backing.name}.mnt", area / f"{backing.name}.proc"
        top.mkdir()
        self.mount(backing, top, stack)
        if self.mount_proc is None:
            return Place(str(top), str(backing), None)
        proc.mkdir()
        self.mount_proc(Path("/proc"), proc, stack)
        return Place(str(top), str(backing), str(proc))


def all_peers(area: Path) -> list[Peer]:
    """In the order of the table."""
    engine = Engine(area)
    return [
        *(Peer(name, mount, mount) for name, mount in engine.mounters().items()),
        *(Peer(name, _sshfs(*options), _sshfs(*options, "direct_io")) for name, options in _SSHFS.items()),
        Peer(PASSTHROUGH, _mount_passthrough),
        Peer(BARE, None),
    ]


# -------------------------------------------------------------------------------------------------------- mount points


def _is_mounted(top: Path) -> bool:
    return any(line.split(" ")[4] == str(top) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _wait_mounted(top: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not _is_mounted(top):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"{Path(str(process.args[0])).name} did not mount")  # type: ignore[index]
        time.sleep(0.01)


def _unmount(top: Path) -> None:
    """Also when the mount is busy or its daemon dead: nothing must stay."""
    if _is_mounted(top) and subprocess.run(["umount", top], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["umount", "-l", top], check=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for what unmounting ends, or make it end."""
    for signal in (process.terminate, process.kill):
        try:
            process.wait(_TIMEOUT_S / 4)
            return
        except subprocess.TimeoutExpired:
            signal()
    process.wait()


def _start(stack: contextlib.ExitStack, command: Sequence[str | Path], **more: object) -> subprocess.Popen[bytes]:
    """A process that is ended by the stack. In a session of its own: Ctrl-C is for us, who then unmount."""
    process = subprocess.Popen(command, start_new_session=True, **{"stdin": subprocess.DEVNULL, **more})  # type: ignore[call-overload]
    stack.callback(_end, process)
    return process  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------- qtfs


class Engine:
    """One engine for all mounts of qtfs, started with the first."""

    def __init__(self, area: Path) -> None:
        self._area = area
        self._addresses: dict[str, str] = {}

    def mounters(self) -> dict[str, Mount]:
        """By transport, without caches and with the default."""
        return {
            QTFS_UNIX: self._mounter("unix", "cache=none"),
            QTFS_TCP: self._mounter("tcp", "cache=none"),
            QTFS_UNIX_DEFAULT: self._mounter("unix"),
            QTFS_TCP_DEFAULT: self._mounter("tcp"),
        }

    def _mounter(self, transport: str, options: str = "") -> Mount:
        def mount(backing: Path, top: Path, stack: contextlib.ExitStack) -> None:
            if not self._addresses:
                self._run(stack)
            text = f"server={self._addresses[transport]},{options}"
            command: list[str | Path] = [CHECKOUT / "qtfs_client/mount.qtfs", backing, top, "-o", text]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                raise Unavailable(done.stderr.strip())
            stack.callback(_unmount, top)

        return mount

    def _run(self, stack: contextlib.ExitStack) -> None:
        command: list[str | Path] = [
            CHECKOUT / "qtfs_server/engine",
            *("--listen", f"unix://{self._area}/engine.sock", "--listen", "tcp://127.0.0.1:0"),
            *("--whitelist", self._write_whitelist(), "--run-dir", self._area / "run"),
        ]
        process = _start(stack, command, stdout=subprocess.PIPE)
        stack.callback(process.terminate)
        assert process.stdout is not None
        ready = process.stdout.readline().decode().strip()
        process.stdout.close()
        if "listening on" not in ready:
            raise Unavailable("the engine did not start")
        for address in ready.partition("listening on ")[2].split(", "):
            self._addresses[address.partition(":")[0]] = address

    def _write_whitelist(self) -> Path:
        path = self._area / "whitelist"
        path.write_text("".join(f"[{kind}]\nPath={self._area};/proc;\n" for kind in _WHITELIST))
        return path


# --------------------------------------------------------------------------------------------------------------- sshfs


def _sshfs(*options: str) -> Mount:
    return lambda backing, top, stack: _mount_sshfs(backing, top, stack, options)


def _mount_sshfs(backing: Path, top: Path, stack: contextlib.ExitStack, options: Sequence[str]) -> None:
    """sshfs straight on an sftp-server over TCP: no ssh, no encryption."""
    sshfs, server = shutil.which("sshfs"), next(filter(Path.exists, map(Path, _SFTP_SERVERS)), None)
    if sshfs is None or server is None:
        raise Unavailable(f"{'no sftp-server' if sshfs else 'no sshfs'} here (run: make deps)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = ",".join((f"directport={listener.getsockname()[1]}", *options))
        command: list[str | Path] = [sshfs, "-f", f"localhost:{backing}", top, "-o", text]
        process = _start(stack, command)
        with _accept(listener) as connection:
            _start(stack, [server], stdin=connection, stdout=connection)
    stack.callback(_unmount, top)
    _wait_mounted(top, process)


def _accept(listener: socket.socket) -> socket.socket:
    """The connection of our own user: whoever reached an sftp-server of ours could read and write our files."""
    listener.settimeout(_TIMEOUT_S)
    while True:
        try:
            connection, address = listener.accept()
        except TimeoutError:
            raise Unavailable("sshfs did not connect") from None
        if _owner_of(address) == _owner_of(listener.getsockname()):
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()


def _owner_of(address: tuple[str, int]) -> str:
    """The user id that owns the TCP socket bound to an IPv4 address of this machine: proc_pid_net(5), tcp."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    wanted = f"{number:08X}:{address[1]:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return next((row[7] for row in rows if row[1] == wanted), "nobody's")


# ------------------------------------------------------------------------------------------------------ passthrough_ll


def _mount_passthrough(backing: Path, top: Path, stack: contextlib.ExitStack) -> None:
    """libfuse's own example: the least that a FUSE file system of this kind can cost."""
    program = backing.parent / "libfuse" / "passthrough_ll"
    program.parent.mkdir()
    _compile_passthrough(program)
    # It complains of a limit that it sets itself.
    process = _start(stack, [program, "-f", top, "-o", f"source={backing},cache=never"], stderr=subprocess.DEVNULL)
    stack.callback(_unmount, top)
    _wait_mounted(top, process)


def _compile_passthrough(program: Path) -> None:
    for name in ("passthrough_ll.c", "passthrough_helpers.h"):
        (program.parent / name).write_bytes(_example(name))
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], check=False, capture_output=True, text=True)
    command = ["cc", "-O2", "-w", "-D_GNU_SOURCE", "-o", program.name, "passthrough_ll.c", *flags.stdout.split()]
    done = subprocess.run(command, cwd=program.parent, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"passthrough_ll does not compile: {done.stderr.strip()}")


def _example(name: str) -> bytes:
    """An example of libfuse's as the distribution ships it, compressed or not."""
    for directory in map(Path, _PASSTHROUGH):
        if (directory / name).exists():
            return (directory / name).read_bytes()
        if (directory / f"{name}.gz").exists():
            return gzip.decompress((directory / f"{name}.gz").read_bytes())
    raise Unavailable(f"libfuse's example {name} is not installed")


@contextlib.contextmanager
def mounted(peers: Sequence[Peer], area: Path) -> Iterator[tuple[dict[str, Place], list[str]]]:
    """Where each peer is to be measured, and notes on those that cannot be."""
    places, notes = {}, []
    with contextlib.ExitStack() as stack:
        for peer in peers:
            try:
                places[peer.name] = peer.place(area, stack)
            except Unavailable as reason:
                notes.append(f"{peer.name} is left out: {reason}")
        yield places, notes
