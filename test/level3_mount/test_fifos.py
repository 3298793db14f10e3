"""FIFOs, devices and pseudo files of the server, used through mounts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import scenarios_streams
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import in_child

pytestmark = pytest.mark.root

KINDS = [("unix", "auto"), ("unix", "none"), ("tcp", "none"), ("shm", "auto")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def mounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A directory as the server, a client and another client see it; nothing of it is left in the engine."""
    transport, cache = request.param
    area = tmp_path_factory.mktemp(f"streams-{transport}-{cache}")
    engine = EngineProcess(area / "engine", transport, workers=8)
    options = f"driver=fuse3,cache={cache}"
    with engine.running(), ExitStack() as stack:
        found = {"here": engine.share}
        for name in ("there", "second"):
            mount = MountProcess(engine, engine.share, area / name, options)
            found[name] = stack.enter_context(mount.running()).point
        yield found
        stack.close()
        wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


SIDES = [("there", "here"), ("here", "there"), ("there", "there"), ("second", "there")]


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("scenario", scenarios_streams.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_as_local_fifos(
    mounts: dict[str, Path],
    sides: tuple[str, str],
    scenario: Callable[[str, str], Any],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    name = re.sub(r"\W+", "_", request.node.name)[:100]
    (mounts["here"] / name).mkdir()
    a, b = (str(mounts[side] / name) for side in sides)
    expected = in_child(lambda: scenario(str(tmp_path), str(tmp_path)))
    found = in_child(lambda: scenario(a, b))
    assert found == expected
