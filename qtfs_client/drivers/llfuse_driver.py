"""The llfuse driver: the llfuse package (libfuse 2) over `RemoteFS`. What llfuse can express works as with fuse3.

llfuse knows no poll, ioctl, locks, fallocate, lseek, copy_file_range, readdirplus, rename flags, O_TMPFILE, interrupts.
The kernel then refuses or makes do by itself: locks hold among processes of this machine only, poll says always ready,
SEEK_DATA sees no holes, copy_file_range copies through here, and the rest fails with EOPNOTSUPP, ENOTTY or EINVAL. What
llfuse leaves out of its replies is added by llfuse_hooks. Further limits:

- ACLs that grant more than the mode bits show are not seen by the kernel's own check (cache=auto and always).
- A file that is open without page cache (cache=none, pseudo files, O_APPEND) cannot be mapped shared: ENODEV.
- statfs(2) tells of the file system at the root of the mount, wherever it is asked.
- XATTR_CREATE and XATTR_REPLACE are checked before the attribute is set, not in one step.
- A directory's default ACL does not lift the umask, which the kernel has applied before we are asked.
- "Now", as touch(1) sets it, is by this machine's clock. syncfs(2) does not reach the server; fsync(2) does.

llfuse keeps its state in globals: one mount in a process. Threads: llfuse.main and its workers, which run the handlers,
each without llfuse's lock; one that sends forgets. llfuse.main has a thread of its own, as it would not let Python's
signal handlers run in the main thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from qtfs_client.connection import Engine, Ticket
from qtfs_client.drivers import MountError, mount_options
from qtfs_client.drivers.fuse3.callers import wants_to_open
from qtfs_client.mountpoint import detach
from qtfs_client.options import DEFAULT_MAX_READ, MountOptions
from qtfs_client.remote import (
    MAX_GROUPS,
    OPENED_CHANGED,
    OPENED_UNCACHED,
    UNCACHED,
    Attributes,
    Caller,
    DirectoryEntry,
    Entry,
    Opened,
    RemoteFS,
    Time,
)
from qtfs_client.sessions import Session
from qtfs_common.special import concerned
from qtfs_common.transport import Connection


def _load_hooks() -> Any:
    """The hooks, loaded where llfuse finds their functions before libfuse's: in the global scope, and first."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        loaded = importlib.import_module("qtfs_client.drivers.llfuse_hooks")
    finally:
        sys.setdlopenflags(flags)
    loaded.install()
    return loaded


hooks = _load_hooks()
import llfuse  # noqa: E402

log = logging.getLogger(__name__)

_R = TypeVar("_R")

_DAY_S = 86400.0
_NAME_VALID_S = {"none": 0.0, "auto": 1.0, "always": _DAY_S}
#: Bytes of a READDIR reply; the kernel takes less at a time, and the rest waits here.
_LISTING_BYTES = 65536
_FORGET_DELAY_S = 0.01
#: A page, of which the kernel wants one byte for itself.
_LONGEST_TARGET = 4095
#: A time that is no older counts as the caller's "now", which llfuse does not tell from a time.
_NOW_NS = 2 * 10**9
#: The kernel refuses larger ones.
_LARGEST_ERRNO = 511
_JOIN_S = 0.2
_HANDLE_WRITABLE = 1
_OPENED_BY_THE_KERNEL = frozenset((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK))
_CAPABILITY = b"security.capability"
#: Nodes that are remembered to have none.
_UNCAPABLE_AT_MOST = 1024


class _File(NamedTuple):
    """An open file: who opened it, and whether the kernel writes to it directly."""

    opener: Caller
    direct: bool


def _refusal(error: OSError) -> Exception:
    """The server's errno, unless the kernel would refuse it or, for ENOSYS, give up the operation for good."""
    number = error.errno or errno.EIO
    if number == errno.ENOSYS:
        number = errno.EOPNOTSUPP
    return llfuse.FUSEError(number if 0 < number <= _LARGEST_ERRNO else errno.EIO)  # type: ignore[no-any-return]


