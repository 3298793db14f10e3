"""RemoteFS does to the backing directory what the system calls do, and keeps its word when connections break."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.waiting import wait_until

from qtfs_client.connection import HEADER, Engine
from qtfs_client.remote import END_OF_FILE, MAX_PAYLOAD, OPENED_CHANGED, ROOT_NODE, Caller, LockRange, RemoteFS
from qtfs_common.addresses import Address, UnixAddress, connect_socket
from qtfs_common.protocol import OPERATIONS

FS_IOC_GETFLAGS = 0x80086601
NOBODY = Caller(65534, 65534)


def mounted(address: Address, share: Path, timeout_s: float = 20.0, slots: int = 4) -> RemoteFS:
    return RemoteFS.mount(Engine(address, None, 10.0), str(share), slots=slots, timeout_s=timeout_s)


@pytest.fixture
def fs(engine: EngineProcess, share: Path) -> Iterator[RemoteFS]:
    with mounted(engine.address, share) as opened:
        yield opened


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


# ---- names


def test_names_are_made_looked_up_and_removed(fs: RemoteFS, share: Path) -> None:
    directory = fs.mkdir(ROOT_NODE, b"d", 0o750, Caller(umask=0o027))
    fifo = fs.mknod(directory.node, b"fifo", stat.S_IFIFO | 0o600)
    device = fs.mknod(directory.node, b"null", stat.S_IFCHR | 0o666, 1 << 8 | 3)
    link = fs.symlink(directory.node, b"link", b"no\xffwhere")
    again = fs.link(fifo.node, ROOT_NODE, b"again")
    assert stat.S_ISFIFO(fifo.attributes.mode) and again.node == fifo.node and again.attributes.nlink == 2
    assert os.stat(share / "d/null").st_rdev == os.makedev(1, 3) and device.attributes.rdev == 259
    assert fs.readlink(link.node) == os.readlink(os.fsencode(share / "d/link")) == b"no\xffwhere"
    assert stat.S_IMODE(os.stat(share / "d").st_mode) == 0o750

    found = fs.lookup(directory.node, b"fifo")
    assert (found.node, found.attributes.ino) == (fifo.node, os.stat(share / "again").st_ino)
    fs.rename(directory.node, b"fifo", ROOT_NODE, b"moved")
    for name in (b"moved", b"again"):
        fs.unlink(ROOT_NODE, name)
    for name in (b"null", b"link"):
        fs.unlink(directory.node, name)
    fs.rmdir(ROOT_NODE, b"d")
    assert list(share.iterdir()) == []
    fs.forget([(fifo.node, 3), (device.node, 1), (link.node, 1), (directory.node, 1)])


def test_refusals_are_the_servers_errnos(fs: RemoteFS, share: Path) -> None:
    (share / "d/full").mkdir(parents=True)
    directory = fs.lookup(ROOT_NODE, b"d").node
    with refused(errno.ENOENT):
        fs.lookup(ROOT_NODE, b"absent")
    with refused(errno.EEXIST):
        fs.mkdir(ROOT_NODE, b"d", 0o777)
    with refused(errno.ENOTEMPTY):
        fs.rmdir(ROOT_NODE, b"d")
    with refused(errno.EISDIR):
        fs.unlink(ROOT_NODE, b"d")
    with refused(errno.ENAMETOOLONG):
        fs.lookup(ROOT_NODE, b"x" * 256)
    with refused(errno.EINVAL):
        fs.lookup(ROOT_NODE, b"..")
    with refused(errno.EEXIST):
        fs.rename(ROOT_NODE, b"d", directory, b"full", 1)  # RENAME_NOREPLACE
    with refused(errno.ESTALE):
        fs.getattr(987654321)
    with refused(errno.ESTALE):
        fs.read(987654321, 0, 1)
    with refused(errno.EACCES):
        fs.mkdir(ROOT_NODE, b"new", 0o777, NOBODY)


# ---- attributes


def test_attributes_are_lstats(fs: RemoteFS, share: Path) -> None:
    path = share / "file"
    path.write_bytes(b"12345")
    node = fs.lookup(ROOT_NODE, b"file").node
    times = (-1, 1_500_000_000_000_000_001)
    attributes, flags = fs.setattr(node, mode=0o640, uid=3, gid=4, size=3, atime_ns=times[0], mtime_ns=times[1])
    found = os.lstat(path)
    assert flags == 0 and attributes == fs.getattr(node)[0]
    assert (attributes.ino, attributes.size, attributes.blocks) == (found.st_ino, 3, found.st_blocks)
    assert (attributes.mode, attributes.uid, attributes.gid) == (found.st_mode, 3, 4)
    assert (attributes.atime_ns, attributes.mtime_ns) == (found.st_atime_ns, found.st_mtime_ns)
    assert (found.st_atime_ns, found.st_mtime_ns) == times
    assert attributes.ctime_ns == found.st_ctime_ns
    before = time.time_ns()
    attributes, _ = fs.setattr(node, atime_ns="now", mtime_ns="now")
    assert min(attributes.atime_ns, attributes.mtime_ns) > before - 10**9
    with refused(errno.EPERM):
        fs.setattr(node, mode=0o777, caller=NOBODY)


def test_access_asks_as_the_caller_with_its_groups(fs: RemoteFS, share: Path) -> None:
    path = share / "file"
    path.touch(0o640)
    os.chown(path, 0, 4242)
    node = fs.lookup(ROOT_NODE, b"file").node
    fs.access(node, os.R_OK | os.W_OK)
    with refused(errno.EACCES):
        fs.access(node, os.R_OK, NOBODY)
    for groups in ((4242,), (7, 4242), tuple(range(4000, 4300))):
        fs.access(node, os.R_OK, NOBODY._replace(groups=groups))


def test_figures_and_sync(fs: RemoteFS, share: Path) -> None:
    figures, expected = fs.statfs(), os.statvfs(share)
    assert (figures.blocks, figures.files, figures.name_max) == (
        expected.f_blocks,
        expected.f_files,
        expected.f_namemax,
    )
    assert (figures.block_bytes, figures.fragment_bytes) == (expected.f_bsize, expected.f_frsize)
    fs.syncfs()


def test_extended_attributes(fs: RemoteFS, share: Path) -> None:
    path = share / "file"
    path.touch()
    node = fs.lookup(ROOT_NODE, b"file").node
    fs.setxattr(node, b"user.a", b"1\0", os.XATTR_CREATE)
    fs.setxattr(node, b"user.b", b"")
    assert os.getxattr(path, "user.a") == fs.getxattr(node, b"user.a") == b"1\0"
    assert sorted(fs.listxattr(node)) == [b"user.a", b"user.b"]
    with refused(errno.EEXIST):
        fs.setxattr(node, b"user.a", b"2", os.XATTR_CREATE)
    with refused(errno.E2BIG):
        fs.setxattr(node, b"user.c", b"x" * 65537)
    fs.removexattr(node, b"user.a")
    with refused(errno.ENODATA):
        fs.getxattr(node, b"user.a")
    assert os.listxattr(path) == ["user.b"]


# ---- files


def test_files_are_created_written_and_read(fs: RemoteFS, share: Path) -> None:
    entry, opened = fs.create(ROOT_NODE, b"file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, Caller(umask=0o022))
    data = os.urandom(MAX_PAYLOAD + 1)
    assert fs.write(opened.handle, 10, data) == MAX_PAYLOAD
    assert fs.write(opened.handle, 10 + MAX_PAYLOAD, data[MAX_PAYLOAD:]) == 1
    assert (share / "file").read_bytes() == bytes(10) + data
    assert fs.read(opened.handle, 10, 2 * MAX_PAYLOAD) == data[:MAX_PAYLOAD]
    assert fs.read(opened.handle, 10 + MAX_PAYLOAD, 100) == data[MAX_PAYLOAD:]
    assert fs.read(opened.handle, 1 << 40, 100) == b""
    assert fs.getattr(entry.node, opened.handle)[0].size == len(data) + 10
    fs.flush(opened.handle)
    fs.fsync(opened.handle)
    fs.fsync(opened.handle, datasync=True)
    fs.release(opened.handle)
    with refused(errno.ESTALE):
        fs.read(opened.handle, 0, 1)
    with refused(errno.EEXIST):
        fs.create(ROOT_NODE, b"file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    assert stat.S_IMODE(os.stat(share / "file").st_mode) == 0o644


def test_open_tells_whether_the_file_changed(fs: RemoteFS, share: Path) -> None:
    (share / "file").write_bytes(b"a")
    node = fs.lookup(ROOT_NODE, b"file").node
    fs.getattr(node)
    first = fs.open(node, os.O_RDONLY | os.O_LARGEFILE)
    assert not first.flags & OPENED_CHANGED
    (share / "file").write_bytes(b"bc")
    second = fs.open(node, os.O_RDWR | os.O_TRUNC)
    assert second.flags & OPENED_CHANGED and fs.read(first.handle, 0, 9) == b""
    with refused(errno.EBADF):
        fs.write(first.handle, 0, b"x")
    for opened in (first, second):
        fs.release(opened.handle)


def test_nameless_files_holes_and_copies(fs: RemoteFS, share: Path) -> None:
    (share / "source").write_bytes(b"12345678")
    source = fs.open(fs.lookup(ROOT_NODE, b"source").node, os.O_RDONLY).handle
    entry, opened = fs.tmpfile(ROOT_NODE, os.O_RDWR, 0o600)
    assert entry.attributes.nlink == 0
    assert fs.copy_file_range(source, 2, opened.handle, 4, 4) == 4
    assert fs.read(opened.handle, 0, 99) == b"\0\0\0\x003456"
    fs.fallocate(opened.handle, 0, 0, 1 << 20)
    assert fs.getattr(entry.node)[0].size == 1 << 20
    fs.link(entry.node, ROOT_NODE, b"named")
    with open(share / "named", "rb") as file:
        assert fs.lseek(opened.handle, 0, os.SEEK_HOLE) == os.lseek(file.fileno(), 0, os.SEEK_HOLE)
        assert fs.lseek(opened.handle, 0, os.SEEK_DATA) == os.lseek(file.fileno(), 0, os.SEEK_DATA)
    with refused(errno.ENXIO):
        fs.lseek(opened.handle, 1 << 30, os.SEEK_DATA)
    for handle in (source, opened.handle):
        fs.release(handle)


def test_ioctl_of_inode_flags(fs: RemoteFS, share: Path) -> None:
    (share / "file").touch()
    handle = fs.open(fs.lookup(ROOT_NODE, b"file").node, os.O_RDONLY).handle
    result, data = fs.ioctl(handle, FS_IOC_GETFLAGS, out_size=8)
    assert result == 0 and len(data) == 8
    with refused(errno.ENOTTY):
        fs.ioctl(handle, 0x5401, out_size=36)  # TCGETS
    fs.release(handle)


def test_writing_for_a_user_drops_suid(fs: RemoteFS, share: Path) -> None:
    path = share / "file"
    path.touch()
    path.chmod(0o4777)
    handle = fs.open(fs.lookup(ROOT_NODE, b"file").node, os.O_WRONLY).handle
    fs.write(handle, 0, b"x")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o4777
    fs.write(handle, 0, b"x", caller=NOBODY)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o777
    path.chmod(0o4777)
    fs.write(handle, 0, b"x", kill_privileges=True)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o777
    fs.release(handle)


# ---- directories, locks


def test_directories_are_listed_whole_and_from_any_offset(fs: RemoteFS, share: Path) -> None:
    for number in range(3000):
        (share / f"{number}-{'x' * (number % 60)}").touch()
    (share / "d").mkdir()
    handle = fs.opendir(ROOT_NODE).handle
    entries = list(fs.readdir(handle))
    assert sorted(entry.name for entry in entries) == sorted([*os.listdir(os.fsencode(share)), b".", b".."])
    by_name = {entry.name: entry for entry in entries}
    assert (by_name[b"d"].type, by_name[b"d"].ino) == (4, os.stat(share / "d").st_ino)
    middle = entries[1234]
    assert list(fs.readdir(handle, middle.offset)) == entries[1235:]
    fs.fsyncdir(handle)
    fs.releasedir(handle)
    with refused(errno.ENOTDIR):
        fs.opendir(fs.lookup(ROOT_NODE, b"0-").node)


def test_locks_exclude_and_can_be_waited_for(fs: RemoteFS, share: Path) -> None:
    (share / "file").touch()
    node = fs.lookup(ROOT_NODE, b"file").node
    one, other = (fs.open(node, os.O_RDWR).handle for _ in range(2))
    whole, nothing = LockRange(0, END_OF_FILE, 1), LockRange(0, END_OF_FILE, 2)
    fs.setlk(one, 1, LockRange(10, 19, 1))
    found = fs.getlk(other, 2, whole)
    assert found is not None and (found.start, found.end, found.type) == (10, 19, 1)
    assert fs.getlk(one, 1, whole) is None
    with refused(errno.EAGAIN):
        fs.setlk(other, 2, whole)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fs.setlk, other, 2, whole, wait=True)
        fs.setlk(one, 1, nothing)
        waiting.result(10)
    fs.flush(other, 2)  # as close(2) of the owner
    fs.setlk(one, 1, whole)
    fs.setlk(one, 0, whole, flock=True)
    with refused(errno.EAGAIN):
        fs.setlk(other, 0, whole, flock=True)
    fs.release(one, flock=True)
    fs.setlk(other, 0, whole, flock=True)
    fs.release(other, flock=True)


# ---- slots


def test_threads_share_the_slots(fs: RemoteFS, share: Path, engine: EngineProcess) -> None:
    def churn(thread: int) -> None:
        for number in range(40):
            name = b"%d-%d" % (thread, number)
            entry, opened = fs.create(ROOT_NODE, name, os.O_RDWR, 0o600)
            fs.write(opened.handle, 0, name)
            assert fs.read(opened.handle, 0, 99) == name
            fs.release(opened.handle)
            fs.forget([(entry.node, 1)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(churn, range(8)))
    assert len(os.listdir(share)) == 8 * 40
    (session,) = engine.figures()["sessions"]
    assert session["nodes"] == 1 and session["handles"] == 0 and session["connections"] <= 4


# ---- broken connections


class CuttingProxy:
    """Stands between a client and an engine and hands on one message at a time; `fault` may take a reply or request.

    Called with "request" or "reply" and the operation; if it returns True, the message is lost and the connection cut.
    """

    def __init__(self, path: Path, engine: EngineProcess) -> None:
        self.address = UnixAddress(str(path))
        self.fault: Callable[[str, str], bool] = lambda where, operation: False
        self._engine = engine
        self._names = {number: name for name, number in OPERATIONS.items()}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                self._open.add(client)
                self._threads.append(threading.Thread(target=self._relay, args=(client,)))
                self._threads[-1].start()

    def _relay(self, client: socket.socket) -> None:
        with contextlib.suppress(Exception), client, connect_socket(self._engine.address) as server:
            self._open.add(server)
            while self._pass_on("request", client, server) and self._pass_on("reply", server, client):
                pass

    def _pass_on(self, where: str, source: socket.socket, destination: socket.socket) -> bool:
        head = source.recv(HEADER.size, socket.MSG_WAITALL)
        length, operation, *_ = HEADER.unpack(head)
        body = source.recv(length - len(head), socket.MSG_WAITALL) if length > len(head) else b""
        if self.fault(where, self._names[operation]):
            return False
        destination.sendall(head + body)
        return True

    def cut_all(self) -> None:
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.cut_all()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def proxy(engine: EngineProcess, tmp_path: Path) -> Iterator[CuttingProxy]:
    made = CuttingProxy(tmp_path / "proxy", engine)
    yield made
    made.close()


def once(where: str, operation: str, action: Callable[[], None] = lambda: None) -> Callable[[str, str], bool]:
    """A fault that strikes the first such message, after `action`."""
    struck = threading.Event()

    def fault(at: str, name: str) -> bool:
        if (at, name) != (where, operation) or struck.is_set():
            return False
        struck.set()
        action()
        return True

    return fault


@pytest.mark.parametrize("where", ["request", "reply"])
def test_a_request_whose_connection_breaks_takes_effect_once(proxy: CuttingProxy, share: Path, where: str) -> None:
    (share / "file").write_bytes(b"")
    with mounted(proxy.address, share) as fs:
        handle = fs.open(fs.lookup(ROOT_NODE, b"file").node, os.O_WRONLY | os.O_APPEND).handle
        proxy.fault = once(where, "MKDIR")
        fs.mkdir(ROOT_NODE, b"d", 0o777)
        proxy.fault = once(where, "WRITE")
        assert fs.write(handle, 0, b"once") == 4
        proxy.fault = once(where, "READDIR")
        assert len(fs.read_directory(fs.opendir(ROOT_NODE).handle)) == 4
        proxy.fault = once(where, "RMDIR")
        fs.rmdir(ROOT_NODE, b"d")
        proxy.fault = once(where, "LOOKUP")
        with refused(errno.ENOENT):
            fs.lookup(ROOT_NODE, b"d")
    assert (share / "file").read_bytes() == b"once"


def test_idle_connections_that_broke_are_replaced(proxy: CuttingProxy, share: Path) -> None:
    with mounted(proxy.address, share) as fs:
        handle = fs.create(ROOT_NODE, b"file", os.O_RDWR, 0o600)[1].handle
        proxy.cut_all()
        assert fs.write(handle, 0, b"abc") == 3 and fs.read(handle, 0, 9) == b"abc"


def test_a_connection_that_never_lasts_is_given_up(proxy: CuttingProxy, share: Path) -> None:
    with mounted(proxy.address, share) as fs:
        proxy.fault = lambda where, operation: operation == "STATFS"
        with refused(errno.EIO):
            fs.statfs()
        proxy.fault = lambda where, operation: False
        fs.statfs()


def test_a_silent_server_is_an_error_after_the_timeout(proxy: CuttingProxy, share: Path) -> None:
    silent = threading.Event()

    def swallow(where: str, operation: str) -> bool:
        silent.wait(10)
        return True

    with mounted(proxy.address, share, timeout_s=1.0) as fs:
        proxy.fault = swallow
        begun = time.monotonic()
        with refused(errno.EIO):
            fs.statfs()
        assert 0.9 < time.monotonic() - begun < 5
        proxy.fault = lambda where, operation: False
        silent.set()
        fs.statfs()


def test_a_slow_server_is_waited_for_and_executes_once(proxy: CuttingProxy, share: Path) -> None:
    def slow(where: str, operation: str) -> bool:
        if (where, operation) == ("reply", "MKDIR"):
            time.sleep(1.5)
        return False

    with mounted(proxy.address, share, timeout_s=2.0) as fs:
        proxy.fault = slow
        fs.mkdir(ROOT_NODE, b"d", 0o777)
        assert fs.lookup(ROOT_NODE, b"d").attributes.nlink == 2


def test_stop_ends_calls_under_way(proxy: CuttingProxy, share: Path) -> None:
    hold = threading.Event()

    def swallow(where: str, operation: str) -> bool:
        return operation == "STATFS" and hold.wait(10)

    with mounted(proxy.address, share, timeout_s=0) as fs, ThreadPoolExecutor(1) as pool:
        proxy.fault = swallow
        call = pool.submit(fs.statfs)
        time.sleep(0.05)
        fs.stop()
        with refused(errno.EIO):
            call.result(5)
        hold.set()


# ---- lost sessions


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path / "own", "unix").running() as engine:
        yield engine


def restarted(engine: EngineProcess) -> None:
    """Another engine, which knows nothing of its sessions."""
    engine.kill()
    engine.forget_sessions()
    engine.start()


def test_a_new_session_takes_over_when_the_engine_forgot_the_old_one(own_engine: EngineProcess) -> None:
    (own_engine.share / "file").write_bytes(b"abc")
    with mounted(own_engine.address, own_engine.share) as fs:
        entry = fs.lookup(ROOT_NODE, b"file")
        opened = fs.open(entry.node, os.O_RDONLY)
        restarted(own_engine)
        assert stat.S_ISDIR(fs.getattr(ROOT_NODE)[0].mode)
        with refused(errno.ESTALE):
            fs.read(opened.handle, 0, 9)
        with refused(errno.ESTALE):
            fs.getattr(entry.node)
        again = fs.lookup(ROOT_NODE, b"file")
        assert fs.read(fs.open(again.node, os.O_RDONLY).handle, 0, 9) == b"abc"
    wait_until(own_engine.is_idle, "the new session to be ended too")


def test_what_may_have_been_executed_in_a_lost_session_is_not_repeated(
    own_engine: EngineProcess, tmp_path: Path
) -> None:
    proxy = CuttingProxy(tmp_path / "proxy", own_engine)
    try:
        with mounted(proxy.address, own_engine.share) as fs:
            proxy.fault = once("reply", "MKDIR", lambda: restarted(own_engine))
            with refused(errno.EIO):
                fs.mkdir(ROOT_NODE, b"d", 0o777)
            assert (own_engine.share / "d").is_dir()
            proxy.fault = once("reply", "STATFS", lambda: restarted(own_engine))
            fs.statfs()
    finally:
        proxy.close()


def test_an_engine_that_stays_away_is_an_error_for_everybody_at_once(own_engine: EngineProcess) -> None:
    with mounted(own_engine.address, own_engine.share, timeout_s=1.0) as fs:
        own_engine.kill()
        begun = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(fs.statfs) for _ in range(16)]
            for call in calls:
                with refused(errno.EIO):
                    call.result(20)
        assert time.monotonic() - begun < 5
        own_engine.start()
        fs.statfs()


def test_records_are_as_long_as_the_protocol_says() -> None:
    from qtfs_client import remote
    from qtfs_common.protocol import RECORD_BYTES

    records = {
        "caller": remote._CALLER,
        "attributes_reply": remote._ATTRIBUTES_REPLY,
        "entry": remote._ENTRY,
        "forget_item": remote._FORGET_ITEM,
        "getattr_request": remote._GETATTR,
        "setattr_request": remote._SETATTR,
        "rename_request": remote._RENAME,
        "open_reply": remote._OPENED,
        "create_request": remote._CREATE,
        "read_request": remote._TRANSFER,
        "write_request": remote._TRANSFER,
        "lseek_request": remote._TRANSFER,
        "readdir_request": remote._TRANSFER,
        "statfs_reply": remote._STATFS,
        "release_request": remote._RELEASE,
        "fsync_request": remote._FSYNC,
        "xattr_request": remote._XATTR,
        "direntry": remote._DIRENT,
        "lock_request": remote._LOCK,
        "lock_reply": remote._LOCK_REPLY,
        "ioctl_request": remote._IOCTL,
        "ioctl_reply": remote._IOCTL_REPLY,
        "fallocate_request": remote._FALLOCATE,
        "copy_request": remote._COPY,
    }
    assert {name: record.size for name, record in records.items()} == {name: RECORD_BYTES[name] for name in records}
    assert struct.calcsize("<II") == RECORD_BYTES["open_request"] == RECORD_BYTES["mknod_request"]
