"""Devices and pseudo files as an engine serves them: which may be opened, what waits, what is told of readiness."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.session import Session
from harness.streams import (
    ERR,
    HUP,
    IN,
    OUT,
    POLLABLE,
    STREAM_READER,
    UNCACHED,
    answer,
    count,
    is_quiet,
    later,
    open_body,
    read_body,
    ready,
    write_body,
)
from harness.waiting import wait_until
from harness.wire import ROOT, Who

from qtfs_common.whitelist import Type

LIBC = ctypes.CDLL(None)
MNT_DETACH = 2


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that names all of /dev, and in its share the device `named`."""
    area = tmp_path_factory.mktemp("devices")
    rules = {kind: [area / "share", "/dev", "/proc"] for kind in everything_below("/")}
    rules[Type.OPEN] = [area / "share", area / "share/named", "/dev", "/proc"]
    with EngineProcess(area, rules=rules).running() as engine:
        yield engine


@pytest.fixture
def dev(devices: EngineProcess) -> Iterator[Session]:
    with Session(devices.address, "/dev") as session:
        yield session
    wait_until(devices.is_idle, "the engine to let everything go")


@pytest.mark.root
def test_only_named_devices_are_opened(devices: EngineProcess) -> None:
    numbers = os.makedev(1, 5)
    (devices.share / "below").mkdir(exist_ok=True)
    for name in ("named", "unnamed", "below/named"):
        os.mknod(devices.share / name, stat.S_IFCHR | 0o666, numbers)
    os.link(devices.share / "unnamed", devices.share / "other-name")
    with Session(devices.address, devices.share) as session:
        named = session.lookup(ROOT, b"named")
        assert (stat.S_IFMT(named.attr.mode), named.attr.rdev) == (stat.S_IFCHR, 1 << 8 | 5)
        handle = session.open(named.node, os.O_RDONLY).handle
        assert session.read(handle, 12345, 100) == bytes(100)
        for path in ("unnamed", "below/named", "other-name"):
            node = session.walk(path).node
            for flags in (os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK, os.O_RDWR):
                reply = session.ask("OPEN", open_body(flags), node=node)
                assert reply.error == errno.EACCES, path
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=named.node, who=Who(1000, 1000)).error == 0
        os.chmod(devices.share / "named", 0o600)
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=named.node, who=Who(1000, 1000)).error == errno.EACCES
    for name in ("named", "unnamed", "below/named", "other-name"):
        (devices.share / name).unlink()


@pytest.mark.root
def test_the_path_of_a_detached_mount_names_no_device(devices: EngineProcess) -> None:
    """It begins at the mount's root. Whether the engine has the node still is a matter of time: several times."""
    point = devices.share / "point"
    point.mkdir()
    errors = set()
    with Session(devices.address, devices.share) as session:
        for _ in range(10):
            subprocess.run(["mount", "-t", "tmpfs", "qtfs-test", point], check=True)
            try:
                (point / "dev/inner").mkdir(parents=True)
                os.mknod(point / "dev/inner/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
                node = session.walk("point/dev/inner/zero").node
            finally:
                LIBC.umount2(os.fsencode(point), MNT_DETACH)
            errors.add(session.ask("OPEN", open_body(os.O_RDONLY), node=node).error)
    assert errors <= {errno.EACCES, errno.ESTALE}
    point.rmdir()


@pytest.mark.root
def test_an_unnamed_device_is_refused_before_it_is_opened(devices: EngineProcess) -> None:
    """Opening the slave of a locked pty fails with EIO, a device that is none with ENXIO: neither must show."""
    os.mknod(devices.share / "none", stat.S_IFCHR | 0o666, os.makedev(250, 77))
    with Session(devices.address, devices.share) as session:
        node = session.lookup(ROOT, b"none").node
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=node).error == errno.EACCES
    (devices.share / "none").unlink()
    os.mknod(devices.share / "named", stat.S_IFCHR | 0o666, os.makedev(250, 77))
    with Session(devices.address, devices.share) as session:
        node = session.lookup(ROOT, b"named").node
        assert session.ask("OPEN", open_body(os.O_RDONLY), node=node).error == errno.ENXIO
    (devices.share / "named").unlink()


def test_sockets_cannot_be_opened(session: Session, share: Path) -> None:
    os.mknod(share / "socket", stat.S_IFSOCK | 0o666)
    assert session.ask("OPEN", open_body(os.O_RDWR), node=session.lookup(ROOT, b"socket").node).error == errno.ENXIO


