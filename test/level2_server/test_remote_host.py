"""`RemoteHost` on a session of its own: the library's calls and their exceptions."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import environment, unmount_below

from qtfs_client.connection import Engine
from qtfs_client.remote_host import RemoteHost
from qtfs_common.remote_calls import Action, MountCall, MountFlag, Option, OptionKind
from qtfs_common.whitelist import Type

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting is for root")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RemoteHost]:
    rules = everything_below(tmp_path / "share") | {Type.KILL: ["sleep"]}
    engine = EngineProcess(tmp_path, rules=rules)
    try:
        with engine.running(), RemoteHost.connect(Engine(engine.address), str(engine.share)) as connected:
            yield connected
    finally:
        unmount_below(str(tmp_path))


def test_mounts(host: RemoteHost, tmp_path: Path) -> None:
    (tmp_path / "share/d").mkdir()
    size = Option(OptionKind.TEXT, b"size", b"1m")
    host.mount(MountCall(Action.NEW, b"d", b"none", b"tmpfs", options=(size,)))
    (only,) = host.mounts()
    assert (only.path, only.type, only.source) == (b"d", b"tmpfs", b"none")
    host.umount(b"d")
    assert host.mounts() == []
    with pytest.raises(OSError, match="Invalid argument"):
        host.umount(b"d")
    with pytest.raises(FileNotFoundError):
        host.mount(MountCall(Action.NEW, b"missing", b"none", b"tmpfs"))
    with pytest.raises(PermissionError):
        host.mount(MountCall(Action.BIND, b"d", b"/etc"))


def test_mounts_that_go_with_the_session(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path)
    (tmp_path / "share/d").mkdir()
    with engine.running(), RemoteHost.connect(Engine(engine.address), str(engine.share)) as host:
        host.mount(MountCall(Action.NEW, b"d", b"none", b"tmpfs", flags=MountFlag.LAZY_CLEANUP))
        assert os.path.ismount(tmp_path / "share/d")
    assert not os.path.ismount(tmp_path / "share/d")


def test_a_listing_of_many_pages(host: RemoteHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [b"%03d" % number for number in range(60)]
    for name in names:
        (tmp_path / "share" / name.decode()).mkdir()
        host.mount(MountCall(Action.NEW, name, b"none", b"tmpfs"))
    monkeypatch.setattr("qtfs_client.remote_host._PAGE_BYTES", 1000)
    assert [mount.path for mount in host.mounts()] == names


def test_processes(host: RemoteHost) -> None:
    with subprocess.Popen(["sleep", "1000"], env=environment()) as process:
        try:
            found = {each.pid: each for each in host.processes()}
            start = found[process.pid].start
            assert found[process.pid].name == b"sleep"
            cpus = host.sched_getaffinity(process.pid)
            host.sched_setaffinity(process.pid, {min(cpus)}, start)
            assert host.sched_getaffinity(process.pid) == {min(cpus)}
            with pytest.raises(ProcessLookupError):
                host.kill(process.pid, signal.SIGKILL, start + 1)
            with pytest.raises(PermissionError):
                host.kill(os.getpid(), 0)
            host.kill(process.pid, signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()
