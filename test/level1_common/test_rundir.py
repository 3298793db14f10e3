"""The run directory and its locks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qtfs_common import rundir
from qtfs_common.errors import LockedError, RunDirError
from qtfs_common.rundir import lock_file, run_directory

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTFS_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_it_is_created_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = run_directory(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert path == tmp_path / "a" / "b"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert run_directory(path) == path  # and found again


def test_argument_then_environment_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "DEFAULT_RUN_DIR", str(tmp_path / "default"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_directory() == tmp_path / ("default" if os.geteuid() == 0 else "qtfs")
    monkeypatch.setenv("QTFS_RUN_DIR", str(tmp_path / "environment"))
    assert run_directory() == tmp_path / "environment"
    assert run_directory(str(tmp_path / "argument")) == tmp_path / "argument"


def test_users_have_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid or 4321)
    assert rundir._default() == f"/tmp/qtfs-{uid or 4321}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert rundir._default() == f"{tmp_path}/qtfs"


def test_the_default_is_run_qtfs() -> None:
    assert rundir.DEFAULT_RUN_DIR == "/run/qtfs"


def test_what_cannot_be_trusted_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    for name, reason in [("file", "is not a directory"), ("link", "is not a directory"), ("open", "mode 0770")]:
        with pytest.raises(RunDirError, match=f"{tmp_path}/{name} .*{reason}"):
            run_directory(tmp_path / name)
    with pytest.raises(RunDirError, match=f"cannot create run directory {tmp_path}/file/x: Not a directory"):
        run_directory(tmp_path / "file" / "x")
    with pytest.raises(RunDirError, match="'a/b' is not an absolute path"):
        run_directory("a/b")


@AS_ROOT
def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 4321, 4321)
    with pytest.raises(RunDirError, match=f"{tmp_path}/theirs belongs to another user .uid 4321"):
        run_directory(tmp_path / "theirs")


def test_a_lock_holds_off_others_and_names_its_holder(tmp_path: Path) -> None:
    with lock_file("engine.lock", tmp_path) as lock:
        assert lock.path == tmp_path / "engine.lock"
        assert lock.path.read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE(lock.path.stat().st_mode) == 0o600
        with pytest.raises(LockedError, match=f"{lock.path} is locked by process {os.getpid()}:") as caught:
            lock_file("engine.lock", tmp_path)
        assert caught.value.pid == os.getpid()
        lock_file("other.lock", tmp_path).release()
    lock_file("engine.lock", tmp_path).release()


def test_a_refused_lock_leaves_the_holders_pid_and_no_descriptor(tmp_path: Path) -> None:
    with lock_file("l", tmp_path) as lock:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(LockedError):
            lock_file("l", tmp_path)
        assert os.listdir("/proc/self/fd") == before
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_release_can_be_repeated_and_forgets_the_pid(tmp_path: Path) -> None:
    lock = lock_file("l", tmp_path)
    lock.release()
    lock.release()
    assert lock.path.read_text() == ""


def test_a_longer_pid_of_a_dead_holder_is_overwritten_whole(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("99999999999\n")
    with lock_file("l", tmp_path) as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_a_holder_that_has_not_written_itself_down_is_another_process(tmp_path: Path) -> None:
    with lock_file("l", tmp_path) as lock:
        lock.path.write_text("")
        with pytest.raises(LockedError, match="locked by another process") as caught:
            lock_file("l", tmp_path)
    assert caught.value.pid is None


def test_a_lock_ends_with_its_process_and_not_before(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from qtfs_common.rundir import lock_file; "
        "lock = lock_file('l', pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"\n"
        with pytest.raises(LockedError) as caught:
            lock_file("l", tmp_path)
        assert caught.value.pid == child.pid
        child.kill()
    lock_file("l", tmp_path).release()


def test_after_a_fork_the_child_writes_itself_down(tmp_path: Path) -> None:
    with lock_file("l", tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.write_pid()
            os._exit(0)
        os.waitpid(child, 0)
        assert lock.path.read_text() == f"{child}\n"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "l").symlink_to("target")
    with pytest.raises(RunDirError, match=f"cannot open lock {tmp_path}/l"):
        lock_file("l", tmp_path)
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_lock_is_named_by_one_component(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a file name"):
        lock_file(name, tmp_path)
