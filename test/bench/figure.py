"""The chart: how fast each peer is beside passthrough_ll, a row of dots for each operation, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import peers as p
from measuring import Results

_LEFT, _RIGHT, _TOP, _BOTTOM = 260, 30, 96, 58
_WIDTH, _ROW = 1000, 20
_RADIUS = 4.6
_TITLE = "Speed beside passthrough_ll of libfuse: further right is faster, hollow is without caches"
#: Colours of Okabe and Ito, which the colour-blind can tell apart; the last figure says whether it caches.
_LOOKS = {
    p.uncached("shm"): ("#d55e00", False),
    p.default("shm"): ("#d55e00", True),
    p.uncached("unix"): ("#0072b2", False),
    p.default("unix"): ("#0072b2", True),
    p.uncached("tcp"): ("#009e73", False),
    p.default("tcp"): ("#009e73", True),
    p.LLFUSE: ("#cc79a7", True),
    p.SSHFS_UNCACHED: ("#e69f00", False),
    p.SSHFS: ("#e69f00", True),
    p.NOTHING: ("#999999", False),
    p.BARE: ("#999999", True),
}
_STYLE = """text { font: 12px system-ui, sans-serif; fill: #222 } .title { font-size: 16px; font-weight: 600 }
.small { font-size: 10.5px; fill: #666 } .grid { stroke: #e4e4e4 } .row { stroke: #f1f1f1 } .one { stroke: #444 }
.right { text-anchor: end } .middle { text-anchor: middle }"""


def write_figure(path: Path, results: Results, machine: str) -> None:
    """Nothing if there is nothing to compare with."""
    rows = {op.name: _speeds(results, op.name, op.is_time) for op in results.operations}
    rows = {name: speeds for name, speeds in rows.items() if speeds}
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(_draw(rows, machine)) + "\n")


def _speeds(results: Results, operation: str, is_time: bool) -> dict[str, float]:
    """How many times as fast as passthrough_ll each peer is."""
    base = results.figure(operation, p.PASSTHROUGH)
    figures = {name: results.figure(operation, name) for name in _LOOKS if base}
    return {name: base / figure if is_time else figure / base for name, figure in figures.items() if base and figure}


def _draw(rows: dict[str, dict[str, float]], machine: str) -> Iterator[str]:
    logs = [math.log2(speed) for speeds in rows.values() for speed in speeds.values()]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    bottom = _TOP + _ROW * len(rows)
    height = bottom + _BOTTOM

    def place(log: float) -> float:
        return _LEFT + (log - low) / max(1, high - low) * (_WIDTH - _LEFT - _RIGHT)

    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
    yield f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    yield f'<text class="title" x="20" y="28">{_TITLE}</text>'
    yield from _legend([name for name in _LOOKS if any(name in speeds for speeds in rows.values())])
    for log in range(low, high + 1):
        kind = "one" if log == 0 else "grid"
        yield f'<line class="{kind}" x1="{place(log):.1f}" x2="{place(log):.1f}" y1="{_TOP - 6}" y2="{bottom}"/>'
        yield f'<text class="small middle" x="{place(log):.1f}" y="{bottom + 16}">{_label(log)}</text>'
    for number, (name, speeds) in enumerate(rows.items()):
        yield from _row(name, [(peer, place(math.log2(speed))) for peer, speed in speeds.items()], number)
    yield f'<text class="small" x="20" y="{height - 12}">{escape(machine)}</text></svg>'


def _label(log: int) -> str:
    return str(2**log) if log >= 0 else f"1/{2**-log}"


def _row(name: str, dots: Sequence[tuple[str, float]], number: int) -> Iterator[str]:
    y = _TOP + _ROW * number + _ROW / 2
    yield f'<line class="row" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
    yield f'<text class="right" x="{_LEFT - 14}" y="{y + 4}">{escape(name)}</text>'
    for peer, x in reversed(dots):
        yield _dot(peer, x, y)


def _dot(peer: str, x: float, y: float) -> str:
    """Filled if it caches."""
    color, caches = _LOOKS[peer]
    fill = color if caches else "#fff"
    return (
        f'<circle cx="{x:.1f}" cy="{y}" r="{_RADIUS}" fill="{fill}" stroke="{color}" stroke-width="2">'
        f"<title>{escape(peer)}</title></circle>"
    )


def _legend(names: Sequence[str]) -> Iterator[str]:
    each = (_WIDTH - 40) / 6
    for number, name in enumerate(names):
        x, y = 26 + each * (number // 2), 50 + 20 * (number % 2)
        yield _dot(name, x, y)
        yield f'<text x="{x + 10:.1f}" y="{y + 4}">{escape(name)}</text>'
