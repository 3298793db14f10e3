"""What a run found: tables for the terminal, all samples as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peers as p
from engine import CHECKOUT
from measuring import Results
from operations import Operation
from rich import box
from rich.console import Console
from rich.table import Table
from targets import Verdict


@dataclass(frozen=True)
class Machine:
    """Where the figures come from."""

    cores: int
    processor: str
    kernel: str
    directory: str
    file_system: str
    commit: str
    build: str
    load: float

    def __str__(self) -> str:
        return (
            f"{self.cores} cores ({self.processor}), Linux {self.kernel}, data on {self.file_system} "
            f"({self.directory}), commit {self.commit}, {self.build} build, load average before the run {self.load:.1f}"
        )


def describe_machine(area: Path) -> Machine:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "")
    debug = (CHECKOUT / "build/built-debug").exists()
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        processor=model or platform.machine(),
        kernel=platform.release(),
        directory=str(area.parent),
        file_system=_output("stat", "-f", "-c", "%T", str(area)),
        commit=_output("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty") or "unknown",
        build="DEBUG" if debug else "release",
        load=os.getloadavg()[0],
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


# -------------------------------------------------------------------------------------------------------------- tables


def print_report(console: Console, results: Results, verdicts: Sequence[Verdict]) -> None:
    console.print(_figures_table(results))
    for reference in (p.PASSTHROUGH, p.SSHFS_UNCACHED):
        if reference in results.peers:
            console.print(_ratios_table(results, reference))
    console.print(*_cpu_tables(results))
    for (op, peer), reason in results.failures.items():
        console.print(f"[red]failed:[/] {op}, {peer}: {reason}")
    if verdicts:
        console.print(_targets_table([verdict for verdict in verdicts if verdict.ratio is not None]))
        console.print(*_summary(verdicts), sep="\n")


def number(value: float | None) -> str:
    """With two or three digits that mean something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(
    title: str,
    peers: Sequence[str],
    results: Results,
    cell: Callable[[str, str], str],
    unit: Callable[[Operation], str] = lambda op: op.unit,
) -> Table:
    """A row for each operation, a column for each peer."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("operation", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for peer in peers:
        table.add_column(peer, justify="right", min_width=max(map(len, peer.split())))
    for op in results.operations:
        table.add_row(op.name, unit(op), *(cell(op.name, peer) for peer in peers))
    return table


def _figures_table(results: Results) -> Table:
    title = "medians: times per operation (less is better), MB/s and operations/s (more is better)"
    return _table(title, results.peers, results, lambda op, peer: number(results.figure(op, peer)))


def _ratios_table(results: Results, reference: str) -> Table:
    """Each peer's figure over that of the reference."""

    def cell(op: str, peer: str) -> str:
        ours, theirs = results.figure(op, peer), results.figure(op, reference)
        return f"{ours / theirs:.2f}" if ours is not None and theirs else "-"

    others = [peer for peer in results.peers if peer != reference]
    return _table(f"ratios to {reference} (of times: less is better; of rates: more is better)", others, results, cell)


def _cpu_tables(results: Results) -> Iterator[Table]:
    """One for each side; passthrough_ll and nothing are clients that have no server."""
    what = "processor time of the {}, per operation (per MiB where something is in MB/s)"
    sides = {
        "client's daemon": (results.client_cpu_us, (p.BARE,)),
        "server": (results.server_cpu_us, (p.BARE, p.PASSTHROUGH, p.NOTHING)),
    }
    for side, (cpu_us, without) in sides.items():
        peers = [peer for peer in results.peers if peer not in without]
        yield _table(what.format(side), peers, results, _cpu_cell(results, cpu_us), _cpu_unit)


def _cpu_unit(op: Operation) -> str:
    return "ms" if op.unit == "ms" else "µs"


def _cpu_cell(results: Results, cpu_us: Callable[[str, str], float | None]) -> Callable[[str, str], str]:
    in_ms = {op.name for op in results.operations if _cpu_unit(op) == "ms"}

    def cell(op: str, peer: str) -> str:
        value = cpu_us(op, peer)
        return number(value / 1e3 if value is not None and op in in_ms else value)

    return cell


def _targets_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="targets", box=box.SIMPLE_HEAD)
    for column in ("operation", "peer", "beside"):
        table.add_column(column, no_wrap=True)
    for column in ("figure", "its figure", "ratio", "wanted", "floor"):
        table.add_column(column, justify="right")
    table.add_column("")
    for verdict in verdicts:
        target = verdict.target
        wanted = f"{'≤' if target.at_most else '≥'} {target.bound:g}"
        missed = "[yellow]out of reach[/]" if verdict.is_out_of_reach else "[red]missed[/]"
        figures = (number(verdict.figure), number(verdict.reference), _ratio(verdict.ratio), wanted)
        said = "[green]met[/]" if verdict.is_met else missed
        table.add_row(target.operation, target.peer, target.reference, *figures, _ratio(verdict.floor_ratio), said)
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _summary(verdicts: Sequence[Verdict]) -> Iterator[str]:
    met = sum(verdict.is_met for verdict in verdicts)
    unknown = Counter(verdict.target.peer for verdict in verdicts if verdict.ratio is None)
    text = f"targets: {met} of {len(verdicts)} met, {len(verdicts) - met - unknown.total()} missed"
    yield f"[green]{text}[/]" if met == len(verdicts) else f"[red]{text}, {unknown.total()} not measured[/]"
    beyond = sum(verdict.is_out_of_reach for verdict in verdicts)
    if beyond:
        yield f"[yellow]{beyond} of those are out of reach here: nothing and the bare directory take longer together[/]"
    if unknown:
        yield f"[red]not measured:[/] {', '.join(f'{peer} ({count})' for peer, count in unknown.items())}"


# ---------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: Path, machine: Machine, results: Results, rounds: int, notes: Sequence[str]) -> None:
    """Samples as they are: seconds, amount, processor seconds of both sides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": asdict(machine),
        "rounds": rounds,
        "notes": list(notes),
        "units": {op.name: op.unit for op in results.operations},
        "medians": {
            op.name: {peer: results.figure(op.name, peer) for peer in results.peers} for op in results.operations
        },
        "samples": {
            op: {peer: [asdict(sample) if sample else None for sample in samples] for peer, samples in by_peer.items()}
            for op, by_peer in results.samples.items()
        },
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))
