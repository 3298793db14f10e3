#!/usr/bin/env python3
"""Times qtfs beside libfuse's passthrough_ll, sshfs and the bare directory, on this machine and through loopback.

One run measures all of them in turn, round by round, so that what disturbs the machine disturbs all alike: only ratios
within one run mean anything. Every figure is the median of the rounds. All samples go to build/bench/*.json; the chart
of a whole run goes to doc/figures/speed.svg, of any other beside its samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import calls
import peers as p
import programs
from daemons import Unavailable, complaints, mount_points
from engine import CHECKOUT
from figure import write_figure
from measuring import measure
from memory import FILES_EACH, measure_memory, print_looks
from operations import OPERATIONS
from report import describe_machine, print_report, write_json
from rich.console import Console
from targets import judge

_ROUNDS = 5
_QUICK_ROUNDS = 1
_QUICK_DIVISOR = 4
_MEMORY_NODES = 1_000_000
_QUICK_NODES = 40_000
_FIGURE = CHECKOUT / "doc/figures/speed.svg"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, metavar="N",
                        help=f"how often everything is measured ({_ROUNDS}; quick: {_QUICK_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="less of everything: within two minutes")
    parser.add_argument("--only", metavar="TEXT", action="append", help="only operations whose name contains this")
    parser.add_argument("--peers", metavar="NAME", nargs="+", choices=p.NAMES, default=list(p.NAMES),
                        help="only these: " + ", ".join(p.NAMES))
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the data goes (default: a temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/bench/DATE-TIME.json")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="the chart (SVG)")
    parser.add_argument("--memory", action="store_true",
                        help=f"instead: the engine's memory after {_MEMORY_NODES:,} nodes")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target of issue 4 is missed")
    return parser.parse_args()


def _time_everything(args: argparse.Namespace, area: Path, console: Console) -> bool:
    """Whether all targets are met."""
    machine = describe_machine(area)
    rounds = args.rounds or (_QUICK_ROUNDS if args.quick else _ROUNDS)
    operations = [op for op in OPERATIONS if not args.only or any(text in op.name for text in args.only)]
    with p.mounted(args.peers, area) as (places, notes):
        for place in places.values():
            calls.prepare(place)
            programs.prepare(place)
        # What was written just now must not be on its way to the disk while others are measured.
        os.sync()
        results = measure(places, operations, rounds, _QUICK_DIVISOR if args.quick else 1)
        notes += complaints(area)
    console.print(str(machine), *notes, sep="\n", markup=False)
    verdicts = judge(results, [op.name for op in operations], args.peers)
    print_report(console, results, verdicts)
    samples = args.json or _default_path()
    write_json(samples, machine, results, rounds, notes)
    figure = args.figure or (_FIGURE if _is_whole(args) else samples.with_suffix(".svg"))
    write_figure(figure, results, str(machine))
    console.print(f"every sample: {samples}\nthe chart: {figure}", markup=False)
    return all(verdict.is_met for verdict in verdicts)


def _default_path() -> Path:
    return CHECKOUT / time.strftime("build/bench/%Y%m%d-%H%M%S.json")


def _is_whole(args: argparse.Namespace) -> bool:
    return not (args.quick or args.only or args.rounds) and set(args.peers) == set(p.NAMES)


def _watch_memory(args: argparse.Namespace, area: Path, console: Console) -> bool:
    """Whether its targets are met."""
    console.print(str(describe_machine(area)), markup=False)
    looks = measure_memory(area, (_QUICK_NODES if args.quick else _MEMORY_NODES) // FILES_EACH)
    met = print_looks(console, looks)
    samples = args.json or _default_path()
    samples.parent.mkdir(parents=True, exist_ok=True)
    samples.write_text(json.dumps([asdict(look) for look in looks], indent=1))
    console.print(f"the figures: {samples}", markup=False)
    return met


def _remove(area: Path, console: Console) -> None:
    """Not through a mount that would not go: /proc may be behind it."""
    left = [str(point) for point in mount_points() if area in point.parents]
    if left:
        console.print(f"still mounted, {area} stays:", *left, markup=False)
    else:
        shutil.rmtree(area, ignore_errors=True)


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    args = _arguments()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    # Whatever ends us, mounts and processes go first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    area = Path(tempfile.mkdtemp(prefix="qtfs-bench.", dir=args.dir))
    try:
        met = _watch_memory(args, area, console) if args.memory else _time_everything(args, area, console)
    except Unavailable as reason:
        console.print(f"[red]nothing measured:[/] {reason}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        _remove(area, console)
    return 1 if args.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