def _handler(method: Callable[..., _R]) -> Callable[..., _R]:
    """Run a handler without llfuse's lock; whatever goes wrong becomes an errno, as else llfuse would end the mount."""

    @functools.wraps(method)
    def handle(*arguments: Any) -> _R:
        try:
            with llfuse.lock_released:
                return method(*arguments)
        except OSError as error:
            raise _refusal(error) from None
        except Exception:
            log.exception("%s failed", method.__name__)
            raise llfuse.FUSEError(errno.EIO) from None

    return handle


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """llfuse calls it an error if the kernel does not want a reply any more, as when the mount ends: ENOENT."""
    return os.strerror(errno.ENOENT) not in record.getMessage()


logging.getLogger("llfuse").addFilter(_is_worth_logging)


def _groups(pid: int) -> tuple[int, ...]:
    """Supplementary groups of a thread that sleeps in our request, proc_pid_status(5); none if it cannot be seen."""
    if pid == 0:
        return ()
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.read(16384) or b""
    except OSError:
        return ()
    _, _, rest = text.partition(b"\nGroups:")
    return tuple(map(int, rest.partition(b"\n")[0].split()[:MAX_GROUPS]))


def _caller(context: Any) -> Caller:
    """The caller of a request, with groups unless it is root, who needs none."""
    uid, pid = context.uid, context.pid
    return Caller(uid, context.gid, pid, _groups(pid) if uid else (), context.umask)


def _is_now(time_ns: Time) -> bool:
    return time_ns is None or abs(time.time_ns() - int(time_ns)) < _NOW_NS


