"""The run directory: control sockets, locks and pid files of every program of the project.

Its place is, in this order: what the command line or configuration says, ``$QTFS_RUN_DIR``, ``/run/qtfs`` for root,
``$XDG_RUNTIME_DIR/qtfs`` or ``/tmp/qtfs-UID`` for others. Several of each program can run on one machine if each has
its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from qtfs_common.errors import LockedError, RunDirError

DEFAULT_RUN_DIR = "/run/qtfs"
_SUN_PATH_BYTES = 108


def run_directory(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The run directory, created with mode 0700 if missing.

    Raises RunDirError if it cannot be made, or if another user could put files into it.
    """
    path = Path(explicit or _default())
    if not path.is_absolute():
        raise RunDirError(f"run directory '{path}' is not an absolute path")
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700, parents=True)
        found = path.lstat()  # not stat: in /tmp a link planted by somebody else would lead us astray
    except OSError as error:
        raise RunDirError(f"cannot create run directory {path}: {error.strerror}") from error
    _check_trust(path, found)
    return path


def lock_file(name: str, directory: Path) -> LockFile:
    """Takes the lock ``name`` in ``directory`` and writes our pid into it.

    Raises LockedError naming the holder, RunDirError if the file cannot be opened, ValueError if ``name`` is a path.
    """
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"lock name {name!r} is not a file name")
    path = directory / name
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RunDirError(f"cannot open lock {path}: {error.strerror}") from error
    try:
        _lock(fd, path)
        return LockFile(path, fd)
    except BaseException:
        os.close(fd)
        raise


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """What bind(2) and connect(2) take for ``path``, which may be longer than the 107 bytes of unix(7)."""
    if len(os.fsencode(path)) < _SUN_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class LockFile:
    """A held lock. It lasts until :meth:`release` or the death of every process that inherited it by fork.

    The file stays: unlinking it would let two processes lock two files of one name.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self.write_pid()

    def fileno(self) -> int:
        """The descriptor that holds the lock."""
        return self._fd

    def write_pid(self) -> None:
        """Writes down the calling process as the holder; a daemon calls it again after its fork."""
        text = f"{os.getpid()}\n".encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def release(self) -> None:
        """Gives the lock back; harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.ftruncate(fd, 0)
            # Not left to close(): a child that inherited the descriptor would keep the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def __enter__(self) -> LockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _default() -> str:
    chosen = os.environ.get("QTFS_RUN_DIR")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return DEFAULT_RUN_DIR
    session = os.environ.get("XDG_RUNTIME_DIR")
    return f"{session}/qtfs" if session else f"/tmp/qtfs-{os.geteuid()}"


def _check_trust(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise RunDirError(f"run directory {path} is not a directory")
    if found.st_uid not in (0, os.geteuid()):
        raise RunDirError(f"run directory {path} belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o022:
        raise RunDirError(f"run directory {path} is writable by others (mode {stat.S_IMODE(found.st_mode):04o})")


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunDirError(f"cannot lock {path}: {error.strerror}") from error
        raise LockedError(path, _read_pid(fd)) from error


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None
