"""Processes that operations fork: for work beside ours, or on the server's side."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence


def in_child(work: Callable[[], object], *, quiet: bool = False) -> int:
    """The process that does this; its exit status is not 0 if it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception:
            if not quiet:
                traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def expect_all(children: list[int]) -> None:
    """Wait for all, then raise ChildProcessError if one of them failed."""
    ended = [ended_well(child) for child in children]
    if not all(ended):
        raise ChildProcessError("a process that took part failed")


@contextlib.contextmanager
def together(works: Sequence[Callable[[], object]]) -> Iterator[None]:
    """A process for each, beside the body; none of them outlives it. Raises ChildProcessError if one failed."""
    children: list[int] = []
    try:
        for work in works:
            children.append(in_child(work))
        yield
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    expect_all(children)
