"""Whose a request is: owners of what is made, permissions of every user, groups, umask, suid and its loss."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.session import Session
from harness.wire import NOBODY, ROOT, Who

ALICE = Who(1001, 2001)
BOB = Who(1002, 2002)
SUID_FILE = stat.S_IFREG | 0o6755
KILL = 1
SET_KILL_PRIVILEGES = 1 << 11


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno is not None
    return caught.value.errno


def owner(path: Path) -> tuple[int, int]:
    st = path.lstat()
    return st.st_uid, st.st_gid


@pytest.fixture
def open_share(share: Path) -> Path:
    share.chmod(0o777)
    return share


# ---- owners


def test_what_is_made_belongs_to_the_caller(session: Session, open_share: Path) -> None:
    target = session.mknod(ROOT, b"node", stat.S_IFREG | 0o644, who=ALICE).node
    session.mkdir(ROOT, b"directory", who=ALICE)
    session.symlink(ROOT, b"link", b"x", who=ALICE)
    session.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600, who=ALICE)
    session.mknod(ROOT, b"socket", stat.S_IFSOCK | 0o600, who=ALICE)
    session.release(session.create(ROOT, b"file", who=ALICE)[1].handle)
    for path in open_share.iterdir():
        assert owner(path) == (1001, 2001), path
    made, opened = session.tmpfile(ROOT, who=ALICE)
    assert (made.attr.uid, made.attr.gid) == (1001, 2001)
    session.release(opened.handle)
    assert session.link(target, ROOT, b"second", who=ALICE).attr.uid == 1001


def test_the_caller_of_one_request_is_not_that_of_the_next(session: Session, open_share: Path) -> None:
    callers = [ALICE, Who(), BOB, NOBODY, Who(0, 7), Who(), Who(0, 0, (5, 6)), Who(1001, 0)]
    for number, who in enumerate(callers):
        session.mkdir(ROOT, b"%d" % number, who=who)
        assert owner(open_share / str(number)) == (who.uid, who.gid)


def test_callers_do_not_mix_between_workers(engine: EngineProcess, open_share: Path) -> None:
    """Eight sessions at once, each another user: every file has its maker's ids."""
    wrong: list[object] = []

    def make(uid: int) -> None:
        who = Who(uid, uid + 1000, (uid + 2000,))
        with Session(engine.address, open_share, who=who) as session:
            for number in range(100):
                made, opened = session.create(ROOT, b"%d-%d" % (uid, number))
                session.release(opened.handle)
                if (made.attr.uid, made.attr.gid) != (uid, uid + 1000):
                    wrong.append((uid, made))

    threads = [threading.Thread(target=make, args=(uid,)) for uid in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(os.listdir(open_share)) == 800


@pytest.mark.parametrize("umask", [0, 0o022, 0o027, 0o077, 0o777])
def test_the_callers_umask_counts(session: Session, open_share: Path, umask: int) -> None:
    who = Who(1001, 2001, umask=umask)
    session.mkdir(ROOT, b"d", 0o777, who=who)
    session.mknod(ROOT, b"n", stat.S_IFREG | 0o666, who=who)
    made, opened = session.create(ROOT, b"f", mode=0o666, who=who)
    session.release(opened.handle)
    assert stat.S_IMODE(made.attr.mode) == 0o666 & ~umask
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in open_share.iterdir()}
    assert modes == {"d": 0o777 & ~umask, "n": 0o666 & ~umask, "f": 0o666 & ~umask}
    session.mkdir(ROOT, b"after", 0o777, who=Who(umask=0))
    assert stat.S_IMODE((open_share / "after").stat().st_mode) == 0o777


