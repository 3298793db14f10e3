"""The mounts that conformance is tested on, and the place each test gets on one of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.mounts import MountProcess
from harness.waiting import wait_until
from places import KINDS, Kind, Place

pytest.register_assert_rewrite("kit", "llfuse_limits")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    """An engine of each transport; when all mounts are gone, nothing may be left in it."""
    made = {name: EngineProcess(tmp_path_factory.mktemp(f"mounts-{name}"), name, workers=8) for name in ALL_TRANSPORTS}
    with contextlib.ExitStack() as stack:
        for engine in made.values():
            stack.enter_context(engine.running())
        yield made
        for engine in made.values():
            wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


@pytest.fixture(scope="session", params=KINDS, ids=str)
def mount(
    request: pytest.FixtureRequest, engines: dict[str, EngineProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Kind, MountProcess]]:
    """A mount of each kind, for all tests."""
    kind: Kind = request.param
    engine = engines[kind.transport]
    point = tmp_path_factory.mktemp(f"mount-{kind}") / "mnt"
    options = f"driver={kind.driver},cache={kind.cache}"
    with MountProcess(engine, engine.share, point, options).running() as mounted:
        yield kind, mounted


@pytest.fixture
def place(
    request: pytest.FixtureRequest, mount: tuple[Kind, MountProcess], tmp_path_factory: pytest.TempPathFactory
) -> Place:
    """Fresh, empty directories for one test."""
    kind, mounted = mount
    name = re.sub(r"\W+", "_", request.node.name)[:100]
    here = mounted.engine.share / name
    local = tmp_path_factory.mktemp("local", numbered=True) / name
    here.mkdir()
    local.mkdir()
    return Place(kind, mounted.engine, mounted.point / name, here, local)
