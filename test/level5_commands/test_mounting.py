"""Mounting and unmounting as users do it: options, names, every way to end a mount, and what stays behind: nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import MOUNT, Word, as_nobody, daemon_of, daemons, kill_daemon_of, mount, mounted, mounts_at, run
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import environment
from harness.waiting import wait_until


@pytest.fixture
def source(served: EngineProcess) -> Path:
    """A directory of the server with a file in it."""
    path: Path = served.share / os.urandom(4).hex()
    path.mkdir()
    (path / "file").write_text("content")
    return path


def wait_for_the_end(point: Path) -> None:
    wait_until(lambda: not daemons(point), "the daemon to end")
    assert not mounts_at(point)


# -------------------------------------------------------------------------------------------------------- what one gets


def test_the_mount_answers_once_the_command_is_back(source: Path, point: Path, server: str) -> None:
    """Nothing is said, and the daemon holds none of our pipes, our directory, our terminal."""
    outcome = mount(source, point, server).check()
    assert (outcome.stdout, outcome.stderr) == ("", "")
    assert (point / "file").read_text() == "content"
    (only,) = mounts_at(point)
    assert (only.type, only.source) == ("fuse.qtfs", str(source))
    assert {"rw", "nosuid", "nodev"} & only.options == {"rw", "nodev"} and "allow_other" in only.super_options
    daemon = daemon_of(point)
    assert daemon.cwd() == "/" and daemon.terminal() is None and os.getsid(daemon.pid) != os.getsid(0)
    assert {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


def test_verbose(source: Path, point: Path, server: str) -> None:
    outcome = mount(source, point, server, "-v").check()
    assert outcome.stdout == f"mount.qtfs: {source} mounted on {point}\n" and outcome.stderr == ""


def test_fake(source: Path, point: Path, server: str) -> None:
    mount(source, point, server, "-f").check()
    assert not mounts_at(point) and not daemons(point)


def test_every_option_that_others_pass_along(source: Path, point: Path, server: str) -> None:
    """mount(8), fstab(5) and systemd.mount(5) have them; those with a meaning for the kernel reach it."""
    options = (
        "defaults,_netdev,nofail,noauto,auto,user,nouser,users,owner,group,exec,suid,dev,async,relatime,strictatime,"
        "lazytime,nomand,iversion,silent,loud,x-systemd.automount,x-systemd.requires=network-online.target,"
        "x-gvfs-hide,X-mount.mkdir=755,x-initrd.mount,comment=text,uhelper=hal,helper=qtfs,nosuid,nodev,noexec,noatime"
    )
    mount(source, point, f"{options},{server}", "-n", "-s", "-w").check()
    (only,) = mounts_at(point)
    assert {"nosuid", "nodev", "noexec", "noatime", "rw"} <= only.options


def test_a_sloppy_mount_takes_what_it_does_not_know(source: Path, point: Path, server: str) -> None:
    outcome = mount(source, point, f"rsize=65536,{server}", "-s").check()
    assert "rsize=65536" in outcome.stderr and "ignored" in outcome.stderr


@pytest.mark.parametrize("words", [("-o", "ro"), ("-r",), ("-o", "rw", "-r"), ("-w", "-o", "ro")])
def test_read_only(source: Path, point: Path, server: str, words: tuple[str, ...]) -> None:
    mount(source, point, server, *words).check()
    assert "ro" in mounts_at(point)[0].options
    for name, attempt in (("new", Path.touch), ("file", Path.unlink), ("directory", Path.mkdir)):
        with pytest.raises(OSError) as caught:
            attempt(point / name)
        assert caught.value.errno == errno.EROFS
    assert (point / "file").read_text() == "content"


@pytest.fixture
def tcp_engine(tmp_path: Path, source: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path / "tcp", "tcp", rules=everything_below(source)).running() as engine:
        yield engine


def test_the_original_s_module_parameters(source: Path, point: Path, tcp_engine: EngineProcess) -> None:
    port = str(tcp_engine.address).rpartition(":")[2]
    options = f"qtfs_server_ip=127.0.0.1,qtfs_server_port={port},qtfs_conn_max_conn=3,qtfs_log_level=ERROR"
    with mounted(source, point, options):
        assert (point / "file").read_text() == "content"


def test_settings_from_a_configuration_file(source: Path, point: Path, tmp_path: Path, served: EngineProcess) -> None:
    """An option of the command line wins."""
    config = tmp_path / "client.toml"
    config.write_text(f'server = "{served.address}"\ncache = "none"\nqtfs_log_level = "ERROR"\ntimeout = 7\n')
    with mounted(source, point, f"config={config}"):
        assert "default_permissions" not in mounts_at(point)[0].super_options
    with mounted(source, point, f"config={config},cache=always"):
        assert "default_permissions" in mounts_at(point)[0].super_options


@pytest.mark.parametrize("cache", ["none", "auto", "always"])
@pytest.mark.parametrize("more", ["", "max_read=4096", "threads=1", "timeout=0", "noallow_other", "allow_root"])
def test_settings_of_ours(source: Path, point: Path, server: str, cache: str, more: str) -> None:
    with mounted(source, point, f"{server},cache={cache},{more}"):
        (point / "big").write_bytes(bytes(range(256)) * 1000)
        assert (source / "big").read_bytes() == (point / "big").read_bytes()
        assert sorted(os.listdir(point)) == ["big", "file"]


def test_a_single_channel_serves_many(source: Path, point: Path, server: str) -> None:
    with mounted(source, point, f"{server},cache=none,threads=1"):
        readers = [subprocess.Popen(["cat", point / "file"], stdout=subprocess.PIPE) for _ in range(8)]
        assert {reader.communicate(timeout=20)[0] for reader in readers} == {b"content"}


NAMES = [b"with space", b"with,comma", b"back\\slash", b"new\nline", b'quo"te', b"\xff\xfe", "\u6587".encode(), b"a=b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(source: Path, point: Path, server: str, name: bytes) -> None:
    there, here = os.path.join(os.fsencode(source), name), os.path.join(os.fsencode(point), name)
    os.mkdir(there)
    os.mkdir(here)
    mount(there, here, server).check()
    try:
        with open(os.path.join(here, b"written"), "wb"):
            pass
        assert os.listdir(there) == [b"written"]
        assert os.fsencode(mounts_at(here)[0].source) == there
    finally:
        run("umount", here).check()
    wait_until(lambda: not daemons(here), "the daemon to end")


def test_a_relative_mount_point_and_a_link_to_one(source: Path, point: Path, tmp_path: Path, server: str) -> None:
    mount(source, point.name, server, cwd=tmp_path).check()
    assert (point / "file").exists()
    run("umount", point).check()
    wait_for_the_end(point)
    (tmp_path / "link").symlink_to(point.name)
    mount(source, tmp_path / "link/", server).check()
    assert (point / "file").exists() and len(mounts_at(point)) == 1


def test_source_with_slashes_and_dots(source: Path, point: Path, server: str) -> None:
    mount(f"/{source.parent}/.//{source.name}/", point, server).check()
    assert mounts_at(point)[0].source == str(source)


def test_over_a_directory_that_is_not_empty(source: Path, point: Path, server: str) -> None:
    (point / "hidden").touch()
    mount(source, point, server).check()
    assert os.listdir(point) == ["file"]


def test_two_mounts_of_one_directory(source: Path, point: Path, tmp_path: Path, server: str) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with mounted(source, point, server), mounted(source, second, server):
        (point / "new").write_text("x")
        assert (second / "new").read_text() == "x"
        assert os.stat(point / "new").st_ino == os.stat(second / "new").st_ino
        run("umount", second).check()
        wait_for_the_end(second)
        assert (point / "new").read_text() == "x"


def test_a_mount_in_a_mount(source: Path, point: Path, server: str) -> None:
    (source / "inner").mkdir()
    with mounted(source, point, server), mounted(source, point / "inner", server):
        assert (point / "inner/file").read_text() == "content"
        assert (point / "inner/inner").is_dir()


# ------------------------------------------------------------------------------------------------------ how it ends


ENDS: dict[str, tuple[str, ...]] = {
    "umount": ("umount",),
    "umount-l": ("umount", "-l"),
    "umount-f": ("umount", "-f"),
    "fusermount": ("fusermount", "-u"),
    "fusermount3": ("fusermount3", "-u"),
    "fusermount3-z": ("fusermount3", "-u", "-z"),
}


@pytest.mark.parametrize("command", ENDS.values(), ids=ENDS.keys())
def test_commands_that_end_it(source: Path, point: Path, server: str, command: tuple[Word, ...]) -> None:
    mount(source, point, server).check()
    (point / "file").write_text("changed")
    outcome = run(*command, point).check()
    assert (outcome.stdout, outcome.stderr) == ("", "")
    wait_for_the_end(point)
    assert (source / "file").read_text() == "changed"
    assert os.listdir(point) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_end_it(source: Path, point: Path, server: str, number: signal.Signals) -> None:
    mount(source, point, server).check()
    daemon_of(point).send_signal(number)
    wait_for_the_end(point)


def test_a_busy_mount_is_not_taken_away(source: Path, point: Path, server: str) -> None:
    mount(source, point, server).check()
    with (point / "file").open() as file:
        outcome = run("umount", point)
        assert outcome.status == 32 and "busy" in outcome.stderr
        assert file.read() == "content"
    run("umount", point).check()
    wait_for_the_end(point)


def test_lazily_unmounted_files_still_work(source: Path, point: Path, server: str) -> None:
    """The daemon stays until the last user is gone."""
    mount(source, point, server).check()
    with (point / "file").open("r+") as file:
        run("umount", "-l", point).check()
        assert os.listdir(point) == []
        assert file.read() == "content"
        file.write(" and more")
        file.flush()
        assert len(daemons(point)) == 1
    wait_for_the_end(point)
    assert (source / "file").read_text() == "content and more"


def test_foreground(source: Path, point: Path, server: str) -> None:
    command = [MOUNT, source, point, "-o", f"foreground,{server}"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    try:
        wait_until(lambda: mounts_at(point), "the mount", 20)
        assert (point / "file").read_text() == "content"
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, b"")
    finally:
        process.kill()
        process.wait()
    assert not mounts_at(point)


def test_foreground_ends_with_the_mount(source: Path, point: Path, server: str) -> None:
    process = subprocess.Popen([MOUNT, source, point, "-o", f"foreground,{server}"], env=environment())
    try:
        wait_until(lambda: mounts_at(point), "the mount", 20)
        wait_until(lambda: (point / "file").exists(), "the mount to answer")
        run("umount", point).check()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------------ when it dies


def test_mounting_over_what_a_dead_daemon_left(source: Path, point: Path, server: str) -> None:
    mount(source, point, server).check()
    kill_daemon_of(point)
    with pytest.raises(OSError) as caught:
        os.stat(point / "file")
    assert caught.value.errno == errno.ENOTCONN
    mount(source, point, server).check()
    assert len(mounts_at(point)) == 1
    assert (point / "file").read_text() == "content"


@pytest.mark.parametrize("command", [("umount",), ("umount", "-l"), ("fusermount3", "-u")], ids=" ".join)
def test_unmounting_what_a_dead_daemon_left(source: Path, point: Path, server: str, command: tuple[Word, ...]) -> None:
    mount(source, point, server).check()
    kill_daemon_of(point)
    run(*command, point).check()
    assert not mounts_at(point)


def test_open_files_of_a_dead_daemon(source: Path, point: Path, server: str) -> None:
    """Whoever uses them is told, instead of waiting for ever."""
    mount(source, point, f"{server},cache=none").check()
    fd = os.open(point / "file", os.O_RDONLY)
    kill_daemon_of(point)
    for use in (os.fstat, os.fsync, os.close):
        with pytest.raises(OSError) as caught:
            use(fd)
        assert caught.value.errno == errno.ENOTCONN
    run("umount", point).check()


def test_who_waits_when_the_daemon_dies(source: Path, point: Path, server: str) -> None:
    """A process in the middle of a system call gets an error at once."""
    mount(source, point, f"{server},cache=none").check()
    with (source / "file").open("r+b") as locked:
        fcntl.lockf(locked, fcntl.LOCK_EX)
        words = [sys.executable, "-c", "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX)"]
        waiting = subprocess.Popen([*words, point / "file"], stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        kill_daemon_of(point)
        assert b"ConnectionAbortedError" in waiting.communicate(timeout=10)[1]
    run("umount", point).check()


def test_an_engine_that_dies_and_returns(tmp_path: Path, point: Path) -> None:
    """New files work again, and what was open goes on."""
    engine = EngineProcess(tmp_path / "area")
    engine.start()
    try:
        (engine.share / "file").write_text("content")
        with mounted(engine.share, point, f"server={engine.address},cache=none"):
            with (point / "file").open("rb", buffering=0) as file:
                engine.kill()
                waiting = subprocess.Popen(["cat", point / "file"], stdout=subprocess.PIPE)
                engine.start()
                assert waiting.communicate(timeout=20)[0] == b"content"
                assert file.read() == b"content"
            assert (point / "file").read_text() == "content"
    finally:
        engine.stop()


def test_an_engine_that_does_not_return(tmp_path: Path, point: Path) -> None:
    """Waiting processes can be killed, calls fail after the timeout, and the mount can be taken away."""
    engine = EngineProcess(tmp_path / "area")
    engine.start()
    try:
        with mounted(engine.share, point, f"server={engine.address},cache=none,timeout=2"):
            engine.kill()
            waiting = subprocess.Popen(["stat", point / "file"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.3)
            waiting.kill()
            assert waiting.wait(5) == -signal.SIGKILL
            with pytest.raises(OSError) as caught:
                os.stat(point / "file")
            assert caught.value.errno == errno.EIO
            run("umount", point).check()
            wait_for_the_end(point)
    finally:
        engine.kill()


@pytest.mark.parametrize(("option", "status"), [("allow_other", 0), ("noallow_other", 1), ("allow_root", 1)])
def test_who_may_use_the_mount(source: Path, server: str, open_point: Path, option: str, status: int) -> None:
    """Root mounts: with allow_other the server decides about other users, otherwise they are kept out here."""
    os.chmod(source, 0o755)
    with mounted(source, open_point, f"{server},{option}"):
        assert (open_point / "file").exists()
        assert run(*as_nobody(["stat", open_point / "file"])).status == status


@pytest.fixture
def open_point(point: Path) -> Iterator[Path]:
    """A mount point that every user can reach; pytest's own directories are for root."""
    path = Path(f"/tmp/qtfs-{point.name}")
    path.mkdir()
    yield path
    path.rmdir()
