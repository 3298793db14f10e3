"""How often the engine touches file data: doc/performance.md says it, and its counter of copied bytes shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.mounts import MountProcess

DATA = os.urandom(1 << 20) * 16
#: Of everything else in the messages.
OVERHEAD = 1 << 20


def copied(engine: EngineProcess) -> int:
    return int(engine.figures()["copied"])


def read_whole(path: Path) -> bytes:
    """In pieces of 1 MiB."""
    with path.open("rb", buffering=0) as file:
        return b"".join(iter(lambda: file.read(1 << 20), b""))


@pytest.mark.root
@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_file_data_passes_the_engine_uncopied(transport: str, tmp_path: Path) -> None:
    """Reads and writes of 1 MiB, over any transport, but for the beginnings of WRITEs that a socket brings."""
    with EngineProcess(tmp_path / "engine", transport).running() as engine:
        (engine.share / "file").write_bytes(DATA)
        with MountProcess(engine, engine.share, tmp_path / "mnt", "cache=none").running() as mounted:
            before = copied(engine)
            assert read_whole(mounted.point / "file") == DATA
            read = copied(engine) - before
            with (mounted.point / "written").open("wb", buffering=0) as file:
                for at in range(0, len(DATA), 1 << 20):
                    assert file.write(DATA[at : at + (1 << 20)]) == 1 << 20
            written = copied(engine) - before - read
        assert (engine.share / "written").read_bytes() == DATA
    assert read < OVERHEAD
    assert written < OVERHEAD


@pytest.mark.root
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_appended_data_passes_a_buffer_of_the_engine(transport: str, tmp_path: Path) -> None:
    """And is counted: the counter can tell."""
    with EngineProcess(tmp_path / "engine", transport).running() as engine:
        with MountProcess(engine, engine.share, tmp_path / "mnt", "cache=none").running() as mounted:
            before = copied(engine)
            with (mounted.point / "log").open("ab", buffering=0) as file:
                assert file.write(DATA[: 1 << 20]) == 1 << 20
            assert copied(engine) - before >= 1 << 20
        assert (engine.share / "log").read_bytes() == DATA[: 1 << 20]