def test_memory_devices(dev: Session) -> None:
    handles = {name: dev.open(dev.lookup(ROOT, name).node, os.O_RDWR).handle for name in (b"null", b"zero", b"full")}
    assert dev.read(handles[b"null"], 0, 10) == b""
    assert dev.write(handles[b"null"], 0, bytes(100000)) == 100000
    assert dev.read(handles[b"zero"], 0, 100000) == bytes(100000)
    assert dev.ask("WRITE", write_body(handles[b"full"], b"x")).error == errno.ENOSPC
    random_handle = dev.open(dev.lookup(ROOT, b"urandom").node).handle
    one, two = (dev.read(random_handle, 0, 64) for _ in range(2))
    assert len(one) == len(two) == 64 and one != two
    assert dev.poll(handles[b"zero"], IN | OUT, notify=1) == IN | OUT
    later(dev, "READ", read_body(handles[b"zero"], 10), 1)
    assert answer(dev, "READ", 1).body == bytes(10)
    later(dev, "WRITE", write_body(handles[b"null"], b"12345"), 2)
    assert count(answer(dev, "WRITE", 2)) == 5
    assert dev.ask("IOCTL", struct.pack("<QIIII", handles[b"null"], termios.TIOCGWINSZ, 0, 8, 0)).error == errno.ENOTTY


TCGETS2, TCSETS2, TIOCGPTN, TIOCSPTLCK = 0x802C542A, 0x402C542B, 0x80045430, 0x40045431


def test_a_pty(dev: Session) -> None:
    master = dev.open(dev.lookup(ROOT, b"ptmx").node, os.O_RDWR).handle
    number = struct.unpack("<I", dev.ioctl(master, TIOCGPTN, out_size=4))[0]
    dev.ioctl(master, TIOCSPTLCK, struct.pack("<I", 0))
    slave = dev.open(dev.walk(f"pts/{number}").node, os.O_RDWR).handle
    settings = bytearray(dev.ioctl(slave, TCGETS2, out_size=44))
    flags = struct.unpack_from("<I", settings, 12)[0]
    struct.pack_into("<I", settings, 12, flags & ~(termios.ICANON | termios.ECHO))
    dev.ioctl(slave, TCSETS2, bytes(settings))
    assert dev.ioctl(slave, TCGETS2, out_size=44) == bytes(settings)
    later(dev, "READ", read_body(slave), 1)
    assert is_quiet(dev)
    dev.write(master, 0, b"keys")
    assert answer(dev, "READ", 1).body == b"keys"
    assert dev.poll(master, IN, notify=2) == 0
    dev.write(slave, 0, b"out\n")
    assert ready(dev) == 2
    assert dev.read(master, 0, 100) == b"out\r\n"
    dev.release(slave)
    assert dev.poll(master, IN) & HUP
    # Hostile: what would reach beyond the device, or into the engine's memory.
    for command in (
        termios.TIOCSTI,
        termios.TIOCSCTTY,
        termios.TIOCCONS,
        termios.TIOCSWINSZ,
        0x5441,
        0x5413,
        0xFFFFFFFF,
    ):
        body = struct.pack("<QIIII", master, command, 8, 8, 0) + bytes(8)
        assert dev.ask("IOCTL", body).error == errno.ENOTTY, hex(command)
    assert dev.ask("IOCTL", struct.pack("<QIIII", master, TIOCGPTN, 0, 3, 0)).error == errno.EINVAL
    assert dev.ask("IOCTL", struct.pack("<QIIII", master, TCSETS2, 43, 0, 0) + bytes(43)).error == errno.EINVAL


@pytest.mark.root
def test_a_block_device(devices: EngineProcess, tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    backing.write_bytes(bytes(1 << 20))
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    loop = made.stdout.strip()
    try:
        with Session(devices.address, "/dev") as session:
            node = session.lookup(ROOT, os.fsencode(os.path.basename(loop))).node
            assert stat.S_ISBLK(session.getattr(node).mode)
            assert session.getattr(node | STREAM_READER).size == 1 << 20
            opened = session.open(node, os.O_RDWR)
            assert opened.flags == UNCACHED
            assert session.write(opened.handle, 5000, b"here") == 4
            assert session.read(opened.handle, 4998, 8) == b"\0\0here\0\0"
            assert session.read(opened.handle, (1 << 20) - 2, 100) == b"\0\0"
            session.fsync(opened.handle)
            assert struct.unpack("<Q", session.ioctl(opened.handle, 0x80081272, out_size=8))[0] == 1 << 20
            assert session.ask("WRITE", write_body(opened.handle, b"x", offset=1 << 20)).error == errno.ENOSPC
            session.release(opened.handle)
        assert backing.read_bytes()[4998:5006] == b"\0\0here\0\0"
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


# ---- pseudo files


def test_poll_of_the_mount_table(devices: EngineProcess, tmp_path: Path) -> None:
    """The engine's own; a bind mount in its namespace changes it."""
    with Session(devices.address, "/proc") as session:
        handle = session.open(session.walk(f"{devices.pid}/mounts").node).handle
        assert handle & POLLABLE
        text = session.read(handle, 0, 1 << 20)
        assert session.poll(handle, IN | select.POLLPRI, notify=1) == IN
        assert is_quiet(session)
        subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
        try:
            assert ready(session) == 1
            assert session.poll(handle, IN | select.POLLPRI) == IN | select.POLLPRI | ERR
        finally:
            subprocess.run(["umount", tmp_path], check=True)
        assert text
