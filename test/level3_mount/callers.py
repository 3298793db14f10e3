"""Programs that use a mount, in processes of their own: `callers.py JOB ARGUMENT...`.

A job says "ready", waits for a line, makes its calls, and says what came of them. Those that a signal may end
are made directly: Python would repeat them after EINTR.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
#: <asm-generic/fcntl.h>; Python 3.11 does not name them.
_OFD_SETLK, _OFD_SETLKW = 37, 38


def say(word: object) -> None:
    print(word, flush=True)


def ready() -> None:
    say("ready")
    sys.stdin.readline()


def outcome(result: int) -> str:
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def mkdir(path: str, catches: str = "") -> None:
    """One mkdir(2); with "catches", SIGALRM has a handler that does not restart calls."""
    if catches:
        signal.signal(signal.SIGALRM, lambda number, frame: None)
        signal.siginterrupt(signal.SIGALRM, True)
    ready()
    say(outcome(_libc.mkdir(os.fsencode(path), 0o755)))


def execute(path: str) -> None:
    """One execve(2) that has a written file to close on its way."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.write(fd, b"text")
    ready()
    os.execv("/bin/echo", ["echo", "done"])


def write(path: str) -> None:
    """One write(2) of "once"."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    ready()
    say(outcome(_libc.write(fd, b"once", 4)))
    os.close(fd)


def stat(path: str) -> None:
    ready()
    try:
        os.stat(path)
        say("done")
    except OSError as error:
        say(errno.errorcode[error.errno or 0])


def hold(kind: str, path: str) -> None:
    """Hold a lock on a whole file."""
    fd = os.open(path, os.O_RDWR)
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX)
    else:
        fcntl.lockf(fd, fcntl.LOCK_EX)
    ready()


def open_many(directory: str, count: str, writes: str = "") -> None:
    """Have some files open; with "writes", to write, so that the server has to be told when each is closed."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(count) + 64, int(count) + 64))
    for number in range(int(count)):
        os.open(f"{directory}/{number}", os.O_RDWR if writes else os.O_RDONLY)
    ready()


def locks(path: str) -> None:
    """Lock as told: each line is a kind (posix, ofd, flock), a type (r, w, u), whether to wait, start and length.

    Says what came of it. SIGALRM interrupts. An empty line closes the file, the end of input ends the process.
    """
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGALRM, True)
    fd = os.open(path, os.O_RDWR)
    say("ready")
    for line in sys.stdin:
        if not line.strip():
            os.close(fd)
            say("closed")
            continue
        kind, what, waits, start, length = line.split()
        say(outcome(_lock(fd, kind, "rwu".index(what), waits == "wait", int(start), int(length))))


def _lock(fd: int, kind: str, what: int, waits: bool, start: int, length: int) -> int:
    if kind == "flock":
        operation = (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)[what]
        return int(_libc.flock(fd, operation | (0 if waits else fcntl.LOCK_NB)))
    command = {"posix": (fcntl.F_SETLK, fcntl.F_SETLKW), "ofd": (_OFD_SETLK, _OFD_SETLKW)}[kind][waits]
    kinds = (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)
    return int(_libc.fcntl(fd, command, struct.pack("hhqqi4x", kinds[what], os.SEEK_SET, start, length, 0)))


def write_many(directory: str, count: str) -> None:
    """1 MiB to each of some files, all at once; says how many calls wrote it all."""
    fds = [os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT, 0o644) for number in range(int(count))]
    for fd in fds:
        os.pwrite(fd, b"x", 0)  # the kernel asks for capabilities first, and then no more
    done = [0] * len(fds)

    def one(number: int) -> None:
        done[number] = os.write(fds[number], bytes([number]) * MIB)

    ready()
    in_threads([lambda number=number: one(number) for number in range(len(fds))])  # type: ignore[misc]
    for fd in fds:
        os.close(fd)
    say(done.count(MIB))


def churn(directory: str, threads: str, seconds: str) -> None:
    """stat(2) and mkdir(2) for a while; says which errors there were."""
    end = time.monotonic() + float(seconds)
    errors: set[str] = set()

    def one(thread: int) -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            for call, path in ((os.stat, directory), (os.mkdir, f"{directory}/{thread}-{number}")):
                try:
                    call(path)
                except OSError as error:
                    errors.add(errno.errorcode[error.errno or 0])

    ready()
    in_threads([lambda thread=thread: one(thread) for thread in range(int(threads))])  # type: ignore[misc]
    say(",".join(sorted(errors)))


def in_threads(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def change_mapping(path: str) -> None:
    """Change a page in memory, and never write it oneself."""
    with open(path, "r+b") as file:
        pages = mmap.mmap(file.fileno(), 4096)
    pages[:5] = b"DIRTY"
    ready()


def append_lines(path: str) -> None:
    """Numbered lines, one write(2) each, until told to stop; says how many."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    ready()
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stopped.set()), daemon=True).start()
    number = 0
    while not stopped.is_set():
        if _libc.write(fd, b"%08d\n" % number, 9) != 9:
            say(errno.errorcode[ctypes.get_errno()])
            break
        number += 1
        time.sleep(0.001)
    say(number)


def numbered(directory: str) -> None:
    """Numbered directories, and lines of a log of the same numbers, until told to stop, whatever comes of each.

    Says when both failed for the first time, when both are done for the first time after that, and in the end what
    came of all.
    """
    fd = os.open(f"{directory}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ready()
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stopped.set()), daemon=True).start()
    said: dict[str, list[str]] = {"mkdir": [], "write": []}
    awaited = ["EIO", "done"]
    while not stopped.is_set():
        number = len(said["mkdir"])
        said["mkdir"].append(outcome(_libc.mkdir(os.fsencode(f"{directory}/{number}"), 0o755)))
        said["write"].append(outcome(_libc.write(fd, b"%08d\n" % number, 9)))
        if awaited and said["mkdir"][-1] == said["write"][-1] == awaited[0]:
            say(awaited.pop(0))
        time.sleep(0.002)
    os.close(fd)
    say(json.dumps(said))


JOBS = {
    job.__name__: job
    for job in (
        mkdir, execute, write, stat, hold, open_many, locks, write_many, churn, change_mapping, append_lines, numbered,
    )
}  # fmt: skip

if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
