"""Fixtures of every level, and the check that a whole run leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from harness.engine_process import TRANSPORTS, EngineProcess, everything_below
from harness.leaks import nothing_left
from harness.session import Session
from harness.waiting import wait_until

# The same examples in every run; how long one takes is the machine's business, pytest-timeout ends what hangs.
hypothesis.settings.register_profile("qtfs", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("qtfs")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the very end no mount, process or descriptor of ours is left."""
    with nothing_left(str(tmp_path_factory.getbasetemp())):
        yield


@pytest.fixture(scope="session", params=TRANSPORTS)
def common_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine of each transport for all tests that do not need one of their own; everything is allowed."""
    area = tmp_path_factory.mktemp(f"engine-{request.param}")
    rules = everything_below(tmp_path_factory.getbasetemp())
    with EngineProcess(area, request.param, rules=rules).running() as engine:
        yield engine


@pytest.fixture
def engine(common_engine: EngineProcess) -> Iterator[EngineProcess]:
    """That engine, idle before and after the test, with as many descriptors as before and no complaint in its log."""
    wait_until(common_engine.is_idle, "the engine to be idle")
    before = common_engine.descriptors()
    yield common_engine
    wait_until(common_engine.is_idle, f"the engine to let everything go; it has {common_engine.figures()}")
    # Not "as many": it may have been reading the mount table when they were counted.
    wait_until(lambda: common_engine.descriptors() <= before, "the engine to close the test's descriptors")
    common_engine.check_log()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A directory of the server for this test alone."""
    path = tmp_path / "share"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def session(engine: EngineProcess, share: Path) -> Iterator[Session]:
    """A session on `share`, detached at the end."""
    with Session(engine.address, share) as opened:
        yield opened
