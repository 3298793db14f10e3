"""Programs whose engine or whose mount's daemon is killed at moments by seed: nothing that was acknowledged is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS
from soak.killing import ENGINE
from soak.plays import CASES, play
from soak.stage import GRACE_S, SHORT_GRACE_S, Stage

SEED = 1


@pytest.fixture
def stage(request: pytest.FixtureRequest, area: Path) -> Iterator[Stage]:
    transport, whom = request.param
    grace_s = GRACE_S if whom == ENGINE else SHORT_GRACE_S
    with Stage(area, transport, actors=0, grace_s=grace_s).set_up() as made:
        yield made


#: Each case over one transport; `make soak` plays all.
_PLACES = [(ALL_TRANSPORTS[number % 3], whom) for number, (_, whom) in enumerate(CASES)]


@pytest.mark.parametrize(
    ("stage", "name"),
    [(place, name) for place, (name, _) in zip(_PLACES, CASES, strict=True)],
    indirect=["stage"],
    ids=[f"{name}-{whom}-{transport}" for (transport, _), (name, whom) in zip(_PLACES, CASES, strict=True)],
)
def test_a_program_and_its_fate(stage: Stage, name: str, request: pytest.FixtureRequest, origin: Path) -> None:
    whom = request.node.callspec.params["stage"][1]
    play(stage, name, SEED, whom, origin)
    assert stage.faults, "nobody died"
