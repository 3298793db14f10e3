"""Single calls, one after the other, as a program that does nothing else would make them."""

from __future__ import annotations

import os
import random

from places import MIB, PAGE, Place, Sample

DATA_BYTES = 64 * MIB
MANY = 1000


def prepare(place: Place) -> None:
    """The files that are used, written on the server's side."""
    block = os.urandom(MIB)
    with open(f"{place.backing}/data", "wb") as file:
        for _ in range(DATA_BYTES // MIB):
            file.write(block)
    with open(f"{place.backing}/small", "wb") as file:
        file.write(block[:PAGE])
    os.mkdir(f"{place.backing}/many")
    for number in range(MANY):
        os.mknod(f"{place.backing}/many/file{number}", 0o644)


def stat(place: Place, count: int) -> Sample:
    name = place.path("small")
    return place.each(count, lambda: os.stat(name))


def stat_again(place: Place, count: int) -> Sample:
    """Of a name that was looked up just now."""
    name = place.path("small")
    os.stat(name)
    return place.each(count, lambda: os.stat(name))


def open_close(place: Place, count: int) -> Sample:
    name = place.path("small")
    return place.each(count, lambda: os.close(os.open(name, os.O_RDONLY)))


def open_read_close(place: Place, count: int) -> Sample:
    name = place.path("small")

    def once() -> None:
        fd = os.open(name, os.O_RDONLY)
        os.read(fd, PAGE)
        os.close(fd)

    return place.each(count, once)


def create_write_unlink(place: Place, count: int, name: str = "created") -> Sample:
    path, page = place.path(name), bytes(PAGE)

    def once() -> None:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, page)
        os.close(fd)
        os.unlink(path)

    return place.each(count, once)


def mkdir_rmdir(place: Place, count: int) -> Sample:
    name = place.path("directory")

    def once() -> None:
        os.mkdir(name)
        os.rmdir(name)

    return place.each(count, once)


def list_and_stat(place: Place, count: int) -> Sample:
    """As `ls -l` does; the whole directory is one operation."""
    name = place.path("many")

    def once() -> None:
        with os.scandir(name) as entries:
            found = sum(1 for entry in entries if entry.stat(follow_symlinks=False))
        assert found == MANY, f"{found} entries of {MANY}"

    return place.each(count, once)


def random_read(place: Place, count: int) -> Sample:
    fd = os.open(place.path("data"), os.O_RDONLY)
    try:
        place.forget_pages(fd)
        chance = random.Random(count)
        offsets = iter([chance.randrange(DATA_BYTES // PAGE) * PAGE for _ in range(count)])
        return place.each(count, lambda: os.pread(fd, PAGE, next(offsets)))
    finally:
        os.close(fd)


def write(place: Place, count: int) -> Sample:
    """Into a file of 1 MiB, without fsync."""
    fd = os.open(place.path("written"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        chance, page = random.Random(count), os.urandom(PAGE)
        offsets = iter([chance.randrange(MIB // PAGE) * PAGE for _ in range(count)])
        return place.each(count, lambda: os.pwrite(fd, page, next(offsets)))
    finally:
        os.close(fd)
