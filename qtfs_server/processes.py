"""KILL, SETAFFINITY, GETAFFINITY, PROCESSES: what clients may do to processes of the server.

Only processes whose command name stands under [Kill] are there for clients. Who is meant is checked on something that
cannot change hands: a pidfd for kill; for affinity, which the kernel takes by number only, a descriptor of /proc/PID,
which answers ESRCH once its process is gone, asked right before the call and right after.
Callers other than root may do what kill(2) and sched_setaffinity(2) let their uid do.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import psutil

from qtfs_common import remote_calls
from qtfs_common.protocol import LIMITS
from qtfs_common.remote_calls import ProcessRecord
from qtfs_common.whitelist import Type
from qtfs_server.policy import deny, listed_commands

if TYPE_CHECKING:
    from qtfs_server.errands import Errand

#: The kernel keeps this much of a command's name: TASK_COMM_LEN of <linux/sched.h>, less the NUL.
_COMM_BYTES = 15
_TICKS = os.sysconf("SC_CLK_TCK")


class _Seen(NamedTuple):
    """A process as /proc tells of it: proc_pid_stat(5), proc_pid_status(5). `leader` is its pid if it is a thread."""

    leader: int
    parent: int
    state: str
    start: int
    name: bytes
    uids: tuple[int, int, int]  # real, effective, saved


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _read(directory: int, name: str) -> bytes:
    """A file of a process; ESRCH once it is gone."""
    try:
        fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    except FileNotFoundError:
        raise _error(errno.ESRCH) from None
    with os.fdopen(fd, "rb") as file:
        return file.read()


@contextmanager
def _opened(pid: int) -> Iterator[int]:
    """A descriptor of /proc/PID, which stays that process's; threads have one too. ESRCH: there is none."""
    try:
        fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _error(errno.ESRCH) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _look(directory: int) -> _Seen:
    text = _read(directory, "stat")
    name_end = text.rindex(b")")
    fields = text[name_end + 2 :].split()
    status = dict(line.split(b":", 1) for line in _read(directory, "status").splitlines() if b":" in line)
    real, effective, saved, _ = map(int, status[b"Uid"].split())
    name = text[text.index(b"(") + 1 : name_end]
    leader, parent, start = int(status[b"Tgid"]), int(fields[1]), int(fields[19])
    return _Seen(leader, parent, chr(fields[0][0]), start, name, (real, effective, saved))


def _is_listed(name: bytes) -> bool:
    return any(name == command[:_COMM_BYTES] for command in listed_commands())


def _command(pid: int, seen: _Seen) -> bytes:
    """The name of the command that a process or thread belongs to: threads have names of their own."""
    if seen.leader == pid:
        return seen.name
    with _opened(seen.leader) as directory:
        return _look(directory).name


def _check(pid: int, seen: _Seen, start: int) -> None:
    """ESRCH if another process is meant; EPERM if no client may touch this one."""
    if start not in (0, seen.start):
        raise _error(errno.ESRCH)
    if not _is_listed(_command(pid, seen)):
        deny(Type.KILL)
        raise _error(errno.EPERM)


def _check_pid(pid: int) -> None:
    """EINVAL for process groups, and for 0, which would be the engine itself."""
    if pid <= 0:
        raise _error(errno.EINVAL)


def kill(errand: Errand) -> bytes:
    """KILL: pidfd_send_signal(2), so that the process that was checked gets the signal, or nobody."""
    call = remote_calls.parse_kill(errand.body)
    _check_pid(call.pid)
    if not 0 <= call.signal < signal.NSIG:
        raise _error(errno.EINVAL)
    pidfd = _pidfd(call.pid)
    try:
        with _opened(call.pid) as directory:
            seen = _look(directory)
        _check(call.pid, seen, call.start)
        real, _, saved = seen.uids
        if errand.uid not in (0, real, saved):
            raise _error(errno.EPERM)
        # It lived when it was looked at only if it still does: then the pid was its own all the time.
        signal.pidfd_send_signal(pidfd, call.signal)
    finally:
        os.close(pidfd)
    return b""


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # A thread's number.
        raise _error(errno.ESRCH if error.errno in (errno.EINVAL, errno.ENOENT) else error.errno or errno.EIO) from None


def set_affinity(errand: Errand) -> bytes:
    """SETAFFINITY: of a process's first thread, or of the thread with that id."""
    call = remote_calls.parse_affinity(errand.body)
    _check_pid(call.pid)
    cpus = remote_calls.cpus_of(call.mask)
    with _opened(call.pid) as directory:
        seen = _look(directory)
        _check(call.pid, seen, call.start)
        if errand.uid not in (0, *seen.uids[:2]):
            raise _error(errno.EPERM)
        os.sched_setaffinity(call.pid, cpus)
        _look(directory)
    return b""


def get_affinity(errand: Errand) -> bytes:
    """GETAFFINITY: the mask."""
    call = remote_calls.parse_affinity(errand.body)
    _check_pid(call.pid)
    if call.mask:
        raise ValueError("a mask in GETAFFINITY")
    with _opened(call.pid) as directory:
        _check(call.pid, _look(directory), call.start)
        cpus = os.sched_getaffinity(call.pid)
        _look(directory)
    return remote_calls.mask_of(cpus)


def list_processes(errand: Errand) -> bytes:
    """PROCESSES: those whose commands are listed, by pid."""
    after, size = remote_calls.parse_processes(errand.body)
    if size > LIMITS["MAX_PAYLOAD"]:
        raise _error(errno.EINVAL)
    found = bytearray()
    booted_s = psutil.boot_time()
    for pid in sorted(pid for pid in psutil.pids() if pid > after):
        packed = _packed(pid, booted_s)
        if packed and len(found) + len(packed) > size:
            if not found:
                raise _error(errno.EINVAL)
            break
        found += packed
    return bytes(found)


def _packed(pid: int, booted_s: float) -> bytes:
    """A process's record; nothing if it is gone, or not for clients."""
    try:
        with _opened(pid) as directory:
            seen = _look(directory)
    except OSError:
        return b""
    if not _is_listed(seen.name):
        return b""
    started_s = int(booted_s + seen.start / _TICKS)
    uid = seen.uids[1]
    return remote_calls.pack_process(ProcessRecord(pid, seen.parent, uid, seen.state, seen.start, started_s, seen.name))