class _Forgetter:
    """Gives lookups back in batches: a FORGET of its own for each of rm -r's files would double the traffic."""

    def __init__(self, fs: RemoteFS) -> None:
        self._fs = fs
        self._pending: list[tuple[int, int]] = []
        self._wanted = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="forgets", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is left goes with the session."""
        with self._wanted:
            self._stopped = True
            self._wanted.notify()
        self._thread.join()

    def add(self, lookups: list[tuple[int, int]]) -> None:
        with self._wanted:
            if not self._pending:
                self._wanted.notify()
            self._pending += lookups

    def _run(self) -> None:
        while lookups := self._take():
            with contextlib.suppress(OSError):
                self._fs.forget(lookups)

    def _take(self) -> list[tuple[int, int]]:
        """What has gathered a moment after there was something; nothing at the end."""
        with self._wanted:
            self._wanted.wait_for(lambda: self._pending or self._stopped)
            if not self._stopped:
                self._wanted.wait_for(lambda: self._stopped, _FORGET_DELAY_S)
            taken, self._pending = self._pending, []
            return [] if self._stopped else taken


class _Operations(llfuse.Operations):
    """The handlers. Their names and arguments are llfuse's; see llfuse.Operations."""

    def __init__(self, fs: RemoteFS, cache: str, special: str) -> None:
        super().__init__()
        self._fs = fs
        self._cache = cache
        self._special_remote = special == "remote"
        self._valid_s = _NAME_VALID_S[cache]
        self._forgetter = _Forgetter(fs)
        self._files: dict[int, _File] = {}
        self._uncapable: dict[int, float] = {}  # until when, time.monotonic()
        # By handle: entries that the kernel has not taken yet, and where in them each offset is.
        self._listings: dict[int, tuple[list[DirectoryEntry], dict[int, int]]] = {}

    def start(self) -> None:
        """Begin to give lookups back."""
        self._forgetter.start()

    def stop(self) -> None:
        self._forgetter.stop()

    # -------------------------------------------------------------------------------------- what the kernel is told

    def _attributes(self, node: int, attr: Attributes, flags: int) -> Any:
        """llfuse's record; the hooks put the inode number in, which llfuse takes for the node id."""
        made = llfuse.EntryAttributes()
        made.st_ino = node
        uncached = flags & UNCACHED or stat.S_IFMT(attr.mode) in _OPENED_BY_THE_KERNEL
        made.attr_timeout = made.entry_timeout = 0 if uncached else self._valid_s
        made.st_mode, made.st_nlink, made.st_uid, made.st_gid = attr.mode, attr.nlink, attr.uid, attr.gid
        made.st_rdev, made.st_size, made.st_blocks, made.st_blksize = attr.rdev, attr.size, attr.blocks, attr.blksize
        made.st_atime_ns, made.st_mtime_ns, made.st_ctime_ns = attr.atime_ns, attr.mtime_ns, attr.ctime_ns
        return made

    def _entry(self, entry: Entry, bits: int = 0) -> Any:
        made = self._attributes(entry.node, entry.attributes, entry.flags)
        made.generation = entry.generation
        hooks.next_reply(entry.attributes.ino, bits)
        return made

    def _status(self, node: int, attr: Attributes, flags: int) -> Any:
        hooks.next_reply(attr.ino)
        return self._attributes(node, attr, flags)

    def _opening(self, opened: Opened) -> int:
        """How the kernel may cache an open file. With cache=none a shared mapping is refused rather than stale."""
        if opened.flags & OPENED_UNCACHED or self._cache == "none":
            return int(hooks.DIRECT_IO)
        if self._cache == "always" and not opened.flags & OPENED_CHANGED:
            return int(hooks.KEEP_CACHE)
        return 0

    # ------------------------------------------------------------------------------------------------------- names

    @_handler
    def lookup(self, parent: int, name: bytes, ctx: Any) -> Any:
        try:
            entry = self._fs.lookup(parent, name, _caller(ctx))
            self._refuse_to_open_special(entry, ctx.pid)
            return self._entry(entry)
        except FileNotFoundError:
            if self._cache != "always":
                raise
            absent = llfuse.EntryAttributes()
            absent.st_ino, absent.entry_timeout = 0, _DAY_S
            return absent

    def _refuse_to_open_special(self, entry: Entry, pid: int) -> None:
        """The kernel would open a FIFO or device of the server here; and llfuse has no poll and no interrupts."""
        if (
            self._special_remote
            and stat.S_IFMT(entry.attributes.mode) in _OPENED_BY_THE_KERNEL
            and wants_to_open(pid)
        ):
            self._forgetter.add([(entry.node, 1)])
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def forget(self, lookups: list[tuple[int, int]]) -> None:
        self._forgetter.add(lookups)

    @_handler
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        return self._entry(self._fs.mknod(parent, name, mode, rdev, _caller(ctx)))

    @_handler
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        return self._entry(self._fs.mkdir(parent, name, mode & 0o7777, _caller(ctx)))

    @_handler
    def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        return self._entry(self._fs.symlink(parent, name, target, _caller(ctx)))

    @_handler
    def link(self, node: int, parent: int, name: bytes, ctx: Any) -> Any:
        return self._entry(self._fs.link(node, parent, name, _caller(ctx)))

    @_handler
    def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        self._fs.unlink(parent, name, _caller(ctx))

    @_handler
    def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        self._fs.rmdir(parent, name, _caller(ctx))

    @_handler
    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, ctx: Any) -> None:
        self._fs.rename(parent, name, new_parent, new_name, 0, _caller(ctx))

    @_handler
    def readlink(self, node: int, ctx: Any) -> bytes:
        target = self._fs.readlink(node, _caller(ctx))
        if len(target) > _LONGEST_TARGET:
            raise OSError(errno.EIO, "target too long for the kernel")
        return target

    # -------------------------------------------------------------------------------------------------- attributes

    @_handler
    def getattr(self, node: int, ctx: Any) -> Any:
        return self._status(node, *self._fs.getattr(node))

    @_handler
    def setattr(self, node: int, attr: Any, fields: Any, handle: int | None, ctx: Any) -> Any:
        wanted: dict[str, Any] = {
            "mode": attr.st_mode if fields.update_mode else None,
            "uid": attr.st_uid if fields.update_uid else None,
            "gid": attr.st_gid if fields.update_gid else None,
            "size": attr.st_size if fields.update_size else None,
            "atime_ns": attr.st_atime_ns if fields.update_atime else None,
            "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
        }
        caller = _caller(ctx)
        if self._drops_privileges(node, wanted["mode"], caller):
            self._fs.setattr(node, mode=wanted.pop("mode"))
        try:
            result = self._fs.setattr(node, **wanted, handle=handle, caller=caller)
        except PermissionError:
            now = self._as_now(wanted)
            if now is None:
                raise
            result = self._fs.setattr(node, **now, handle=handle, caller=caller)
        return self._status(node, *result)

    def _drops_privileges(self, node: int, mode: int | None, caller: Caller) -> bool:
        """Whether the kernel clears suid and sgid because a user writes to another's file: no chmod(2) of that user's.

        The kernel has seen to real ones, unless cache=none; then it does not send this either.
        """
        if mode is None or caller.uid == 0 or self._cache == "none":
            return False
        attr, _ = self._fs.getattr(node)
        # Nothing changes if sgid stands without execution by the group: the kernel leaves that to the write itself.
        return attr.uid != caller.uid and (attr.mode ^ mode) & 0o7777 == attr.mode & ~mode & 0o6000

    @staticmethod
    def _as_now(wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The same change with "now" for its times: whoever may write may set that, but no time, utimensat(2).

        None if it cannot have been meant so.
        """
        times = {key: wanted[key] for key in ("atime_ns", "mtime_ns") if wanted[key] is not None}
        if not times or not all(map(_is_now, times.values())):
            return None
        return {**wanted, **dict.fromkeys(times, "now")}

    @_handler
    def access(self, node: int, mask: int, ctx: Any) -> bool:
        self._fs.access(node, mask, _caller(ctx))
        return True

    @_handler
    def statfs(self, ctx: Any) -> Any:
        figures = self._fs.statfs()
        made = llfuse.StatvfsData()
        made.f_blocks, made.f_bfree, made.f_bavail = figures[:3]
        made.f_files, made.f_ffree, made.f_favail = figures.files, figures.files_free, figures.files_free
        made.f_bsize, made.f_frsize, made.f_namemax = figures.block_bytes, figures.fragment_bytes, figures.name_max
        return made

    # ----------------------------------------------------------------------------------------- extended attributes

    @_handler
    def getxattr(self, node: int, name: bytes, ctx: Any = None) -> bytes:
        if name == _CAPABILITY and self._uncapable.get(node, 0) > time.monotonic():
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        try:
            # llfuse names no caller where it looks for an attribute on behalf of setxattr.
            return self._fs.getxattr(node, name, Caller() if ctx is None else _caller(ctx))
        except OSError as error:
            if name == _CAPABILITY and error.errno == errno.ENODATA:
                self._note_uncapable(node)
            raise

    def _note_uncapable(self, node: int) -> None:
        """The kernel asks for capabilities before every write(2): an answer is good for as long as attributes are."""
        if len(self._uncapable) >= _UNCAPABLE_AT_MOST:
            self._uncapable.clear()
        self._uncapable[node] = time.monotonic() + self._valid_s

    @_handler
    def listxattr(self, node: int, ctx: Any) -> list[bytes]:
        return self._fs.listxattr(node, _caller(ctx))

    @_handler
    def setxattr(self, node: int, name: bytes, value: bytes, ctx: Any) -> None:
        self._uncapable.pop(node, None)
        self._fs.setxattr(node, name, value, 0, _caller(ctx))

    @_handler
    def removexattr(self, node: int, name: bytes, ctx: Any) -> None:
        # The kernel drops capabilities from what is written to, and demands CAP_SETFCAP of who asks for that.
        caller = Caller() if name == _CAPABILITY else _caller(ctx)
        self._fs.removexattr(node, name, caller)

    def stacktrace(self) -> None:
        """llfuse's debugging aid, which any user could set off."""
        raise llfuse.FUSEError(errno.EOPNOTSUPP)

    # ------------------------------------------------------------------------------------------------------- files

    def _note_file(self, opened: Opened, opener: Caller, bits: int) -> None:
        if opened.handle & _HANDLE_WRITABLE:
            self._files[opened.handle] = _File(opener, bits == hooks.DIRECT_IO)

    @_handler
    def open(self, node: int, flags: int, ctx: Any) -> int:
        caller = _caller(ctx)
        opened = self._fs.open(node, flags, caller)
        if self._cache == "auto" and opened.flags & OPENED_CHANGED:
            hooks.forget_attributes(node)
        bits = self._opening(opened)
        self._note_file(opened, caller, bits)
        hooks.next_reply(bits=bits)
        return opened.handle

    @_handler
    def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> tuple[int, Any]:
        caller = _caller(ctx)
        entry, opened = self._fs.create(parent, name, flags, mode, caller)
        bits = hooks.DIRECT_IO if entry.flags & UNCACHED else self._opening(opened)
        self._note_file(opened, caller, bits)
        return opened.handle, self._entry(entry, bits)

    @_handler
    def read(self, handle: int, offset: int, size: int) -> bytes:
        return self._fs.read(handle, offset, size)

    @_handler
    def write(self, handle: int, offset: int, data: bytes) -> int:
        # llfuse does not say who writes: as whoever opened. Where the kernel does not see to suid, root's goes too.
        file = self._files[handle]
        return self._fs.write(handle, offset, data, kill_privileges=file.direct, caller=file.opener)

    @_handler
    def flush(self, handle: int) -> None:
        if handle & _HANDLE_WRITABLE:
            self._fs.flush(handle)

    @_handler
    def release(self, handle: int) -> None:
        self._files.pop(handle, None)
        self._fs.release(handle)

    @_handler
    def fsync(self, handle: int, datasync: bool) -> None:
        self._fs.fsync(handle, datasync=datasync)

    # ------------------------------------------------------------------------------------------------- directories

    @_handler
    def opendir(self, node: int, ctx: Any) -> int:
        handle = self._fs.opendir(node, _caller(ctx)).handle
        hooks.next_reply()
        return handle

    @_handler
    def readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, Any, int]]:
        return map(self._listed, self._entries_behind(handle, offset))

    def _entries_behind(self, handle: int, offset: int) -> list[DirectoryEntry]:
        """Entries behind an offset, of the last reply if they are there, else of a new one."""
        entries, positions = self._listings.get(handle, ([], {}))
        at = positions.get(offset) if offset else None  # offset 0 is opendir(3) or rewinddir(3): look again
        if at is not None and at < len(entries):
            return entries[at:]
        entries = self._fs.read_directory(handle, offset, _LISTING_BYTES)
        self._listings[handle] = entries, {entry.offset: i + 1 for i, entry in enumerate(entries)}
        return entries

    @staticmethod
    def _listed(entry: DirectoryEntry) -> tuple[bytes, Any, int]:
        made = llfuse.EntryAttributes()
        made.st_ino, made.st_mode = entry.ino, entry.type << 12  # DTTOIF of readdir(3)
        return entry.name, made, entry.offset

    @_handler
    def releasedir(self, handle: int) -> None:
        self._listings.pop(handle, None)
        self._fs.releasedir(handle)

    @_handler
    def fsyncdir(self, handle: int, datasync: bool) -> None:
        self._fs.fsyncdir(handle, datasync=datasync)


