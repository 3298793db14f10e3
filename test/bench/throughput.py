"""How much goes through: one file from end to end, and some processes at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import calls
from children import together
from places import MIB, Place, Sample


def sequential_read(place: Place, count: int) -> Sample:
    """`count` MiB from the beginning of a file, 1 MiB at a time."""
    buffer = bytearray(MIB)
    fd = os.open(place.path("data"), os.O_RDONLY)

    def read_all() -> None:
        left = count * MIB
        while left > 0 and (got := os.readv(fd, [buffer])):
            left -= got
        assert left <= 0, f"the file ends {left} bytes early"

    try:
        place.forget_pages(fd)
        return place.timed(count, read_all)
    finally:
        os.close(fd)


def sequential_write(place: Place, count: int) -> Sample:
    """`count` MiB into a new file, 1 MiB at a time. The close counts: whatever was held back has to go."""
    block, name = os.urandom(MIB), place.path("stream")

    def write_all() -> None:
        fd = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            for _ in range(count):
                os.write(fd, block)
        finally:
            os.close(fd)

    try:
        return place.timed(count, write_all)
    finally:
        os.unlink(name)


def open_close(processes: int) -> Callable[[Place, int], Sample]:
    """Of one file, by that many processes together."""
    return partial(_together, processes, lambda place, _number, count: calls.open_close(place, count))


def create_write_unlink(processes: int) -> Callable[[Place, int], Sample]:
    """By that many processes together, each with a name of its own in one directory."""

    def work(place: Place, number: int, count: int) -> Sample:
        return calls.create_write_unlink(place, count, f"created{number}")

    return partial(_together, processes, work)


def _together(processes: int, work: Callable[[Place, int, int], Sample], place: Place, count: int) -> Sample:
    """All of them do `count` together. Timed from when all are ready until the last is done, but for their exits."""
    ready, tell = os.pipe()
    waiting, go = os.pipe()
    done, finish = os.pipe()
    share = max(1, count // processes)

    def one(number: int) -> None:
        os.close(go)
        os.write(tell, b"x")
        os.read(waiting, 1)
        work(place, number, share)
        os.write(finish, b"x")

    def race() -> None:
        os.close(go)
        _await(done, processes)

    with together([partial(one, number) for number in range(processes)]):
        os.close(tell)
        os.close(finish)
        _await(ready, processes)
        sample = place.timed(processes * share, race)
    for fd in (ready, waiting, done):
        os.close(fd)
    return sample


def _await(pipe: int, processes: int) -> None:
    """A byte of each, or the end of all: then one of them failed."""
    left = processes
    while left > 0 and (got := os.read(pipe, left)):
        left -= len(got)
