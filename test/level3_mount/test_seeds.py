"""Seeds: processes work by a model while connections break and daemons die; nothing is lost, doubled or stuck.

What is done is in test/soak; `make soak` plays more of the same, and repeats one seed. Seeds are few where each costs a
process that has to start again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, TRANSPORTS
from soak.killing import BOTH, CLIENT, ENGINE, STOPS
from soak.stage import GRACE_S, SHORT_GRACE_S, Stage
from soak.sweep import sweep

pytestmark = pytest.mark.root

#: Seeds of faults for each transport, and calls of each of three actors in one.
FAULTS, CALLS = 80, 20
DEATHS = {ENGINE: 4, CLIENT: 4, BOTH: 2, STOPS: 5}


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    transport, grace_s = request.param
    with Stage(tmp_path, transport, grace_s=grace_s).set_up() as made:
        yield made


def on(*transports: str, grace_s: int = GRACE_S) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", [(t, grace_s) for t in transports], indirect=True, ids=transports)


@on(*TRANSPORTS)
def test_connections_that_are_cut_garbled_and_delivered_late(stage: Stage) -> None:
    _play_faults(stage, "cut", "half-close", "delay", "stale", "garble")


@on("shm")
def test_channels_that_are_taken_away_and_garbled(stage: Stage) -> None:
    _play_faults(stage, "cut", "garble")


def _play_faults(stage: Stage, *struck: str) -> None:
    for seed in range(FAULTS):
        stage.play_faults(seed, CALLS)
    assert set(stage.faults) == set(struck)
    assert stage.faults.total() > 10 * FAULTS
    assert stage.company.calls.total() == 3 * FAULTS * CALLS


@on("unix")
def test_every_message_cut_at_every_byte(stage: Stage) -> None:
    assert sweep(stage) > 4000


def _play_deaths(stage: Stage, whom: str, *struck: str) -> None:
    for seed in range(DEATHS[whom]):
        stage.play_deaths(seed, whom)
    assert set(stage.faults) == set(struck), "nobody died"


@on(*ALL_TRANSPORTS)
def test_an_engine_that_is_killed_and_started_again(stage: Stage) -> None:
    _play_deaths(stage, ENGINE, "engine killed")


@on(*ALL_TRANSPORTS, grace_s=SHORT_GRACE_S)
def test_a_daemon_that_is_killed_and_mounts_again(stage: Stage) -> None:
    _play_deaths(stage, CLIENT, "client killed")


@on(*ALL_TRANSPORTS, grace_s=SHORT_GRACE_S)
def test_both_are_killed_at_once(stage: Stage) -> None:
    _play_deaths(stage, BOTH, "engine killed", "client killed")


@on(*ALL_TRANSPORTS)
def test_either_side_is_stopped_and_goes_on(stage: Stage) -> None:
    _play_deaths(stage, STOPS, "engine stopped", "client stopped")
