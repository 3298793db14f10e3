"""Devices and pseudo files of the server through mounts of /dev, /proc and cgroups; FIFOs with special=local."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import select
import stat
import struct
import subprocess
import termios
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import children
from harness.engine_process import EngineProcess, everything_below
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import outcome

from qtfs_common.whitelist import Type

pytestmark = pytest.mark.root

ROOTS = ("/dev", "/proc", "/sys")
NEWS = select.POLLPRI | select.POLLERR


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """It shares /dev, /proc, /sys and its own directory; in there the device `named` is named."""
    area = tmp_path_factory.mktemp("devices")
    rules = {kind: [*ROOTS, area / "share"] for kind in everything_below("/")}
    rules[Type.OPEN] = [*ROOTS, area / "share", area / "share/named"]
    made = EngineProcess(area, workers=8, rules=rules)
    with made.running():
        yield made
        wait_until(made.is_idle, f"the engine to let everything go; it has {made.figures()}")


@contextlib.contextmanager
def mounted(engine: EngineProcess, source: str | Path, point: Path, options: str = "") -> Iterator[Path]:
    with MountProcess(engine, Path(source), point, f"driver=fuse3,{options}").running() as mount:
        yield mount.point


@pytest.fixture(scope="module")
def dev(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(engine, "/dev", tmp_path_factory.mktemp("dev") / "mnt") as point:
        yield point


@pytest.fixture(scope="module")
def proc(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(engine, "/proc", tmp_path_factory.mktemp("proc") / "mnt") as point:
        yield point


# ---- devices


def test_memory_devices(dev: Path) -> None:
    for name in ("null", "zero", "full", "urandom"):
        st, true = os.stat(dev / name), os.stat(f"/dev/{name}")
        assert (st.st_mode, st.st_rdev) == (true.st_mode, true.st_rdev)
    fds = {name: os.open(dev / name, os.O_RDWR) for name in ("null", "zero", "full", "urandom")}
    assert os.read(fds["null"], 100) == b"" and os.write(fds["null"], bytes(300_000)) == 300_000
    assert os.read(fds["zero"], 100_000) == bytes(100_000)
    assert outcome(os.write, fds["full"], b"x") == "ENOSPC" and os.read(fds["full"], 3) == bytes(3)
    assert os.read(fds["urandom"], 64) != os.read(fds["urandom"], 64)
    poll = select.poll()
    poll.register(fds["zero"], select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == [(fds["zero"], select.POLLIN | select.POLLOUT)]
    for fd in fds.values():
        assert outcome(fcntl.ioctl, fd, termios.TIOCGWINSZ, bytes(8)) == "ENOTTY"
        os.close(fd)
    assert subprocess.check_output(f"head -c 5 {dev}/zero | od -An -tx1; echo x > {dev}/null", shell=True) == (
        b" 00 00 00 00 00\n"
    )


def test_devices_that_are_not_named(engine: EngineProcess, tmp_path: Path) -> None:
    for name in ("named", "unnamed"):
        os.mknod(engine.share / name, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with mounted(engine, engine.share, tmp_path / "mnt") as there:
        assert stat.S_ISCHR(os.stat(there / "unnamed").st_mode)
        assert outcome(os.open, there / "unnamed", os.O_RDONLY) == "EACCES"
        assert (there / "named").open("rb").read(4) == bytes(4)
    for name in ("named", "unnamed"):
        (engine.share / name).unlink()


@contextlib.contextmanager
def terminal(dev: Path) -> Iterator[tuple[int, int]]:
    """A pty of the server: its master, opened there, and its slave, opened through the mount."""
    master, slave = pty.openpty()
    there = os.open(dev / os.ttyname(slave).removeprefix("/dev/"), os.O_RDWR)
    os.close(slave)
    tty.setraw(master)
    try:
        yield master, there
    finally:
        with contextlib.suppress(OSError):
            os.close(master)
        os.close(there)


def test_a_terminal(dev: Path) -> None:
    with terminal(dev) as (master, slave):
        assert stat.S_ISCHR(os.stat(dev / "pts").st_mode) is False
        os.write(master, b"keys")
        assert os.read(slave, 100) == b"keys"
        os.write(slave, b"words")
        assert os.read(master, 100) == b"words"
        with children(lambda: os.read(slave, 10)) as (child,):
            child.blocks_in("read")
            os.write(master, b"later")
            assert child.result() == b"later"
        with select.epoll() as epoll:
            epoll.register(slave, select.EPOLLIN | select.EPOLLET)
            assert epoll.poll(0) == []
            os.write(master, b"x")
            assert epoll.poll(10) == [(slave, select.EPOLLIN)]
            assert os.read(slave, 10) == b"x"
            os.close(master)
            assert epoll.poll(10)[0][1] & select.EPOLLHUP


def test_requests_to_a_terminal(dev: Path) -> None:
    """Those whose number says what they carry reach it; the old ones, which a FUSE kernel cannot carry, are ENOTTY."""
    with terminal(dev) as (master, slave):
        settings = bytearray(fcntl.ioctl(slave, 0x802C542A, bytes(44)))  # TCGETS2
        assert not struct.unpack_from("<I", settings, 12)[0] & termios.ICANON, "it is raw"
        struct.pack_into("<I", settings, 12, termios.ICANON)
        fcntl.ioctl(slave, 0x402C542B, bytes(settings))  # TCSETS2
        assert termios.tcgetattr(master)[3] & termios.ICANON
        for command in (termios.TCGETS, termios.TIOCGWINSZ, termios.TIOCSTI, termios.TIOCSCTTY, termios.TIOCGPGRP):
            assert outcome(fcntl.ioctl, slave, command, bytes(64)) == "ENOTTY", hex(command)
        with pytest.raises(termios.error) as refused:
            termios.tcgetattr(slave)
        assert refused.value.args[0] == errno.ENOTTY
        assert not os.isatty(slave)


def test_a_block_device(dev: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    made = subprocess.run(["losetup", "-f", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    loop = dev / os.path.basename(made.stdout.strip())
    try:
        assert stat.S_ISBLK(os.stat(loop).st_mode)
        fd = os.open(loop, os.O_RDWR)
        assert os.lseek(fd, 0, os.SEEK_END) == os.fstat(fd).st_size == 1 << 20
        assert os.pwrite(fd, b"here", 5000) == 4
        assert os.pread(fd, 8, 4998) == b"\0\0here\0\0"
        assert outcome(os.pwrite, fd, b"x", 1 << 20) == "ENOSPC"
        assert struct.unpack("<Q", fcntl.ioctl(fd, 0x80081272, bytes(8)))[0] == 1 << 20  # BLKGETSIZE64
        os.fsync(fd)
        os.close(fd)
        subprocess.run(["dd", f"if={loop}", f"of={tmp_path}/copy", "bs=64k", "status=none"], check=True)
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "disk").read_bytes()
    finally:
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


# ---- news of pseudo files


def news(fd: int, cause: Callable[[], object], call: str = "poll") -> None:
    """POLLPRI comes to one who waits for it, when `cause` happens and not before."""

    def wait() -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        return [(0, bits) for _, bits in poll.poll(10_000)]

    with children(wait) as (child,):
        child.blocks_in("poll")
        cause()
        assert child.result() == [(0, NEWS)]


def test_the_mount_table(proc: Path, engine: EngineProcess, tmp_path: Path) -> None:
    fd = os.open(proc / f"{engine.pid}/mounts", os.O_RDONLY)
    poll = select.poll()
    poll.register(fd, select.POLLPRI)

    def mount() -> None:
        subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)

    def unmount() -> None:
        subprocess.run(["umount", tmp_path], check=True)

    for cause in (mount, unmount, mount, unmount):
        assert poll.poll(0) == []
        news(fd, cause)
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLPRI | select.EPOLLET)
        assert epoll.poll(0) == []
        for cause in (mount, unmount):
            cause()
            assert epoll.poll(10) == [(fd, NEWS)]
            assert epoll.poll(0) == []
    os.close(fd)


def _cgroup2() -> str | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return point
    return None


@pytest.fixture
def cgroup(engine: EngineProcess, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A fresh cgroup: on the server, and through a mount of /sys."""
    point = _cgroup2()
    made = None
    if point is None:
        point = str(tmp_path / "cgroup")
        os.mkdir(point)
        made = subprocess.run(["mount", "-t", "cgroup2", "none", point], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no cgroup2: {made.stderr.strip()}")
    here = Path(point) / f"qtfs-test-{os.getpid()}"
    here.mkdir()
    yield here, Path(point)
    here.rmdir()
    if made is not None:
        subprocess.run(["umount", point], check=True)


def test_cgroup_events(cgroup: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    here, top = cgroup
    area = tmp_path_factory.mktemp("cgroups")
    own = EngineProcess(area, rules=everything_below(top), workers=4)
    with own.running(), mounted(own, top, area / "mnt") as there:
        fd = os.open(there / here.name / "cgroup.events", os.O_RDONLY)
        assert b"populated 0" in os.pread(fd, 1000, 0)
        sleeper = subprocess.Popen(["sleep", "60"])
        news(fd, lambda: (there / here.name / "cgroup.procs").write_text(str(sleeper.pid)))
        assert b"populated 1" in os.pread(fd, 1000, 0)

        def end() -> None:
            sleeper.kill()
            sleeper.wait()

        news(fd, end)
        assert b"populated 0" in os.pread(fd, 1000, 0)
        os.close(fd)


def test_pressure_triggers(proc: Path) -> None:
    """PSI: the write makes the trigger, a stall makes the news."""
    try:
        os.close(os.open("/proc/pressure/cpu", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"no PSI: {error}")
    fd = os.open(proc / "pressure/cpu", os.O_RDWR | os.O_NONBLOCK)
    assert outcome(os.write, fd, b"nonsense") == "EINVAL"
    os.write(fd, b"some 1000 2000000\0")
    assert outcome(os.write, fd, b"some 1000 2000000\0") == "EBUSY", "one trigger for each open file"

    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    busy = [
        subprocess.Popen(["timeout", "5", "sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    assert poll.poll(10_000) == [(fd, select.POLLPRI)]
    for process in busy:
        process.terminate()
        process.wait()
    os.close(fd)


# ---- special=local


def test_special_local_leaves_fifos_to_the_client(engine: EngineProcess, tmp_path: Path) -> None:
    with mounted(engine, engine.share, tmp_path / "mnt", "special=local") as there:
        os.mkfifo(there / "fifo")
        reader = os.open(there / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(there / "fifo", os.O_WRONLY)
        assert stat.S_ISFIFO(os.fstat(reader).st_mode)
        os.write(writer, b"x")
        assert os.read(reader, 10) == b"x"
        assert outcome(os.open, engine.share / "fifo", os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"
        os.close(reader)
        os.close(writer)
        (there / "fifo").unlink()
