"""Messages through shared memory, against a whole engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.session import MAX_PAYLOAD, Session
from harness.wire import ROOT

#: What two messages of the longest kind take, and no more: messages wrap all the time.
TIGHT = "channels=3,request=144K,reply=144K"


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine with three of the smallest channels."""
    with EngineProcess(tmp_path / "tight", "shm", arguments=("--bar-layout", TIGHT)).running() as engine:
        yield engine


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone."""
    with EngineProcess(tmp_path / "engine", "shm").running() as engine:
        yield engine


# ---- messages of all sizes


def echo(session: Session, handle: int, sizes: list[int], data: bytes) -> None:
    """Write and read so many bytes again and again; what comes back is what went."""
    for number, size in enumerate(sizes):
        begin = number % 61
        sent = data[begin : begin + size]
        assert session.write(handle, 0, sent) == len(sent)
        assert session.read(handle, 0, size) == sent, f"message {number}, {size} bytes"


@pytest.mark.parametrize("seed", range(3))
def test_sizes_in_random_order(own: EngineProcess, seed: int) -> None:
    draw = random.Random(seed)
    limits = (200, 20_000, 70_000, MAX_PAYLOAD)
    sizes = [draw.choice((draw.randrange(draw.choice(limits) + 1), MAX_PAYLOAD)) for _ in range(400)]
    with Session(own.address, own.share) as session:
        echo(session, session.create(ROOT, b"f")[1].handle, sizes, draw.randbytes(MAX_PAYLOAD + 61))


def test_every_size_where_only_two_messages_fit(tight: EngineProcess) -> None:
    draw = random.Random(4)
    sizes = [*range(0, 300), *range(16_200, 16_500, 7), *range(65_200, 65_537, 5)] * 2
    draw.shuffle(sizes)
    with Session(tight.address, tight.share) as session:
        payload = session.ticket.max_payload
        assert payload == 65_536
        echo(session, session.create(ROOT, b"f")[1].handle, sizes, draw.randbytes(payload + 61))
