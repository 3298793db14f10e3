"""Long writes of programs on a mount, while connections are cut in the middle of the data."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from harness.fault_proxy import Cut, Fault, Message
from lines import connected

pytestmark = pytest.mark.root

CHUNK = 1 << 20


def cutting(draw: random.Random, one_in: int) -> Fault:
    """Cuts one WRITE in so many, somewhere in its data."""

    def fault(message: Message) -> Cut | None:
        if (message.where, message.operation) != ("request", "WRITE") or draw.randrange(one_in):
            return None
        return Cut(draw.randrange(message.length))

    return fault


def in_chunks(path: Path, data: bytes, flags: int) -> None:
    fd = os.open(path, flags | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        for at in range(0, len(data), CHUNK):
            assert os.write(fd, data[at : at + CHUNK]) == len(data[at : at + CHUNK])
    finally:
        os.close(fd)


@pytest.mark.parametrize("cache", ["none", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_written_is_there_after_many_cuts(cache: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(12 * CHUNK + 12_345)
    with connected(tmp_path, f"cache={cache}") as line:
        line.proxy.fault = cutting(draw, 4)
        in_chunks(line.there / "f", data, 0)
        assert (line.here / "f").read_bytes() == data
        assert (line.there / "f").read_bytes() == data


@pytest.mark.parametrize("seed", range(3))
def test_what_was_appended_is_there_once_after_many_cuts(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(8 * CHUNK + 777)
    with connected(tmp_path, "cache=none") as line:
        line.proxy.fault = cutting(draw, 4)
        in_chunks(line.there / "log", data, os.O_APPEND)
        assert (line.here / "log").read_bytes() == data


#: Writes blocks of one letter over each other, one after the other, and tells when each is done.
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY, 0o644)
for number in range(1000):
    os.pwrite(fd, bytes([65 + number % 26]) * 1048576, 0)
    print(number, flush=True)
"""


def killed_writer(path: Path, blocks: int) -> int:
    """The last block that was done when it was killed, in the middle of another one."""
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(blocks)]
        writer.kill()
        said += writer.stdout.readlines()
    return int(said[-1])


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_that_is_killed_leaves_whole_blocks_and_a_part(seed: int, tmp_path: Path) -> None:
    """As with a file of its own machine: a part of the last block over the one before. And nothing comes later."""
    draw = random.Random(seed)
    data = draw.randbytes(CHUNK)
    with connected(tmp_path, "cache=none") as line:
        line.proxy.fault = cutting(draw, 3)
        done = killed_writer(line.there / "f", draw.randrange(3, 12))
        found = (line.here / "f").read_bytes()
        newer, older = (bytes([65 + number % 26]) for number in (done + 1, done))
        assert len(found) == CHUNK
        assert found.lstrip(newer).strip(older) == b""
        in_chunks(line.there / "f", data, 0)
        assert (line.here / "f").read_bytes() == data
    assert (line.here / "f").read_bytes() == data