def test_a_default_acl_takes_the_place_of_the_umask(session: Session, open_share: Path) -> None:
    entries = [(0x01, 7, -1), (0x04, 7, -1), (0x10, 7, -1), (0x20, 5, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(open_share, "system.posix_acl_default", acl)
    session.mkdir(ROOT, b"d", 0o777, who=Who(1001, 2001, umask=0o077))
    assert stat.S_IMODE((open_share / "d").stat().st_mode) == 0o775


def test_a_setgid_directory_gives_its_group(session: Session, open_share: Path) -> None:
    os.chown(open_share, 0, 5555)
    open_share.chmod(0o2777)
    session.mkdir(ROOT, b"d", who=ALICE)
    session.release(session.create(ROOT, b"f", who=ALICE)[1].handle)
    assert owner(open_share / "d") == (1001, 5555) and (open_share / "d").stat().st_mode & stat.S_ISGID
    assert owner(open_share / "f") == (1001, 5555)


# ---- permissions


def test_permissions_hold_for_every_user(session: Session, share: Path) -> None:
    (share / "private").write_text("secret")
    (share / "private").chmod(0o600)
    os.chown(share / "private", 1001, 2001)
    (share / "closed").mkdir(mode=0o700)
    (share / "closed/f").touch()
    private, closed = session.lookup(ROOT, b"private").node, session.lookup(ROOT, b"closed").node
    cases: list[Callable[[], object]] = [
        lambda: session.open(private, who=BOB),
        lambda: session.open(private, os.O_WRONLY, who=BOB),
        lambda: session.setattr(private, size=0, who=BOB),
        lambda: session.access(private, os.R_OK, who=BOB),
        lambda: session.getxattr(private, b"user.x", who=BOB),
        lambda: session.setxattr(private, b"user.x", b"", who=BOB),
        lambda: session.lookup(closed, b"f", who=BOB),
        lambda: session.opendir(closed, who=BOB),
        lambda: session.unlink(ROOT, b"private", who=BOB),
        lambda: session.mkdir(ROOT, b"d", who=BOB),
        lambda: session.create(ROOT, b"f", who=BOB),
        lambda: session.create(ROOT, b"private", who=BOB),
        lambda: session.tmpfile(ROOT, who=BOB),
        lambda: session.symlink(ROOT, b"l", b"x", who=BOB),
        lambda: session.rename(ROOT, b"private", ROOT, b"p", who=BOB),
    ]
    for call in cases:
        assert refusal(call) == errno.EACCES
    assert refusal(session.setattr, private, mode=0o777, who=BOB) == errno.EPERM
    assert refusal(session.setattr, private, uid=1002, who=BOB) == errno.EPERM
    assert refusal(session.setattr, private, mtime=(1, 1), who=BOB) == errno.EPERM
    opened = session.open(private, os.O_RDWR, who=ALICE)
    assert session.read(opened.handle, 0, 10) == b"secret"
    session.release(opened.handle)
    assert (share / "private").read_text() == "secret" and stat.S_IMODE((share / "private").stat().st_mode) == 0o600


def test_supplementary_groups_count_and_only_those_of_the_request(session: Session, share: Path) -> None:
    (share / "shared").touch()
    os.chown(share / "shared", 0, 3000)
    (share / "shared").chmod(0o660)
    node = session.lookup(ROOT, b"shared").node
    for groups in ((3000,), (1, 2, 3000), tuple(range(2977, 3001))):
        session.release(session.open(node, os.O_RDWR, who=Who(1001, 2001, groups)).handle)
        assert refusal(session.open, node, os.O_RDWR, who=ALICE) == errno.EACCES
    session.release(session.open(node, os.O_RDWR, who=Who(1001, 3000)).handle)
    assert refusal(session.open, node, os.O_RDWR, who=Who(1001, 2001, (2999, 3001))) == errno.EACCES


def test_a_thousand_groups_are_taken(session: Session, share: Path) -> None:
    os.chown(share, 0, 9999)
    share.chmod(0o770)
    session.mkdir(ROOT, b"d", who=Who(1001, 2001, (*range(10000, 11023), 9999)))
    assert owner(share / "d") == (1001, 2001)


def test_the_sticky_bit_protects_the_owners_of_files(session: Session, open_share: Path) -> None:
    open_share.chmod(0o1777)
    session.mkdir(ROOT, b"d", who=ALICE)
    assert refusal(session.rmdir, ROOT, b"d", who=BOB) == errno.EPERM
    assert refusal(session.rename, ROOT, b"d", ROOT, b"e", who=BOB) == errno.EPERM
    session.rmdir(ROOT, b"d", who=ALICE)


def test_root_may_what_nobody_else_may(session: Session, share: Path) -> None:
    (share / "f").write_text("x")
    (share / "f").chmod(0)
    os.chown(share / "f", 1001, 2001)
    node = session.lookup(ROOT, b"f").node
    session.release(session.open(node, os.O_RDWR).handle)
    session.setattr(node, uid=5)
    session.mknod(ROOT, b"null", stat.S_IFCHR | 0o600, 0x103)
    session.setxattr(node, b"trusted.x", b"1")
    share.chmod(0o777)
    assert refusal(session.mknod, ROOT, b"null2", stat.S_IFCHR | 0o600, 0x103, who=ALICE) == errno.EPERM
    assert refusal(session.open, node, who=NOBODY) == errno.EACCES


@pytest.fixture
def sysctls(tmp_path: Path) -> Iterator[Session]:
    """A session on /proc/sys/net of a network namespace of the engine's own, whose values are nobody else's."""
    rules = everything_below("/proc")
    with (
        EngineProcess(tmp_path / "area", rules=rules, within=("unshare", "--net")).running() as engine,
        Session(engine.address, "/proc/sys/net") as session,
    ):
        yield session


@pytest.mark.root
def test_sysctls_are_roots(sysctls: Session) -> None:
    """Their permissions go by the effective uid, not by that of file systems."""
    forward = sysctls.walk("ipv4/ip_forward").node
    for who in (ALICE, Who(1001, 0), Who(1001, 2001, (0,))):
        assert refusal(sysctls.open, forward, os.O_WRONLY, who=who) == errno.EACCES
        sysctls.release(sysctls.open(forward, who=who).handle)
    assert refusal(sysctls.access, forward, os.W_OK, who=ALICE) == errno.EACCES
    assert refusal(sysctls.open, sysctls.walk("ipv4/tcp_fastopen_key").node, who=ALICE) == errno.EACCES
    handle = sysctls.open(forward, os.O_WRONLY).handle
    assert sysctls.write(handle, 0, b"1") == 1, "the next request is root's again"
    sysctls.release(handle)


@pytest.mark.parametrize("who", [Who(0xFFFFFFFF, 2001), Who(1001, 0xFFFFFFFF)])
def test_the_number_that_is_no_id_is_nobodys(session: Session, open_share: Path, who: Who) -> None:
    """setresuid(2) takes it for: as before."""
    assert refusal(session.mkdir, ROOT, b"d", who=who) == errno.EINVAL
    assert os.listdir(open_share) == []


def test_trusted_attributes_are_for_root(session: Session, share: Path) -> None:
    (share / "f").touch()
    os.chown(share / "f", 1001, 2001)
    os.setxattr(share / "f", "trusted.x", b"1")
    os.setxattr(share / "f", "user.x", b"1")
    node = session.lookup(ROOT, b"f").node
    assert session.listxattr(node, who=ALICE) == b"user.x\0"
    assert session.listxattr(node, 0, who=ALICE) == struct.pack("<Q", 7)
    assert refusal(session.getxattr, node, b"trusted.x", who=ALICE) == errno.ENODATA
    assert refusal(session.setxattr, node, b"trusted.x", b"2", who=ALICE) == errno.EPERM
    assert refusal(session.removexattr, node, b"trusted.x", who=ALICE) == errno.EPERM
    assert session.getxattr(node, b"trusted.x") == b"1"


def test_a_file_may_be_executed_without_being_readable(session: Session, share: Path) -> None:
    for_execution = 0x20
    (share / "tool").write_text("#!")
    (share / "tool").chmod(0o711)
    node = session.lookup(ROOT, b"tool").node
    assert refusal(session.open, node, who=ALICE) == errno.EACCES
    opened = session.open(node, os.O_RDONLY | for_execution, who=ALICE)
    assert session.read(opened.handle, 0, 2, who=ALICE) == b"#!"
    session.release(opened.handle)
    session.release(session.open(node, os.O_RDONLY | os.O_TRUNC | for_execution, who=ALICE).handle)
    assert (share / "tool").read_text() == "#!", "no kernel asks that"
    (share / "tool").chmod(0o644)
    assert refusal(session.open, node, os.O_RDONLY | for_execution, who=ALICE) == errno.EACCES
    assert refusal(session.open, node, os.O_RDWR | for_execution, who=ALICE) == errno.EACCES


def test_a_handle_keeps_what_it_was_opened_with(session: Session, share: Path) -> None:
    """As with a descriptor: permissions are checked when it is opened."""
    (share / "f").write_text("text")
    os.chown(share / "f", 1001, 2001)
    node = session.lookup(ROOT, b"f").node
    opened = session.open(node, os.O_RDWR, who=ALICE)
    (share / "f").chmod(0)
    os.chown(share / "f", 0, 0)
    assert session.read(opened.handle, 0, 4, who=ALICE) == b"text"
    assert session.write(opened.handle, 0, b"T", who=ALICE) == 1
    assert session.setattr(node, size=2, handle=opened.handle, who=ALICE).size == 2
    assert refusal(session.setattr, node, size=1, who=ALICE) == errno.EACCES
    session.release(opened.handle)


# ---- suid, sgid, capabilities


@pytest.fixture
def suid(share: Path) -> Path:
    path = share / "suid"
    path.write_bytes(b"x" * 100)
    os.chown(path, 1001, 2001)
    path.chmod(0o6777)
    return path


def test_a_users_write_takes_suid_and_sgid_away(session: Session, suid: Path) -> None:
    opened = session.open(session.lookup(ROOT, b"suid").node, os.O_RDWR, who=BOB)
    session.write(opened.handle, 0, b"y", who=BOB)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777
    session.release(opened.handle)


def test_a_users_truncation_takes_them_away(session: Session, suid: Path) -> None:
    session.setattr(session.lookup(ROOT, b"suid").node, size=1, who=BOB)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777


def test_a_users_truncating_open_takes_them_away(session: Session, suid: Path) -> None:
    node = session.lookup(ROOT, b"suid").node
    session.release(session.open(node, os.O_RDWR | os.O_TRUNC, who=BOB).handle)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777


def test_roots_write_keeps_them_unless_the_client_says_otherwise(session: Session, suid: Path) -> None:
    node = session.lookup(ROOT, b"suid").node
    opened = session.open(node, os.O_RDWR)
    session.write(opened.handle, 0, b"y")
    session.setattr(node, size=50)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o6777
    session.write(opened.handle, 0, b"y", KILL)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777
    suid.chmod(0o6777)
    session.setattr(node, size=49, more=SET_KILL_PRIVILEGES)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777
    suid.chmod(0o6777)
    session.release(session.open(node, os.O_RDWR | os.O_TRUNC, KILL).handle)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777
    after = session.setattr(node, mode=0o2755).mode
    assert after & stat.S_ISGID, "the next request has all capabilities again"
    session.release(opened.handle)


def test_a_change_of_owner_takes_them_away(session: Session, suid: Path) -> None:
    session.setattr(session.lookup(ROOT, b"suid").node, gid=7, who=Who(0, 0))
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777


def test_a_change_of_nothing_is_a_chown_without_owners(session: Session, suid: Path) -> None:
    """Kernels also send it before a write of somebody else, which it must not fail."""
    node = session.lookup(ROOT, b"suid").node
    assert session.setattr(node, who=BOB).mode == stat.S_IFREG | 0o6777
    os.utime(suid, (1, 1))
    assert session.setattr(node, who=ALICE).mode == stat.S_IFREG | 0o777
    assert suid.stat().st_mtime == 1


def test_a_chmod_by_who_is_not_in_the_group_drops_sgid(session: Session, suid: Path) -> None:
    os.chown(suid, 1001, 9999)
    node = session.lookup(ROOT, b"suid").node
    assert session.setattr(node, mode=0o2755, who=ALICE).mode == stat.S_IFREG | 0o755
    assert session.setattr(node, mode=0o2755, who=Who(1001, 2001, (9999,))).mode == stat.S_IFREG | 0o2755


def test_a_copy_on_the_server_takes_them_away(session: Session, suid: Path) -> None:
    node = session.lookup(ROOT, b"suid").node
    source, target = session.open(node, who=BOB), session.open(node, os.O_RDWR, who=BOB)
    session.copy(source.handle, 0, target.handle, 50, 10, who=BOB)
    assert stat.S_IMODE(suid.stat().st_mode) == 0o777
    session.release(source.handle)
    session.release(target.handle)


def test_a_write_takes_file_capabilities_away(session: Session, suid: Path) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    os.setxattr(suid, "security.capability", capability)
    opened = session.open(session.lookup(ROOT, b"suid").node, os.O_RDWR)
    session.write(opened.handle, 0, b"y")
    assert "security.capability" not in os.listxattr(suid)
    session.release(opened.handle)