# --------------------------------------------------------------------------------------------------------- mounting


def _escaped(option: str) -> str:
    """An option for libfuse's -o list and llfuse's ASCII: a backslash, comma or other byte as octal, fuse_opt.c."""
    special = b'\\,"'
    return "".join(chr(b) if 32 < b < 127 and b not in special else f"\\{b:03o}" for b in os.fsencode(option))


def _llfuse_options(options: MountOptions) -> list[str]:
    wanted = [_escaped(option) for option in mount_options(options) if option not in ("allow_other", "nodiratime")]
    # libfuse 2 itself lets only the owner and root in with allow_root; and never updates times of directories.
    wanted += ["allow_root"] * options.allow_root + ["allow_other"] * options.allow_other
    if options.max_read < DEFAULT_MAX_READ:
        wanted.append(f"max_read={options.max_read}")
    return [*wanted, "nonempty", "big_writes", "no_splice_read"]


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """What is written to descriptor 2 meanwhile: libfuse 2 and fusermount complain nowhere else."""
    kept, caught = os.dup(2), os.memfd_create("stderr", os.MFD_CLOEXEC)
    try:
        os.dup2(caught, 2)
        yield lambda: os.pread(caught, 4096, 0).decode(errors="replace")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(caught)


def _detach_mountpoint(mountpoint: str) -> None:
    """As fusermount -uz; no failure if nothing is mounted there any more."""
    if os.geteuid() != 0:
        subprocess.run(["fusermount", "-u", "-z", "--", mountpoint], check=False, capture_output=True)
        return
    with contextlib.suppress(OSError):
        detach(mountpoint)


