"""Faults by seed: what a `FaultProxy` does to which message.

    proxy.fault = schedule = Schedule(17)
    ...
    schedule.struck             # Counter({"cut": 5, "stale": 1, ...})

One seed is one schedule: what becomes of the n-th message of a slot in a direction is a function of the seed, the slot,
the direction and n alone. Which request that is, the threads of client and engine decide among themselves.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

from harness.fault_proxy import Action, Cut, Garble, HalfClose, Message, Stale
from harness.wire import EVENT_SLOT, HEADER_BYTES

from qtfs_common.protocol import LIMITS

#: Of so many messages, faults strike this many.
_OF, _STRUCK = 100, 7
#: Where the fields of a header are.
_OP_AT, _FLAGS_AT, _SEQUENCE_AT = 4, 6, 16
_DELAY_MOST_S = 0.02
_STALE_MOST_S = 0.1
#: A request is given up after eight connections that broke under it, so no slot has more faults in a row.
_IN_A_ROW = 5


def _cut(draw: random.Random, message: Message) -> Action:
    return Cut(draw.randrange(message.length + 1))


def _half_close(draw: random.Random, message: Message) -> Action:
    return HalfClose()


def _delay(draw: random.Random, message: Message) -> None:
    time.sleep(draw.random() * _DELAY_MOST_S)


def _stale(draw: random.Random, message: Message) -> Action:
    if message.where == "reply":
        return Cut(0)
    return Stale(draw.randrange(40), draw.random() * _STALE_MOST_S)


def _garble(draw: random.Random, message: Message) -> Action:
    """Framing and headers that can be told from good ones; more than that no receiver can do."""
    lengths = [*range(HEADER_BYTES), LIMITS["MAX_MESSAGE"] + 1, 1 << 31, (1 << 32) - 1]
    garbled = [
        Garble(0, struct.pack("<I", draw.choice(lengths))),
        Garble(0, struct.pack("<I", message.length + draw.randrange(1, 4096)), ends=True),
        Garble(_OP_AT, struct.pack("<H", draw.randrange(0x100, 0x10000))),
        Garble(_FLAGS_AT, struct.pack("<H", 1 if message.where == "request" else 0)),
    ]
    if message.slot not in (None, EVENT_SLOT) and message.operation not in ("MOUNT", "ATTACH", "DETACH", "PING"):
        garbled.append(Garble(_SEQUENCE_AT, struct.pack("<Q", draw.randrange(1 << 40, 1 << 64))))
    return draw.choice(garbled)


_KINDS: dict[str, Callable[[random.Random, Message], Action | None]] = {
    "cut": _cut,
    "half-close": _half_close,
    "delay": _delay,
    "stale": _stale,
    "garble": _garble,
}


class Schedule:
    """A fault for `FaultProxy.fault`; `struck` counts by kind."""

    def __init__(self, seed: int, kinds: tuple[str, ...] = tuple(_KINDS)) -> None:
        self.seed = seed
        self.struck: Counter[str] = Counter()
        self._kinds = kinds
        self._counts: Counter[tuple[int | None, str]] = Counter()
        self._in_a_row: Counter[int | None] = Counter()
        self._guard = threading.Lock()

    def __call__(self, message: Message) -> Action | None:
        kind, draw = self._choose(message)
        return _KINDS[kind](draw, message) if kind else None

    def _choose(self, message: Message) -> tuple[str, random.Random]:
        place = (message.slot, message.where)
        with self._guard:
            number = self._counts[place]
            self._counts[place] += 1
            draw = random.Random(f"{self.seed} {place} {number}")
            strikes = draw.randrange(_OF) < _STRUCK and self._in_a_row[message.slot] < _IN_A_ROW
            if strikes:
                kind = draw.choice(self._kinds)
                self.struck[kind] += 1
                self._in_a_row[message.slot] += 1
                return kind, draw
            if message.where == "reply" and message.operation != "ATTACH":
                self._in_a_row[message.slot] = 0
        return "", draw
