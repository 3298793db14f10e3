"""Jobs of the tests in processes of their own: `workers.py JOB ARGUMENT...`.

A job says "ready", waits for a line, does its work, and says what came of it. Nothing of ours is imported, so it starts
at once.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sqlite3
import struct
import sys


def say(word: object) -> None:
    print(word, flush=True)


def ready() -> None:
    say("ready")
    hear()


def hear() -> str:
    return sys.stdin.readline().strip()


# --------------------------------------------------------------------------------------------------------------- files


def append(path: str, who: str, count: str) -> None:
    """Append `count` numbered lines of various lengths, one write(2) each."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    ready()
    for number in range(int(count)):
        line = f"{who} {number} {'x' * (number * 37 % 3000)}\n".encode()
        assert os.write(fd, line) == len(line)
    os.close(fd)


def append_counted(path: str, count: str) -> None:
    """Append numbered lines, one write(2) each, and say the number of each when it is written."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    ready()
    for number in range(int(count)):
        line = f"{number} {'x' * (number * 37 % 300)}\n".encode()
        assert os.write(fd, line) == len(line)
        say(number)
    os.close(fd)


def storm(directory: str, count: str) -> None:
    """Names that come, change and go; each call must succeed, and nothing stays."""
    ready()
    for number in range(int(count)):
        one, other = f"{directory}/one-{number}", f"{directory}/other-{number % 7}"
        os.mkdir(one)
        os.rename(one, other)
        os.close(os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.link(one, f"{other}/link")
        os.rename(one, f"{other}/one")
        for name in ("link", "one"):
            os.unlink(f"{other}/{name}")
        os.rmdir(other)


def create(directory: str, count: str) -> None:
    """Try to be the one who creates each of `count` names; says which it was."""
    ready()
    won = []
    for number in range(int(count)):
        try:
            os.close(os.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            won.append(str(number))
        except FileExistsError:
            pass
    say(" ".join(won))


def hold(path: str) -> None:
    """Keep a file open; after the line, read what is in it."""
    fd = os.open(path, os.O_RDWR)
    ready()
    say(os.pread(fd, 100, 0).decode())


# --------------------------------------------------------------------------------------------------------------- locks


def _lock(fd: int, kind: str, operation: int) -> None:
    (fcntl.flock if kind == "flock" else fcntl.lockf)(fd, operation)


def lock(path: str, kind: str) -> None:
    """Wait for the exclusive lock, say so, and keep it until the next line."""
    fd = os.open(path, os.O_RDWR)
    ready()
    _lock(fd, kind, fcntl.LOCK_EX)
    say("locked")
    hear()
    _lock(fd, kind, fcntl.LOCK_UN)
    say("unlocked")


def try_lock(path: str, kind: str) -> None:
    """Whether the lock is free, once for each line, until an empty one."""
    fd = os.open(path, os.O_RDWR)
    say("ready")
    while hear():
        try:
            _lock(fd, kind, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock(fd, kind, fcntl.LOCK_UN)
            say("free")
        except OSError as error:
            assert error.errno in (errno.EAGAIN, errno.EACCES)
            say("taken")


def count(path: str, kind: str, times: str) -> None:
    """Add 1 to the number in a file `times` times, under the lock; without it, additions would be lost."""
    fd = os.open(path, os.O_RDWR)
    ready()
    for _ in range(int(times)):
        _lock(fd, kind, fcntl.LOCK_EX)
        number = int(os.pread(fd, 20, 0) or b"0")
        os.pwrite(fd, b"%d" % (number + 1), 0)
        _lock(fd, kind, fcntl.LOCK_UN)
    os.close(fd)


# -------------------------------------------------------------------------------------------------------------- memory


def ping(path: str, mine: str, rounds: str) -> None:
    """Two of these count up in turns in shared memory: the even numbers are one's, the odd ones the other's."""
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, 8192)
    ready()
    for number in range(int(mine), 2 * int(rounds), 2):
        while struct.unpack_from("<Q", memory, 4000)[0] != number:
            os.sched_yield()
        struct.pack_into("<Q", memory, 4000, number + 1)
    memory.flush()


# ------------------------------------------------------------------------------------------------------------ databases


def insert(path: str, who: str, transactions: str) -> None:
    """Each transaction adds three rows and counts them in another table; some are taken back."""
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    ready()
    for number in range(int(transactions)):
        base.execute("BEGIN IMMEDIATE")
        rows = [(who, number, part, "t" * (number % 500)) for part in range(3)]
        base.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
        base.execute("UPDATE totals SET number = number + 3")
        base.execute("ROLLBACK" if number % 10 == 9 else "COMMIT")
    base.close()


def insert_counted(path: str, transactions: str) -> None:
    """Each transaction adds its number; says it when it is committed."""
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    ready()
    for number in range(int(transactions)):
        base.execute("BEGIN IMMEDIATE")
        base.execute("INSERT INTO entries VALUES ('counted', ?, 0, ?)", (number, "t" * (number % 500)))
        base.execute("UPDATE totals SET number = number + 1")
        base.execute("COMMIT")
        say(number)
    base.close()


def insert_halfway(path: str) -> None:
    """Say so in the middle of a transaction whose pages are in the file already, and stay there."""
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("PRAGMA cache_size = 10")
    ready()
    base.execute("BEGIN IMMEDIATE")
    base.executemany("INSERT INTO entries VALUES ('lost', ?, 0, ?)", ((number, "t" * 500) for number in range(1000)))
    base.execute("UPDATE totals SET number = -1")
    say("halfway")
    hear()


if __name__ == "__main__":
    vars()[sys.argv[1]](*sys.argv[2:])
