"""Faults by seed in shared memory: what a peer that goes, or writes nonsense, does to a channel that is in use.

    with RingFaults(bar_path(engine), 17, calls_made).striking() as faults:
        ...
    faults.struck               # Counter({"cut": 31, "garble": 20})

A channel and what happens to it are a function of the seed; the moment is one of the clock, so it may strike anywhere
in a message. Where a call takes longer than it is from one fault to the next none would ever be done, so there is one
fault for two calls at most. Nothing is struck that the other side could take for good, and no client's claim: when
somebody else takes that, the long WRITE that lies there is lost, with EIO (doc/rings.md, 5).
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.ring_file import EPOCH, TAIL, RingFile

#: Between two faults.
_APART_MOST_S = 0.001


class RingFaults:
    """`struck` counts by kind."""

    def __init__(self, path: Path, seed: int, made: Callable[[], int]) -> None:
        """`made`: how many calls have been made so far."""
        self.struck: Counter[str] = Counter()
        self._path = path
        self._made = made
        self._draw = random.Random(f"{seed} ring")

    @contextlib.contextmanager
    def striking(self) -> Iterator[RingFaults]:
        """Channels that the engine serves are struck, now this one, now that one."""
        over = threading.Event()
        begin = self._made()

        def strike() -> None:
            with RingFile(self._path) as ring:
                while not over.wait(self._draw.random() * _APART_MOST_S):
                    if 2 * self.struck.total() <= self._made() - begin:
                        self._strike(ring)

        thread = threading.Thread(target=strike, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _strike(self, ring: RingFile) -> None:
        side = self._draw.choice((ring.client_line, ring.engine_line))
        kind = self._draw.choice(sorted(_KINDS)) if side == ring.engine_line else "garble"
        served = ring.served()
        if served:
            _KINDS[kind](self._draw, ring, side(self._draw.choice(served)))
            self.struck[kind] += 1


def _cut(draw: random.Random, ring: RingFile, line: int) -> None:
    """The engine is gone, or another one is there."""
    ring.set(line + EPOCH, draw.choice((0, draw.getrandbits(64))))


def _garble(draw: random.Random, ring: RingFile, line: int) -> None:
    """The side has written more than there is room for."""
    ring.set(line + TAIL, (ring.get(line + TAIL) + draw.choice((1 << 31, 1 << 32, 1 << 62))) % (1 << 64))


_KINDS: dict[str, Callable[[random.Random, RingFile, int], None]] = {"cut": _cut, "garble": _garble}
