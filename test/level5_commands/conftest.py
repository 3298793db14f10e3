"""Fixtures for commands: one engine for the tests that only need somebody to answer, and places to mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import daemons
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import end_processes, unmount_below
from harness.waiting import wait_until


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("commands are tested as root")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine on a Unix socket that allows everything below its share."""
    area = tmp_path_factory.mktemp("served")
    (area / "share").mkdir()
    with EngineProcess(area, rules=everything_below(area / "share")).running() as engine:
        yield engine


@pytest.fixture
def server(served: EngineProcess) -> str:
    """The option that names that engine."""
    return f"server={served.address}"


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A mount point; nothing is mounted there afterwards, and nobody serves it."""
    path = tmp_path / f"point-{os.urandom(4).hex()}"
    path.mkdir()
    yield path
    unmount_below(str(path))
    try:
        wait_until(lambda: not daemons(path), f"the daemon of {path} to end")
    finally:
        end_processes(daemons(path))
