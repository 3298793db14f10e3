"""Seeds: processes work by a model while connections break and daemons die; nothing is lost, doubled or stuck.

What is done is in test/soak; `make soak` plays more of the same, and repeats one seed. Seeds are few where each costs a
process that has to start again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.engine_process import ALL_TRANSPORTS, TRANSPORTS
from harness.waiting import wait_until
from soak.event_sweep import sweep_events
from soak.killing import BOTH, CLIENT, ENGINE, STOPS
from soak.stage import GRACE_S, SHORT_GRACE_S, Stage
from soak.sweep import sweep

pytestmark = pytest.mark.root

#: Seeds of faults for each transport, and calls of each of three actors in one.
FAULTS, CALLS = 80, 20
DEATHS = {ENGINE: 4, CLIENT: 4, BOTH: 2, STOPS: 5}
#: One byte of so many is drawn where not all are cut.
SOME = 3


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    transport, options = request.param
    with Stage(tmp_path, transport, **options).set_up() as made:
        yield made


def on(*transports: str, grace_s: int = GRACE_S, **options: Any) -> pytest.MarkDecorator:
    """Stages over these transports, with further options."""
    options["grace_s"] = grace_s
    return pytest.mark.parametrize("stage", [(t, options) for t in transports], indirect=True, ids=transports)


@on(*TRANSPORTS)
def test_connections_that_are_cut_garbled_and_delivered_late(stage: Stage) -> None:
    _play_faults(stage, "cut", "half-close", "delay", "stale", "garble")


@on("shm")
@pytest.mark.timeout(300)
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


@on("tcp")
def test_every_message_cut_at_some_bytes(stage: Stage) -> None:
    """`make soak` cuts at all of them."""
    assert sweep(stage, every=SOME) > 4000 / (SOME + 1)


@on(*TRANSPORTS, grace_s=SHORT_GRACE_S, has_key=True)
def test_every_message_of_a_handshake_cut_at_some_bytes(stage: Stage) -> None:
    """Of connections that come again, and of the sessions that follow one which the engine has forgotten."""
    assert sweep(stage, every=2 * SOME, only=("HELLO", "AUTHENTICATE", "ATTACH", "MOUNT")) > 50
    wait_until(lambda: len(stage.engine.figures()["sessions"]) == 1, "those that were left to end")


@on("unix", cache="always")
def test_every_message_of_the_event_channel_cut_at_every_byte(stage: Stage) -> None:
    """The names that the client knows are good for ever, unless it hears that they are not."""
    assert sweep_events(stage) > 500


@on("tcp", cache="always")
def test_every_message_of_the_event_channel_cut_at_some_bytes(stage: Stage) -> None:
    assert sweep_events(stage, every=2 * SOME) > 80


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
