"""What is measured: the table of all operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import calls
import programs
import server_files
import throughput
from places import MIB, Place, Sample

LISTING = f"list and stat {calls.MANY} files"
STAT_AGAIN = "stat of a cached name"
RANDOM_READ = "random read 4 KiB"
WRITE = "write 4 KiB"
SEQUENTIAL_READ = "sequential read"
SEQUENTIAL_WRITE = "sequential write"
#: Processes at once; what one of them does is what the others are compared with.
CLIENTS = (1, 4, 16)
_SIZES = ("4k", "64k", "1M")
_DEPTHS = (1, 16)
_FIO_MS = 200


@dataclass(frozen=True)
class Operation:
    """`unit` says what a figure is: µs or ms per operation (less is better), or something per second.

    `measure` gives None where the place cannot do it. `count`: how much of it makes one sample. `needs_files`: of
    a file system that keeps what it is given. What has the same `turn` is measured together before another peer's is.
    """

    name: str
    unit: str
    measure: Callable[[Place, int], Sample | None]
    count: int
    needs_files: bool = True
    turn: str = ""

    @property
    def is_time(self) -> bool:
        return self.unit in _PER_SECOND

    def figure(self, sample: Sample) -> float:
        if self.is_time:
            return sample.seconds / sample.amount * _PER_SECOND[self.unit]
        return sample.amount / sample.seconds * (MIB / 1e6 if self.unit == "MB/s" else 1)


_PER_SECOND = {"µs": 1e6, "ms": 1e3}


def parallel(what: str, processes: int) -> str:
    """The name of what some processes do at once."""
    return f"{what}, {processes} process{'es' if processes > 1 else ''}"


#: What one to sixteen processes do, and how often all of them together; a turn, as they are compared with one another.
SHARED = {
    "open + close": (throughput.open_close, 4800),
    "create + write + unlink": (throughput.create_write_unlink, 1280),
}


def _fio(mode: str, size: str, depth: int) -> Operation:
    what = "reads" if mode == "randread" else "writes"
    unit = "1/s" if size == "4k" else "MB/s"
    text = size.replace("k", " KiB").replace("M", " MiB")
    return Operation(f"fio {what}, {text}, depth {depth}", unit, programs.fio(mode, size, depth), _FIO_MS)


LATENCIES = (
    Operation("stat", "µs", calls.stat, 1000, needs_files=False),
    Operation("open + close", "µs", calls.open_close, 500, needs_files=False),
    Operation("open + read 4 KiB + close", "µs", calls.open_read_close, 500, needs_files=False),
    Operation("create + write 4 KiB + unlink", "µs", calls.create_write_unlink, 200, needs_files=False),
    Operation("mkdir + rmdir", "µs", calls.mkdir_rmdir, 200, needs_files=False),
    Operation(LISTING, "ms", calls.list_and_stat, 2, needs_files=False),
    Operation(RANDOM_READ, "µs", calls.random_read, 1000, needs_files=False),
    Operation(WRITE, "µs", calls.write, 500, needs_files=False),
)

OPERATIONS = (
    *LATENCIES,
    Operation(STAT_AGAIN, "µs", calls.stat_again, 1000),
    Operation(SEQUENTIAL_READ, "MB/s", throughput.sequential_read, calls.DATA_BYTES // MIB, needs_files=False),
    Operation(SEQUENTIAL_WRITE, "MB/s", throughput.sequential_write, calls.DATA_BYTES // MIB, needs_files=False),
    *(
        Operation(parallel(what, n), "1/s", work(n), all_, needs_files=False, turn=what)
        for what, (work, all_) in SHARED.items()
        for n in CLIENTS
    ),
    *(_fio(mode, size, depth) for mode in ("randread", "randwrite") for size in _SIZES for depth in _DEPTHS),
    Operation("git clone", "ms", programs.git_clone, 1),
    Operation("git status", "ms", programs.git_status, 1),
    Operation("untar", "ms", programs.untar, 1),
    Operation("find", "ms", programs.find, 1),
    Operation("rm -rf", "ms", programs.remove_tree, 1),
    Operation("sqlite commit", "ms", programs.sqlite_commits, 20),
    Operation("walk of /proc, per process", "µs", server_files.walk_proc, 2),
    Operation("FIFO round trip", "µs", server_files.fifo_round_trip, 500),
    Operation("lock hand-over", "µs", server_files.lock_hand_over, 500),
)
