#!/usr/bin/env python3
"""Times qtfs beside sshfs, libfuse's passthrough_ll and the bare directory, on this machine and through loopback.

One run measures all of them in turn, round by round, so that what disturbs the machine disturbs all alike: only ratios
within one run mean anything. Every figure is the median of the rounds; all samples go to build/bench/*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import peers as p
from operations import OPERATIONS, Operation, Place, prepare
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Samples = dict[str, dict[str, list[float | None]]]  # operation, peer; None: it cannot do that
Medians = dict[str, dict[str, float]]  # without those who cannot

#: Issue 2, "Speed at this stage": of sshfs uncached, for qtfs without caches.
JUDGED = (p.QTFS_UNIX, p.QTFS_TCP)
_MOST_LATENCY = 0.6
_MOST_WRITE = 1.5  # sshfs answers before the server has the data
_LEAST_THROUGHPUT = 2.0


# ------------------------------------------------------------------------------------------------------------- measure


def measure(places: dict[str, Place], operations: Sequence[Operation], rounds: int, divisor: int) -> Samples:
    samples: Samples = {op.name: {name: [] for name in places} for op in operations}
    names = list(places)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=rounds * len(operations) * len(names))
        for number in range(rounds):
            turn = number % len(names)
            for op in operations:
                # Another first one in every round: nobody always follows the slowest.
                for name in names[turn:] + names[:turn]:
                    progress.update(task, description=f"{op.name}, {name}", advance=1)
                    samples[op.name][name].append(op.measure(places[name], max(1, op.count // divisor)))
    return samples


def medians(samples: Samples) -> Medians:
    known = {op: {name: [v for v in vs if v is not None] for name, vs in by.items()} for op, by in samples.items()}
    return {op: {name: statistics.median(vs) for name, vs in by.items() if vs} for op, by in known.items()}


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    cores: int
    processor: str
    kernel: str
    file_system: str
    build: str
    load: float

    def __str__(self) -> str:
        return (f"{self.cores} cores ({self.processor}), Linux {self.kernel}, data on {self.file_system}, "
                f"{self.build} build, load average before the run {self.load:.1f}")


def describe_machine(area: Path) -> Machine:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "")
    kind = subprocess.run(["stat", "-f", "-c", "%T", area], check=False, capture_output=True, text=True).stdout.strip()
    debug = (p.CHECKOUT / "build/built-debug").exists()
    return Machine(len(os.sched_getaffinity(0)), model or platform.machine(), platform.release(), kind,
                   "DEBUG" if debug else "release", os.getloadavg()[0])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def figures_table(result: Medians, names: Sequence[str]) -> Table:
    table = Table(title="medians: µs per operation (less is better), MB/s and operations/s (more is better)")
    table.add_column("operation")
    table.add_column("unit")
    for name in names:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for op in OPERATIONS:
        if op.name in result:
            table.add_row(op.name, op.unit, *(_number(result[op.name].get(name)) for name in names))
    return table


def ratios_table(result: Medians, names: Sequence[str], reference: str) -> Table:
    """Each peer's figure over that of the reference."""
    others = [name for name in names if name.startswith("qtfs")]
    table = Table(title=f"ratios to {reference} (of µs: less is better; of a rate: more is better)")
    table.add_column("operation")
    for name in others:
        table.add_column(name, justify="right")
    for op in OPERATIONS:
        if op.name in result:
            by = result[op.name]
            table.add_row(op.name, *(_verdict(op, name, by, reference) for name in others))
    return table


def _limit(op: Operation) -> float:
    """At most that for latencies, at least that for rates."""
    if op.is_latency:
        return _MOST_WRITE if op.name.startswith("write") else _MOST_LATENCY
    return _LEAST_THROUGHPUT if op.unit == "MB/s" else 0


def _meets(op: Operation, ratio: float) -> bool:
    return ratio <= _limit(op) if op.is_latency else ratio >= _limit(op)


def _verdict(op: Operation, name: str, by: dict[str, float], reference: str) -> str:
    if name not in by or reference not in by:
        return "-"
    ratio = by[name] / by[reference]
    text = f"{ratio:.2f}"
    if name not in JUDGED or reference != p.SSHFS_UNCACHED or not op.has_target:
        return text
    return f"[green]{text}[/]" if _meets(op, ratio) else f"[red]{text}, not {_limit(op):.2g}[/]"


def misses(result: Medians) -> Iterator[str]:
    """What is not as fast as it has to be, beside sshfs."""
    for op in filter(lambda op: op.has_target, OPERATIONS):
        by = result.get(op.name, {})
        for name in JUDGED:
            if name in by and p.SSHFS_UNCACHED in by and not _meets(op, by[name] / by[p.SSHFS_UNCACHED]):
                yield f"{op.name}, {name}: {by[name] / by[p.SSHFS_UNCACHED]:.2f} of sshfs, not {_limit(op):.2g}"


def report(console: Console, result: Medians, names: Sequence[str]) -> list[str]:
    """Print it all; what was missed."""
    console.print(figures_table(result, names))
    for reference in (p.SSHFS_UNCACHED, p.PASSTHROUGH):
        if reference in names:
            console.print(ratios_table(result, names, reference))
    missed = list(misses(result))
    if p.SSHFS_UNCACHED in names:
        console.print(*(f"[red]too slow:[/] {miss}" for miss in missed), sep="\n")
        console.print(f"targets: {len(missed)} missed" if missed else "[green]targets: all met[/]")
    return missed


def write_json(path: Path, machine: Machine, samples: Samples, rounds: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    units = {op.name: op.unit for op in OPERATIONS if op.name in samples}
    content = {"machine": vars(machine), "rounds": rounds, "units": units, "samples": samples}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------------------- main


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, metavar="N", help="how often everything is measured (7; quick: 3)")
    parser.add_argument("--quick", action="store_true", help="less of everything: within a minute")
    parser.add_argument("--only", metavar="TEXT", action="append", help="only operations whose name contains this")
    parser.add_argument("--peers", metavar="NAME", nargs="+", help="only these: " + ", ".join(_peer_names()))
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the data goes (default: a temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/bench/DATE-TIME.json")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target of issue 2 is missed")
    args = parser.parse_args()
    unknown = set(args.peers or ()) - set(_peer_names())
    if unknown:
        parser.error(f"unknown peer: {', '.join(unknown)}")
    return args


def _peer_names() -> list[str]:
    return [peer.name for peer in p.all_peers(Path("/"))]


def _run(args: argparse.Namespace, area: Path, console: Console) -> int:
    machine = describe_machine(area)
    rounds = args.rounds or (3 if args.quick else 7)
    operations = [op for op in OPERATIONS if not args.only or any(text in op.name for text in args.only)]
    wanted = [peer for peer in p.all_peers(area) if not args.peers or peer.name in args.peers]
    with p.mounted(wanted, area) as (places, notes):
        for place in places.values():
            prepare(place)
        samples = measure(places, operations, rounds, 4 if args.quick else 1)
    console.print(str(machine), *notes, sep="\n")
    missed = report(console, medians(samples), list(places))
    path = args.json or p.CHECKOUT / time.strftime("build/bench/%Y%m%d-%H%M%S.json")
    write_json(path, machine, samples, rounds)
    console.print(f"every sample: {path}")
    return 1 if missed and args.check else 0


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    args = _arguments()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    # Whatever ends us, mounts and processes go first.
    signal.signal(signal.SIGTERM, _interrupted)
    area = Path(tempfile.mkdtemp(prefix="qtfs-bench.", dir=args.dir))
    try:
        return _run(args, area, console)
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(area, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
