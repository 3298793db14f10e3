"""Many processes that wait: `crowd.py open|read PATH COUNT` says "ready" once all are forked.

At a line on standard input those that still live are killed. Says how many were, and with which errnos others ended.
"""

from __future__ import annotations

import collections
import errno
import os
import signal
import sys


def wait(kind: str, path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY if kind == "open" else os.O_RDWR)
        os.read(fd, 1)
    except OSError as error:
        return error.errno or 1
    return 0


def main(kind: str, path: str, count: str) -> None:
    pids = []
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            os._exit(wait(kind, path))
        pids.append(pid)
    print("ready", flush=True)
    sys.stdin.readline()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ends = collections.Counter(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    killed = ends.pop(-signal.SIGKILL, 0)
    others = {errno.errorcode.get(status, str(status)): number for status, number in ends.items()}
    print(killed, others, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
