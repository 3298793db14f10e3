"""How fast qtfs has to be, beside the other peers of the same run, and whether it is (issue 4, "Speed")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import operations as o
import peers as p
from engine import TRANSPORTS
from measuring import Results

_TRANSFERS = (o.SEQUENTIAL_READ, o.SEQUENTIAL_WRITE)
_FOUR_KIB = (o.RANDOM_READ, o.WRITE)


@dataclass(frozen=True)
class _Bounds:
    """For a transport without caches: at most that for latencies, at least that for transfers."""

    passthrough: float
    passthrough_4k: float
    passthrough_transfer: float
    sshfs: float
    sshfs_write: float  # sshfs answers those before the server has the data
    sshfs_transfer: float


_SHM = _Bounds(0.6, 0.9, 0.9, 0.2, 0.5, 3)
_SOCKETS = _Bounds(1.0, 1.8, 0.6, 0.3, 1.0, 2.5)


@dataclass(frozen=True)
class Target:
    """The peer's figure of an operation, divided by another figure, has to be at most or at least `bound`."""

    operation: str
    peer: str
    other_operation: str
    other_peer: str
    at_most: bool
    bound: float

    def is_met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    @property
    def reference(self) -> str:
        return self.other_peer if self.other_peer != self.peer else self.other_operation


@dataclass(frozen=True)
class Verdict:
    """Both figures; None: not measured.

    `floor`, of latencies: what the bare directory takes, and a FUSE file system that does nothing. It has the caller's
    way into the kernel twice, a microsecond for each call, and no way to the server and back.
    """

    target: Target
    figure: float | None
    reference: float | None
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.figure / self.reference if self.figure is not None and self.reference else None

    @property
    def is_met(self) -> bool:
        """False if it was not measured."""
        return self.ratio is not None and self.target.is_met(self.ratio)

    @property
    def floor_ratio(self) -> float | None:
        return self.floor / self.reference if self.floor is not None and self.reference else None

    @property
    def is_out_of_reach(self) -> bool:
        """Whether no FUSE file system could have met it on this machine, even with the server's work done here."""
        return self.floor_ratio is not None and not self.is_met and not self.target.is_met(self.floor_ratio)


def _uncached(transport: str) -> Iterator[Target]:
    bounds = _SHM if transport == "shm" else _SOCKETS
    peer = p.uncached(transport)
    for op in o.LATENCIES:
        ours = bounds.passthrough_4k if op.name in _FOUR_KIB else bounds.passthrough
        yield Target(op.name, peer, op.name, p.PASSTHROUGH, True, ours)
        ours = bounds.sshfs_write if op.name == o.WRITE else bounds.sshfs
        yield Target(op.name, peer, op.name, p.SSHFS_UNCACHED, True, ours)
    for name in _TRANSFERS:
        yield Target(name, peer, name, p.PASSTHROUGH, False, bounds.passthrough_transfer)
        yield Target(name, peer, name, p.SSHFS_UNCACHED, False, bounds.sshfs_transfer)


def _cached(transport: str) -> Iterator[Target]:
    peer = p.default(transport)
    yield Target(o.LISTING, peer, o.LISTING, p.PASSTHROUGH, True, 0.2)
    yield Target(o.LISTING, peer, o.LISTING, p.SSHFS_UNCACHED, True, 0.05)
    yield Target(o.STAT_AGAIN, peer, o.STAT_AGAIN, p.BARE, True, 1.5)


def _parallel() -> Iterator[Target]:
    """Many clients get no less done than one."""
    for what in o.SHARED:
        for processes in o.CLIENTS[1:]:
            for peer in p.QTFS:
                yield Target(o.parallel(what, processes), peer, o.parallel(what, 1), peer, False, 1.0)


TARGETS = (
    *(target for transport in TRANSPORTS for target in _uncached(transport)),
    *(target for transport in TRANSPORTS for target in _cached(transport)),
    *_parallel(),
)


def judge(results: Results, operations: Sequence[str], peers: Sequence[str]) -> list[Verdict]:
    """Of all targets that are about nothing but the operations and peers which were asked for."""
    wanted = [
        target
        for target in TARGETS
        if {target.operation, target.other_operation} <= set(operations)
        and {target.peer, target.other_peer} <= set(peers)
    ]
    return [
        Verdict(
            target,
            results.figure(target.operation, target.peer),
            results.figure(target.other_operation, target.other_peer),
            _floor(results, target),
        )
        for target in wanted
    ]


def _floor(results: Results, target: Target) -> float | None:
    """Of an operation without caches; None for others, and without the peers that tell."""
    uncached = {p.uncached(transport) for transport in TRANSPORTS}
    if target.peer not in uncached or target.operation not in {op.name for op in o.LATENCIES}:
        return None
    nothing, bare = (results.figure(target.operation, peer) for peer in (p.NOTHING, p.BARE))
    return nothing + bare if nothing is not None and bare is not None else None
