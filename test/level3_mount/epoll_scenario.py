"""One program with an epoll on hundreds of FIFOs, driven by chance that a seed decides; what it sees, step by step.

After each operation the program takes the events that this operation brought. It knows by a model of its own how many
files those are, waits for that many, and then makes sure that there are no more.
"""

from __future__ import annotations

import os
import random
import select
from dataclasses import dataclass, field
from typing import Any

from harness.waiting import wait_until

PIPE_BYTES = 65536
WAIT_S = 10.0


@dataclass
class End:
    """The reading end in the program, and its writers on the other side."""

    path: str
    reader: int
    writers: list[int] = field(default_factory=list)
    mask: int = 0
    waiting: int = 0  # bytes in the pipe
    had_writer: bool = False


class Scenario:
    """`a`: where the program is; `b`: where the FIFOs are made, written and closed."""

    def __init__(self, a: str, b: str, count: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.epoll = select.epoll()
        self.log: list[Any] = []
        self.ends: list[End] = []
        for number in range(count):
            os.mkfifo(f"{b}/{number}")
            reader = os.open(f"{a}/{number}", os.O_RDONLY | os.O_NONBLOCK)
            self.ends.append(End(f"{b}/{number}", reader))
        self.numbers = {end.reader: number for number, end in enumerate(self.ends)}

    def close(self) -> None:
        self.epoll.close()
        for end in self.ends:
            for fd in (end.reader, *end.writers):
                os.close(fd)

    # ---- operations: each returns whether it is an arrival, for which an edge comes

    def register(self, end: End) -> bool:
        mask = select.EPOLLIN | self.chance.choice((0, *[select.EPOLLET] * 5, select.EPOLLET | select.EPOLLRDHUP))
        (self.epoll.modify if end.mask else self.epoll.register)(end.reader, mask)
        end.mask = mask
        return True

    def write(self, end: End) -> bool:
        size = self.chance.choice((1, 100, 5000))
        if not end.writers or end.waiting + size > PIPE_BYTES // 2:
            return False
        end.waiting += os.write(end.writers[0], bytes(size))
        return True

    def read(self, end: End) -> bool:
        if end.waiting:
            end.waiting -= len(os.read(end.reader, self.chance.choice((1, 50, 1 << 16))))
        return False

    def open_writer(self, end: End) -> bool:
        if len(end.writers) < 2:
            end.writers.append(os.open(end.path, os.O_WRONLY | os.O_NONBLOCK))
            end.had_writer = True
        return False

    def close_writer(self, end: End) -> bool:
        if not end.writers:
            return False
        os.close(end.writers.pop())
        if not end.writers:
            poll = select.poll()
            poll.register(end.reader, 0)
            wait_until(lambda: poll.poll(0), "the end to be known")  # RELEASE comes a moment after close(2)
        return not end.writers

    # ---- what there must be

    def is_ready(self, end: End) -> bool:
        return end.waiting > 0 or (end.had_writer and not end.writers)

    def expected(self, touched: End, arrived: bool) -> set[int]:
        """Descriptors with events: all ready ones that are level-triggered, and the one at which something arrived."""
        levels = {e.reader for e in self.ends if e.mask and not e.mask & select.EPOLLET and self.is_ready(e)}
        edges = {touched.reader} if touched.mask & select.EPOLLET and arrived and self.is_ready(touched) else set()
        return levels | edges

    def collect(self, wanted: set[int]) -> list[tuple[int, int]]:
        found: dict[int, int] = {}
        wait_until(lambda: self._take(found) or wanted <= found.keys(), f"events of {wanted}", WAIT_S, 0.001)
        self._take(found)
        return sorted((self.numbers[fd], events) for fd, events in found.items())

    def _take(self, found: dict[int, int]) -> None:
        for fd, events in self.epoll.poll(0, len(self.ends)):
            found[fd] = found.get(fd, 0) | events

    def step(self) -> None:
        end = self.chance.choice(self.ends)
        operations = [self.register, self.open_writer, self.write, self.write, self.write, self.read, self.close_writer]
        operation = self.chance.choice(operations)
        arrived = operation(end)
        self.log.append((operation.__name__, self.numbers[end.reader], self.collect(self.expected(end, arrived))))


def run(a: str, b: str, count: int, steps: int, seed: int) -> list[Any]:
    """What the program saw."""
    scenario = Scenario(a, b, count, seed)
    try:
        for end in scenario.ends:
            scenario.open_writer(end)
            scenario.register(end)
        for _ in range(steps):
            scenario.step()
        return scenario.log
    finally:
        scenario.close()
