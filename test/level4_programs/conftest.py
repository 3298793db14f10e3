"""A directory of an engine, mounted with the fuse3 driver: programs work on the mount and are judged on the server.

A test runs over a Unix socket with default options; `@over("unix-none", "tcp-auto")` of `programs` chooses otherwise.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import unmount_below
from level5_commands.commandline import run
from programs import Shared, mounted_here
from repositories import make_repository


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts with allow_other, owners and device nodes need root")


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the tests' files live: pytest's own directory, unless that one is in memory."""
    base = tmp_path_factory.getbasetemp()
    if run("stat", "-f", "-c", "%T", base).check().stdout.strip() not in ("tmpfs", "ramfs"):
        yield base
        return
    path = Path(tempfile.mkdtemp(prefix="qtfs-test-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def common_engine(request: pytest.FixtureRequest, disk: Path) -> Iterator[EngineProcess]:
    """As in test/conftest.py, but for the place, and on a Unix socket unless a test says otherwise."""
    transport = getattr(request, "param", "unix")
    area = Path(tempfile.mkdtemp(prefix=f"engine-{transport}-", dir=disk))
    with EngineProcess(area, transport, rules=everything_below(disk)).running() as engine:
        yield engine


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> str:
    """The option cache=; the default one unless a test says otherwise."""
    return getattr(request, "param", "auto")


@pytest.fixture
def area(disk: Path) -> Iterator[Path]:
    """An empty directory on a disk; what is in it at the end is removed, and mounts are lifted off it first."""
    path = Path(tempfile.mkdtemp(prefix="area-", dir=disk))
    path.chmod(0o755)
    yield path
    unmount_below(str(path))
    shutil.rmtree(path)


@pytest.fixture
def share(area: Path) -> Path:
    """A directory of the server for this test alone."""
    path = area / "share"
    path.mkdir()
    return path


@pytest.fixture
def shared(engine: EngineProcess, share: Path, area: Path, cache: str) -> Iterator[Shared]:
    """That directory, mounted."""
    with mounted_here(share, area, engine.address, cache) as shared:
        yield shared


@pytest.fixture
def again(engine: EngineProcess, shared: Shared, area: Path, cache: str) -> Iterator[Shared]:
    """The same directory, mounted a second time: another client."""
    with mounted_here(shared.there, area, engine.address, cache) as shared:
        yield shared


@pytest.fixture(scope="session")
def origin(disk: Path) -> Path:
    """A bare repository that is not on a mount."""
    return make_repository(Path(tempfile.mkdtemp(prefix="git-", dir=disk)))
