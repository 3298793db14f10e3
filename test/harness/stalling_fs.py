"""A FUSE file system whose answers can be held back: what a hung NFS server or a stopped FUSE daemon is to the engine.

    with StallingFs(point).mounted() as fs:
        fs.hold("READ")
        ...                     # whoever reads hangs
        wait_until(lambda: fs.held() == 1, "the read")
        fs.go()

It holds the files f0 to f9 of 4096 bytes in one directory, and speaks the kernel's protocol itself, since a daemon that
owes an answer is then one that has not written it. It runs in a process of its own: `pid` can be stopped. Whatever
becomes of the test, the process's end aborts the connection, and nobody hangs any longer.

Source: <linux/fuse.h>, protocol 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.leaks import environment
from harness.waiting import wait_until

ROOT = 1
FILES = [f"f{i}".encode() for i in range(10)]
FILE_BYTES = 4096
_OPCODES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS",
    18: "RELEASE", 20: "FSYNC", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR",
    36: "INTERRUPT", 38: "DESTROY", 42: "BATCH_FORGET",
}  # fmt: skip
_UNANSWERED = ("FORGET", "BATCH_FORGET", "INTERRUPT")
_HEADER = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")


class _Server:
    """The daemon: answers the kernel on `device`, obeys commands on standard input."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._hold: set[str] = set()
        self._held: list[bytes] = []

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self._device, 0], [], [])
            if 0 in ready and not self._obey(sys.stdin.readline().split()):
                return
            if self._device in ready and not self._take():
                return

    def _obey(self, command: list[str]) -> bool:
        if not command:
            return False
        if command[0] == "hold":
            self._hold = set(command[1:])
        elif command[0] == "go":
            self._hold = set()
            held, self._held = self._held, []
            for request in held:
                self._answer(request)
        print(len(self._held), flush=True)
        return True

    def _take(self) -> bool:
        try:
            request = os.read(self._device, 1 << 20)
        except OSError as error:
            return error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN)
        name = _OPCODES.get(_HEADER.unpack_from(request)[1], "OTHER")
        if name in _UNANSWERED:
            return True
        if name in self._hold or ("ALL" in self._hold and name != "INIT"):
            self._held.append(request)
        else:
            self._answer(request)
        return True

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        body = self._reply(_OPCODES.get(opcode, "OTHER"), node, request[_HEADER.size :])
        status, data = (body, b"") if isinstance(body, int) else (0, body)
        with contextlib.suppress(FileNotFoundError):  # interrupted meanwhile
            os.write(self._device, _REPLY.pack(_REPLY.size + len(data), -status, unique) + data)

    def _reply(self, name: str, node: int, body: bytes) -> bytes | int:
        """The body of the reply, or an errno."""
        if name == "INIT":
            return struct.pack("<IIIIHHIIHHII24x", 7, 31, 0, 0, 16, 12, 1 << 17, 1, 0, 0, 0, 0)
        if name == "LOOKUP":
            name_ = body.rstrip(b"\0")
            return self._entry(FILES.index(name_) + 2) if name_ in FILES else errno.ENOENT
        if name in ("GETATTR", "SETATTR"):
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if name in ("OPEN", "OPENDIR"):
            return struct.pack("<QII", 1, 0, 0)
        if name == "READ":
            offset, size = struct.unpack_from("<QI", body, 8)
            return (b"x" * FILE_BYTES)[offset : offset + size]
        if name == "WRITE":
            return struct.pack("<II", struct.unpack_from("<I", body, 16)[0], 0)
        if name == "READDIR":
            return self._listing() if struct.unpack_from("<Q", body, 8)[0] == 0 else b""
        if name == "STATFS":
            return struct.pack("<QQQQQIIII24x", 1000, 500, 500, 100, 50, 4096, 255, 4096, 0)
        return b"" if name in ("RELEASE", "RELEASEDIR", "FLUSH", "FSYNC", "DESTROY") else errno.ENOSYS

    def _entry(self, node: int) -> bytes:
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        mode = 0o40755 if node == ROOT else 0o100666
        return struct.pack("<QQQQQQIIIIIIIIII", node, FILE_BYTES, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _listing(self) -> bytes:
        records = b""
        for i, name in enumerate(FILES):
            record = struct.pack("<QQII", i + 2, i + 1, len(name), 8) + name
            records += record + bytes(-len(record) % 8)
        return records


class StallingFs:
    """Such a file system at `point`. `device`: a block device, whose file system the kernel asks to end: DESTROY."""

    def __init__(self, point: Path, device: str = "") -> None:
        self.point = point
        self._device = device
        self._process: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def mounted(self) -> Iterator[StallingFs]:
        """Mounted; it answers everything at the end, and is taken away."""
        self.point.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.stalling_fs", str(self.point), self._device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(PYTHONPATH=str(Path(__file__).parents[1])),
        )
        try:
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "mounted\n"
            yield self
        finally:
            self._process.kill()  # which ends the connection: all who hang get ENOTCONN
            self._process.communicate()
            wait_until(self._unmounted, f"{self.point} to be unmounted")

    def _unmounted(self) -> bool:
        done = subprocess.run(["umount", "-l", self.point], capture_output=True, check=False)
        return done.returncode in (0, 32) and not os.path.ismount(self.point)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _say(self, command: str) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def hold(self, *names: str) -> None:
        """Answer no requests of these kinds from now on; "ALL": none."""
        self._say("hold " + " ".join(names or ("ALL",)))

    def held(self) -> int:
        """How many requests wait for their answers."""
        return self._say("held")

    def go(self) -> None:
        """Answer what was held, and everything that comes."""
        self._say("go")


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    source, kind = (os.fsencode(sys.argv[2]), b"fuseblk") if sys.argv[2] else (b"stalling", b"fuse.stalling")
    if libc.mount(source, os.fsencode(sys.argv[1]), kind, 6, options) != 0:  # MS_NOSUID | MS_NODEV
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    _Server(device).run()


if __name__ == "__main__":
    main()
