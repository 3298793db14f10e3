"""The run itself: everything in turn, round by round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import itertools
import sqlite3
import statistics
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from operations import Operation
from places import Place, Sample
from rich.console import Console
from rich.progress import Progress

#: For one measurement, most of which take less than a second.
_TIMEOUT_S = 60.0
_FAILURES = (OSError, AssertionError, subprocess.SubprocessError, sqlite3.Error)


@dataclass
class Results:
    """All samples of a run, by operation and peer; and what failed. None: the peer cannot do it."""

    operations: Sequence[Operation]
    peers: Sequence[str]
    samples: dict[str, dict[str, list[Sample | None]]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.samples = {op.name: {peer: [] for peer in self.peers} for op in self.operations}

    def figure(self, operation: str, peer: str) -> float | None:
        """The median, in the operation's unit."""
        op = next((op for op in self.operations if op.name == operation), None)
        return self._median(operation, peer, op.figure) if op else None

    def client_cpu_us(self, operation: str, peer: str) -> float | None:
        """Per operation or MiB: the median."""
        return self._median(operation, peer, lambda sample: sample.client_cpu_s / sample.amount * 1e6)

    def server_cpu_us(self, operation: str, peer: str) -> float | None:
        return self._median(operation, peer, lambda sample: sample.server_cpu_s / sample.amount * 1e6)

    def _median(self, operation: str, peer: str, of: Callable[[Sample], float]) -> float | None:
        values = [of(sample) for sample in self.samples.get(operation, {}).get(peer, ()) if sample]
        return statistics.median(values) if values else None


def measure(places: dict[str, Place], operations: Sequence[Operation], rounds: int, divisor: int) -> Results:
    """Each operation once per round and peer, each time a `divisor`-th of it."""
    names = list(places)
    results = Results(operations, names)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=rounds * len(operations) * len(names))
        for number in range(rounds):
            turn = number % len(names)
            for _, together in itertools.groupby(operations, lambda op: op.turn or op.name):
                # Another first one in every round: nobody always follows the slowest.
                for name, op in itertools.product(names[turn:] + names[:turn], tuple(together)):
                    progress.update(task, description=f"{op.name}, {name}", advance=1)
                    _measure_once(results, op, name, places[name], max(1, op.count // divisor))
    return results


def _measure_once(results: Results, op: Operation, name: str, place: Place, count: int) -> None:
    """What fails once is not tried again: it may take its time to fail."""
    if (op.name, name) in results.failures:
        return
    if op.needs_files and not place.keeps:
        results.samples[op.name][name].append(None)
        return
    if not place.is_served:
        results.failures[op.name, name] = "a process behind it has ended"
        return
    # Who waits for an answer of FUSE that never comes cannot even be killed, but its daemon can.
    watchdog = threading.Timer(_TIMEOUT_S, place.end_clients)
    watchdog.start()
    try:
        results.samples[op.name][name].append(op.measure(place, count))
    except _FAILURES as error:
        hung = f", ended after {_TIMEOUT_S:g} s" if watchdog.finished.is_set() else ""
        results.failures[op.name, name] = _reason(error) + hung
    finally:
        watchdog.cancel()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with {error.returncode}"
    return str(error) or type(error).__name__
