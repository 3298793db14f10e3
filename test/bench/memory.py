"""The engine's memory after a million nodes: how much, and how many descriptors, as the client walks through them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine import Engine
from places import MIB
from report import number
from rich.console import Console
from rich.progress import track
from rich.table import Table

FILES_EACH = 1000
_STOPS = 4  # looks at the engine on the way
_MOST_BYTES = 64 * MIB
#: Descriptors may differ by as many between two looks, and not grow with the nodes.
_FEW = 64


@dataclass(frozen=True)
class Look:
    """What the two processes hold, so many nodes later."""

    nodes: int
    engine_bytes: int
    engine_descriptors: int
    client_bytes: int


def measure_memory(area: Path, directories: int) -> list[Look]:
    """A walk through `directories` times FILES_EACH files, all of which the client's kernel remembers."""
    backing, top = area / "nodes", area / "nodes.mnt"
    _make_files(backing, directories)
    top.mkdir()
    with contextlib.ExitStack() as stack:
        daemons = Engine(area, "unix").mounter()(backing, top, stack)
        looks = [_look(0, daemons.servers[0], daemons.clients[0])]
        for visited in _walk(top, directories):
            if visited * _STOPS % directories < _STOPS:
                looks.append(_look(visited * FILES_EACH, daemons.servers[0], daemons.clients[0]))
    return looks


def _make_files(backing: Path, directories: int) -> None:
    backing.mkdir()
    for index in _shown(directories, "making files"):
        directory = backing / f"directory{index}"
        directory.mkdir()
        for file in range(FILES_EACH):
            os.mknod(f"{directory}/file{file}", 0o644)


def _shown(count: int, what: str) -> Iterable[int]:
    """As range(), with progress on a terminal."""
    console = Console(stderr=True)
    return track(range(count), what, console=console, transient=True, disable=not console.is_terminal)


def _walk(top: Path, directories: int) -> Iterator[int]:
    """How many directories were visited."""
    for index in _shown(directories, "visiting them"):
        with os.scandir(top / f"directory{index}") as entries:
            found = sum(1 for entry in entries if entry.stat(follow_symlinks=False))
        assert found == FILES_EACH, f"{found} entries of {FILES_EACH}"
        yield index + 1


def _look(nodes: int, engine: int, client: int) -> Look:
    return Look(nodes, _resident(engine), len(os.listdir(f"/proc/{engine}/fd")), _resident(client))


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_looks(console: Console, looks: list[Look]) -> bool:
    """The table; whether the targets of issue 4 are met."""
    table = Table(title="memory (resident) and descriptors as nodes are visited")
    for column in ("nodes", "engine, MiB", "engine's descriptors", "client's daemon, MiB"):
        table.add_column(column, justify="right")
    for look in looks:
        table.add_row(f"{look.nodes:,}", number(look.engine_bytes / MIB), f"{look.engine_descriptors:,}",
                      number(look.client_bytes / MIB))
    console.print(table)
    half, last = looks[len(looks) // 2], looks[-1]
    small = last.engine_bytes < _MOST_BYTES
    bounded = last.engine_descriptors <= half.engine_descriptors + _FEW
    _say(console, small, f"the engine has {number(last.engine_bytes / MIB)} MiB, wanted: under {_MOST_BYTES // MIB}")
    _say(console, bounded, f"its descriptors: {half.engine_descriptors:,} at half the nodes, "
                           f"{last.engine_descriptors:,} at the end, wanted: no more")
    return small and bounded


def _say(console: Console, is_met: bool, text: str) -> None:
    console.print(f"{'[green]met[/]' if is_met else '[red]missed[/]'}: {text}")
