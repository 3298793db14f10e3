"""Fixtures of every level, and the check that a whole run leaves nothing behind."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import hypothesis
import pytest
from harness.engine_process import TRANSPORTS, EngineProcess, everything_below
from harness.leaks import (
    RUN,
    SESSION_VARIABLE,
    alone_with_mounts,
    end_processes,
    left_since,
    nothing_left,
    our_processes,
    resources,
    thread_count,
)
from harness.session import Session
from harness.waiting import wait_until
from xdist.scheduler import LoadScopeScheduling

QUICK_ERRAND_THREADS = 2

#: What a second worker runs meanwhile: guests, builds and other programs, which share little with other tests, and what
#: mostly waits. The two should take about as long.
#: Two workers for everything would do it faster, but tests with a time limit are then seldom alone on two processors.
APART = (
    *("level2_server/test_leaks.py", "level2_server/test_stuck_exports.py", "level2_server/test_held_mounts.py"),
    *("level3_mount/test_stuck_mounts.py", "level3_mount/test_waiting_calls.py", "level3_mount/test_outages.py"),
    *("level3_mount/test_faults.py", "level3_mount/test_propagation.py", "level3_mount/test_engine_upgrade.py"),
    *("level3_mount/test_long_stops.py", "level3_mount/test_two_machines.py", "level3_mount/test_engine_deaths.py"),
    "level3_mount/test_descriptor_store.py",
    *("level4_programs/test_build.py", "level4_programs/test_directories.py", "level4_programs/test_stress.py"),
    *("level5_commands/test_installation.py", "level6_vm/"),
)

# A shell that runs us in the background has it ignored, and all that we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; how long one takes is the machine's business, pytest-timeout ends what hangs.
hypothesis.settings.register_profile("qtfs", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("qtfs")


class TwoParts(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return "apart" if any(part in nodeid for part in APART) else "everything else"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoParts | None:
    return TwoParts(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_configure(config: pytest.Config) -> None:
    """A mount namespace for each of xdist's workers: copies of mounts in the namespaces of others keep them alive."""
    if not hasattr(config, "workerinput"):
        os.environ[SESSION_VARIABLE] = RUN
    elif os.geteuid() == 0:
        alone_with_mounts()


def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker that was ended, as by a timeout, cleans nothing up. Its mounts end with its namespace."""
    if not hasattr(config, "workerinput"):
        end_processes(our_processes(SESSION_VARIABLE, RUN))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that have the machine to themselves come last: none has to wait for a guest of the other worker's."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names that are not UTF-8 are shown as escapes: xdist's channel takes no others."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def _nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the very end no mount, process or descriptor of ours is left."""
    with nothing_left(str(tmp_path_factory.getbasetemp())):
        yield


@pytest.fixture(scope="session")
def _turns(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Two files that all workers lock: the way in, and the machine."""
    area = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        area = area.parent
    with (area / "way-in").open("wb") as way_in, (area / "machine").open("wb") as machine:
        yield way_in, machine


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, _turns: tuple[BinaryIO, BinaryIO]) -> Iterator[None]:
    """Tests marked `alone` have the machine to themselves. Who waits for that keeps the way in: none overtakes it."""
    way_in, machine = _turns
    fcntl.flock(way_in, fcntl.LOCK_EX)
    fcntl.flock(machine, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
    fcntl.flock(way_in, fcntl.LOCK_UN)
    yield
    fcntl.flock(machine, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _nothing_left_by_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set up before a test's other fixtures and torn down behind them: nothing of the test is left (`left_since`)."""
    before = resources(str(tmp_path_factory.getbasetemp()))
    yield
    if left_since(before):
        gc.collect()  # an exception keeps what its traceback knows
    wait_until(lambda: not left_since(before), f"all of the test's to end: {left_since(before)}", 10)


@pytest.fixture(scope="session", params=TRANSPORTS)
def common_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine of each transport for all tests that do not need one of their own; everything is allowed."""
    area = tmp_path_factory.mktemp(f"engine-{request.param}")
    rules = everything_below(tmp_path_factory.getbasetemp())
    with EngineProcess(area, request.param, rules=rules).running() as engine:
        threads = thread_count(engine.pid)
        yield engine
        # Openers end when they have had nothing to do for five seconds; those for quick errands stay.
        most = threads + QUICK_ERRAND_THREADS
        wait_until(lambda: thread_count(engine.pid) <= most, "the engine's threads to be as many as at first", 15)


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
