"""Ranges of POSIX locks split and merge: the engine, its kernel, and a model of one byte after the other agree."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.engine_process import EngineProcess
from harness.locking import NOBODY_IN_THE_WAY, READ, UNLOCK, WRITE, Opened
from harness.session import Session
from harness.wire import END_OF_FILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

#: Ranges are below that; one beyond stands for the rest of the file.
BYTES = 12
OWNERS = (1, 2, 3)
STRANGER = 99


class Model:
    """What each byte is locked for, by whom: fcntl(2)."""

    def __init__(self) -> None:
        self.bytes: list[dict[int, int]] = [{} for _ in range(BYTES + 1)]

    def others(self, owner: int, kind: int, span: range) -> bool:
        """Whether another owner is in the way."""
        held = (k for at in span for o, k in self.bytes[at].items() if o != owner)
        return any(WRITE in (k, kind) for k in held)

    def lock(self, owner: int, kind: int, span: range) -> int:
        if kind != UNLOCK and self.others(owner, kind, span):
            return errno.EAGAIN
        for at in span:
            self.bytes[at].pop(owner, None)
            if kind != UNLOCK:
                self.bytes[at][owner] = kind
        return 0

    def close(self, owner: int) -> None:
        self.lock(owner, UNLOCK, range(BYTES + 1))


def _end(last: int) -> int:
    return END_OF_FILE if last == BYTES else last


spans = st.tuples(st.integers(0, BYTES), st.integers(0, BYTES)).map(lambda p: range(min(p), max(p) + 1))
steps = st.lists(
    st.tuples(st.sampled_from(OWNERS), st.sampled_from([READ, READ, WRITE, WRITE, UNLOCK, UNLOCK, "close"]), spans),
    max_size=25,
)


@contextmanager
def opened(engine: EngineProcess, share: Path) -> Iterator[Opened]:
    with Session(engine.address, share) as session:
        yield Opened(session)


def check(file: Opened, local: int, model: Model) -> None:
    for at in range(BYTES + 1):
        for kind in (READ, WRITE):
            expected = model.others(STRANGER, kind, range(at, at + 1))
            found = file.look(kind, at, at, STRANGER)
            assert (found.type != NOBODY_IN_THE_WAY) == expected, "what the kernel says"
            if expected:
                assert found.type in model.bytes[at].values()
            taken = file.lock(kind, at, at, STRANGER)
            assert taken == (errno.EAGAIN if expected else 0), "what the engine says"
            file.lock(UNLOCK, at, at, STRANGER)
            assert _is_free(local, kind, at) != expected, "what a process of the server finds"


def _is_free(fd: int, kind: int, at: int) -> bool:
    operation = fcntl.LOCK_EX if kind == WRITE else fcntl.LOCK_SH
    try:
        fcntl.lockf(fd, operation | fcntl.LOCK_NB, 1, at)
    except BlockingIOError:
        return False
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, at)
    return True


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_ranges_split_and_merge(engine: EngineProcess, share: Path, steps: list[tuple[int, int | str, range]]) -> None:
    path = share / "file"
    path.touch()
    model = Model()
    with opened(engine, share) as file, path.open("r+b") as local:
        for owner, kind, span in steps:
            if isinstance(kind, str):
                file.session.flush(file.handle, owner)
                model.close(owner)
            else:
                assert file.lock(kind, span[0], _end(span[-1]), owner) == model.lock(owner, kind, span)
        check(file, local.fileno(), model)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_waits_are_granted_when_nothing_is_in_the_way(
    engine: EngineProcess, share: Path, steps: list[tuple[int, int | str, range]]
) -> None:
    """A wait for some bytes ends when the last lock in its way is given back, not before."""
    (share / "file").touch()
    model = Model()
    with opened(engine, share) as file, opened(engine, share) as waiting:
        for owner, kind, span in steps:
            if not isinstance(kind, str):
                file.lock(kind, span[0], _end(span[-1]), owner)
                model.lock(owner, kind, span)
        span = range(3, 8)
        waiting.wait(WRITE, 7, span[0], span[-1])
        for owner in OWNERS:
            if not model.others(STRANGER, WRITE, span):
                break
            assert waiting.is_waiting()
            file.session.flush(file.handle, owner)
            model.close(owner)
        assert waiting.outcome() == (7, 0)
