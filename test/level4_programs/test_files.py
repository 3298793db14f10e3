"""Logs of many writers, files beyond 4 GiB, and what df and du say of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from programs import Shared, all_at_once, over, program

LINES = 300
HUGE = 5 << 30


def judge_log(path: Path, writers: int) -> None:
    """Each line once and whole, and those of one writer in its order."""
    lines = path.read_bytes().splitlines()
    assert len(lines) == writers * LINES
    for who in range(writers):
        wanted = [f"{who} {number} {'x' * (number * 37 % 3000)}".encode() for number in range(LINES)]
        assert [line for line in lines if line.startswith(b"%d " % who)] == wanted


@over("unix-auto", "unix-none", "tcp-auto")
def test_a_log_of_many_processes(shared: Shared) -> None:
    all_at_once(*(("append", shared.here / "log", who, LINES) for who in range(4)))
    judge_log(shared.here / "log", 4)
    judge_log(shared.there / "log", 4)


@over("unix-auto", "tcp-auto")
def test_a_log_of_two_clients_and_the_server(shared: Shared, again: Shared) -> None:
    places = [shared.here, again.here, shared.there, shared.here]
    all_at_once(*(("append", place / "log", who, LINES) for who, place in enumerate(places)))
    judge_log(shared.there / "log", 4)


@over("unix-auto", "unix-none")
def test_a_file_of_5_gib(shared: Shared) -> None:
    here, there = shared.here / "huge", shared.there / "huge"
    with here.open("wb") as file:
        file.write(b"begin")
        file.seek(HUGE - 3)
        file.write(b"end")
    for path in (here, there):
        status = path.stat()
        assert status.st_size == HUGE and status.st_blocks * 512 < 1 << 20
        with path.open("rb") as file:
            assert file.read(6) == b"begin\0"
            data = os.lseek(file.fileno(), 1 << 20, os.SEEK_DATA)
            assert HUGE - (1 << 20) < data < HUGE
            file.seek(HUGE - 4)
            assert file.read() == b"\0end"
    program("cp", "--sparse=always", here, shared.here / "copy")
    assert (shared.there / "copy").stat().st_blocks * 512 < 1 << 20
    program("truncate", "-s", str(HUGE + 7), shared.here / "copy")
    assert (shared.there / "copy").stat().st_size == HUGE + 7


@over("unix-auto", "unix-none", "tcp-auto")
def test_df_and_du(shared: Shared) -> None:
    for number in range(20):
        directory = shared.here / f"directory-{number % 3}/below"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file-{number}").write_bytes(b"x" * number * 1000)
    (shared.here / "linked").hardlink_to(shared.here / "directory-0/below/file-18")
    program("truncate", "-s", "1G", shared.here / "sparse")
    program("sync", "-f", shared.there)
    for options in (("-s",), ("-sb",), ("-a", "--time"), ("-sl",), ("--inodes", "-s")):
        assert program("du", *options, ".", cwd=shared.here) == program("du", *options, ".", cwd=shared.there)
    for column in ("size", "itotal"):
        here, there = (program("df", f"--output={column}", path) for path in (shared.here, shared.there))
        assert here == there
    # Others write to that disk: within a gigabyte.
    free = [int(program("df", "--output=avail", "-B1", p).split()[1]) for p in (shared.here, shared.there)]
    assert abs(free[0] - free[1]) < 1 << 30
    assert program("df", "--output=fstype,source", shared.here).split()[2:] == ["fuse.qtfs", str(shared.there)]


def test_a_file_that_is_unlinked_while_open(shared: Shared) -> None:
    path = shared.here / "gone"
    with path.open("w+b") as file:
        file.write(b"still here")
        file.flush()
        path.unlink()
        assert os.listdir(shared.there) == [] and os.fstat(file.fileno()).st_nlink == 0
        file.seek(0)
        assert file.read() == b"still here"
        file.truncate(5)
        assert os.fstat(file.fileno()).st_size == 5
    with pytest.raises(FileNotFoundError):
        path.stat()