class LlfuseDriver:
    """One mount, see qtfs_client.drivers.Driver."""

    propagates = False

    def __init__(self, options: MountOptions, engine: Engine, connection: Connection, ticket: Ticket) -> None:
        self._options = options
        self._workers = min(options.channels, ticket.slots)
        session = Session(
            engine,
            connection,
            ticket,
            source=options.source,
            read_only=options.read_only,
            timeout_s=options.timeout_s,
        )
        self._fs = RemoteFS(session)
        self._operations = _Operations(self._fs, options.cache, options.special)
        self._loop: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._guard = threading.Lock()  # of the two below
        self._mounted = False
        self._detached = False

    @property
    def ticket(self) -> Ticket:
        """What joins the mount's session as it is now."""
        return self._fs.ticket

    def forget_name(self, directory: int, name: bytes) -> None:
        """Make the kernel look a name up again."""
        with self._guard:
            if self._mounted and not self._detached:
                llfuse.invalidate_entry(directory, name)

    def figures(self) -> dict[str, object]:
        """Counters for the control socket."""
        return {"driver": "llfuse", **self._fs.figures()}

    def mount(self) -> None:
        """Attach the file system to the mount point. Raises MountError."""
        mountpoint = self._options.mountpoint
        ruled = concerned(self._options.rules, self._options.source)
        if ruled:
            path = os.fsdecode(b"/" + b"/".join(ruled[0].pattern))
            reason = f"a special rule is for {path}, and driver llfuse knows none: use driver=fuse3"
            raise MountError(f"{mountpoint}: {reason}")
        hooks.allow_waking()
        with _captured_stderr() as complaint:
            try:
                llfuse.init(self._operations, mountpoint, _llfuse_options(self._options))
            except RuntimeError as error:
                text = complaint().strip().partition("\n")[0].removeprefix("fuse: ").removeprefix("fusermount: ")
                raise MountError(f"{mountpoint}: cannot mount: {text or error}") from error
        with self._guard:
            self._mounted = True
        if not hooks.is_mounted():
            raise MountError(f"{mountpoint}: llfuse was loaded before its hooks, or is not built on libfuse.so.2")

    def serve(self) -> None:
        """Answer the kernel until the file system is unmounted."""
        self._operations.start()
        self._loop = threading.Thread(target=self._run, name="llfuse", daemon=True)
        self._loop.start()
        self._loop.join()
        self._fs.stop()  # who forgets something may wait for the server
        self._operations.stop()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            llfuse.main(workers=self._workers, handle_signals=False)
        except BaseException as failure:
            self._failure = failure

    def unmount(self) -> None:
        """Detach the mount point and end `serve`."""
        with self._guard:
            if not self._mounted:
                return
            if not self._detached:
                self._detached = True
                _detach_mountpoint(self._options.mountpoint)
        self._fs.stop()
        hooks.exit_session()
        # Whoever still reads the device, because somebody has a file open, has to be interrupted to see it.
        while self._loop is not None and self._loop.is_alive():
            hooks.wake_threads()
            self._loop.join(_JOIN_S)

    def close(self) -> None:
        """End the session on the engine and give back everything."""
        with self._guard:
            mounted, self._mounted = self._mounted, False
        if mounted:
            hooks.unmounted()
            llfuse.close(unmount=not self._detached)
        self._fs.close()
