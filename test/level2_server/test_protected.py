"""What no whitelist above it opens: dangerous pseudo files, paths of special.toml, links to the engine itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, Rules, everything_below
from harness.session import Session
from harness.wire import ROOT

from qtfs_client.connection import HandshakeError
from qtfs_common.pathtree import components
from qtfs_common.whitelist import Type
from qtfs_server import protected

PSEUDO = ("/proc", "/sys")


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno is not None
    return caught.value.errno


def everything_on(*paths: object) -> Rules:
    found = everything_below("/nowhere")
    return {kind: [str(path) for path in paths] for kind in found}


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine whose rules the tests change."""
    with EngineProcess(tmp_path_factory.mktemp("protected")).running() as engine:
        yield engine
        engine.expect_log("the whitelist stays as it was")


@contextlib.contextmanager
def mounted(point: Path, *command: str) -> Iterator[None]:
    """A mount made by mount(8), taken away at the end."""
    point.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *command, str(point)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount {command}: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def names(session: Session, node: int) -> set[str]:
    handle = session.opendir(node)
    found = {os.fsdecode(entry.name) for entry in session.entries(handle)}
    session.release(handle)
    return found


# ---- protections


def matches(top: str, pattern: bytes) -> list[str]:
    """Files of this machine that a protected path names, of ours where it names a process."""
    mine = {b"[pid]": str(os.getpid())}
    path = os.path.join(top, *(mine.get(name, os.fsdecode(name)) for name in components(pattern)))
    return [path] if os.path.lexists(path) else []


PROTECTED = [
    (level, path)
    for f_type, top in ((protected.PROC, "/proc"), (0x62656572, "/sys"))
    for level, patterns in protected.PROTECTED[f_type].items()
    for pattern in patterns
    for path in matches(top, pattern)
]


def test_there_is_something_to_protect_here() -> None:
    paths = {path for _, path in PROTECTED}
    assert "/proc/sys/kernel/core_pattern" in paths
    assert f"/proc/{os.getpid()}/mem" in paths


@pytest.mark.root
@pytest.mark.parametrize(("level", "path"), PROTECTED, ids=[p.replace(str(os.getpid()), "PID") for _, p in PROTECTED])
def test_a_line_above_does_not_open_what_is_protected(ruled: EngineProcess, level: str, path: str) -> None:
    top = "/" + path.split("/")[1]
    ruled.reload(everything_on(*PSEUDO))
    with Session(ruled.address, top) as session:
        below = path[len(top) + 1 :]
        above = os.path.dirname(below)
        directory = session.walk(above).node if above else ROOT
        name = os.path.basename(path).encode()
        if level == protected.HIDDEN:
            assert refusal(session.lookup, directory, name) == errno.ENOENT
            assert os.path.basename(path) not in names(session, directory)
            assert refusal(session.unlink, directory, name) == errno.ENOENT
            assert refusal(session.create, directory, name) == errno.EACCES
            assert refusal(session.symlink, directory, name, b"x") in (errno.EACCES, errno.ENOENT)
            return
        node = session.lookup(directory, name).node
        assert os.path.basename(path) in names(session, directory)
        assert refusal(session.setattr, node, mode=0o777) == errno.EROFS
        assert refusal(session.setattr, node, size=0) == errno.EROFS
        if not os.path.isdir(path):
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
                assert refusal(session.open, node, flags) == errno.EROFS


@pytest.mark.root
def test_a_line_of_the_whitelist_opens_for_its_type(ruled: EngineProcess) -> None:
    file = "/proc/sys/kernel/randomize_va_space"
    value = Path(file).read_bytes()
    with contextlib.ExitStack() as stack:
        ruled.reload({**everything_on("/proc"), Type.WRITE: ["/proc", file]})
        session = stack.enter_context(Session(ruled.address, "/proc"))
        node = session.walk("sys/kernel/randomize_va_space").node
        handle = session.open(node, os.O_WRONLY).handle
        assert session.write(handle, 0, value) == len(value)
        assert refusal(session.setattr, node, mode=0o600) == errno.EACCES
        # After a reload the same holds for what is open.
        ruled.reload({**everything_on("/proc"), Type.READ: ["/proc", file]})
        assert refusal(session.write, handle, 0, value) == errno.EROFS
        assert refusal(session.open, node, os.O_WRONLY) == errno.EROFS
        ruled.reload({**everything_on("/proc"), Type.WRITE: ["/proc", "/proc/sys/kernel"]})
        assert refusal(session.write, handle, 0, value) == errno.EROFS
        ruled.reload({**everything_on("/proc"), Type.WRITE: ["/proc", file]})
        assert session.write(handle, 0, value) == len(value)


@pytest.mark.root
def test_a_hidden_file_is_shown_where_the_whitelist_names_it(ruled: EngineProcess) -> None:
    file = f"/proc/{os.getpid()}/mem"
    marker = ctypes.create_string_buffer(b"qtfs marker")
    ruled.reload({**everything_on("/proc"), Type.OPEN: ["/proc", file], Type.READ: ["/proc", file]})
    with Session(ruled.address, "/proc") as session:
        directory = session.lookup(ROOT, str(os.getpid()).encode()).node
        node = session.lookup(directory, b"mem").node
        assert "mem" in names(session, directory)
        handle = session.open(node).handle
        assert session.read(handle, ctypes.addressof(marker), 11) == b"qtfs marker"
        assert refusal(session.open, node, os.O_RDWR) == errno.EROFS
        ruled.reload(everything_on("/proc"))
        assert refusal(session.read, handle, 0, 4) == errno.ENOENT
        assert refusal(session.lookup, directory, b"mem") == errno.ENOENT


@pytest.mark.root
def test_a_rule_opens_what_wildcards_protect(ruled: EngineProcess) -> None:
    ruled.reload(everything_on("/proc"), '[[rule]]\npath = "/proc/[pid]/mem"\naction = "remote"\n')
    with Session(ruled.address, "/proc") as session:
        session.walk(f"{os.getpid()}/mem")
        assert refusal(session.walk, f"{os.getpid()}/task/{os.getpid()}/mem") == errno.ENOENT
        ruled.reload(everything_on("/proc"), "")
        assert refusal(session.walk, f"{os.getpid()}/mem") == errno.ENOENT


@pytest.mark.root
def test_another_mount_of_procfs_is_no_way_round(ruled: EngineProcess, share: Path) -> None:
    """As below a container's root that is exported; whole, and a part of it, which the kernel calls by another path."""
    with (
        mounted(share / "proc", "-t", "proc", "proc"),
        mounted(share / "part", "--bind", "/proc/sys"),
        mounted(share / "process", "--bind", f"/proc/{os.getpid()}"),
    ):
        ruled.reload(everything_below(share))
        with Session(ruled.address, share) as session:
            for path in ("proc/sys/kernel/core_pattern", "proc/bus/input/devices", "part/kernel/core_pattern"):
                node = session.walk(path).node
                assert refusal(session.open, node, os.O_WRONLY) == errno.EROFS, path
                ruled.reload(everything_below(share))
                assert refusal(session.open, node, os.O_WRONLY) == errno.EROFS, path
            for path in ("proc/kmsg", f"proc/{os.getpid()}/mem", "process/mem"):
                assert refusal(session.walk, path) == errno.ENOENT, path
            assert "kmsg" not in names(session, session.walk("proc").node)
        for source in ("proc", "part"):
            with Session(ruled.address, share / source) as session:
                path = "sys/kernel/core_pattern" if source == "proc" else "kernel/core_pattern"
                assert refusal(session.open, session.walk(path).node, os.O_WRONLY) == errno.EROFS


@pytest.mark.root
def test_a_mount_in_the_middle_of_procfs_is_protected(ruled: EngineProcess) -> None:
    ruled.reload(everything_on("/proc"))
    with Session(ruled.address, "/proc/sys/kernel") as session:
        node = session.lookup(ROOT, b"core_pattern").node
        assert refusal(session.open, node, os.O_WRONLY) == errno.EROFS
    with Session(ruled.address, f"/proc/{os.getpid()}") as session:
        assert refusal(session.lookup, ROOT, b"mem") == errno.ENOENT
    with Session(ruled.address, "/proc/bus") as session:
        assert refusal(session.setattr, ROOT, mode=0o700) == errno.EROFS


@pytest.mark.root
@pytest.mark.parametrize("kind", ["debugfs", "tracefs", "securityfs", "efivarfs", "binfmt_misc"])
def test_whole_file_systems_are_read_only(ruled: EngineProcess, share: Path, kind: str) -> None:
    with mounted(share / "there", "-t", kind, kind):
        ruled.reload(everything_below(share))
        with Session(ruled.address, share) as session:
            node = session.lookup(ROOT, b"there").node
            assert refusal(session.mkdir, node, b"made") == errno.EROFS
            assert refusal(session.setattr, node, mode=0o700) == errno.EROFS
            assert names(session, node) >= {".", ".."}
        ruled.reload({**everything_below(share), Type.SETATTR: [share, share / "there"]})
        with Session(ruled.address, share) as session:
            node = session.lookup(ROOT, b"there").node
            session.setattr(node, mode=os.stat(share / "there").st_mode & 0o7777)
            assert refusal(session.mkdir, node, b"made") == errno.EACCES


@pytest.mark.root
def test_protections_outlive_descriptors(tmp_path: Path) -> None:
    """Nodes that were put aside and opened again are protected as before."""
    rules = everything_on("/proc")
    limited = EngineProcess(tmp_path, rules=rules, limits=("--nofile=160:160",))
    with limited.running() as engine, Session(engine.address, "/proc") as session:
        protected_node = session.walk("sys/kernel/core_pattern").node
        directory = session.walk(str(os.getpid())).node
        others = [
            session.walk(f"sys/{part}/{name}").node
            for part in ("kernel", "vm")
            for name in sorted(os.listdir(f"/proc/sys/{part}"))
        ]
        assert len(others) > 130 and engine.descriptors() < 160
        for _ in range(2):
            assert refusal(session.open, protected_node, os.O_WRONLY) == errno.EROFS
            assert refusal(session.lookup, directory, b"mem") == errno.ENOENT
            engine.reload(rules)


@pytest.mark.root
def test_the_release_agent_of_cgroups_is_read_only(ruled: EngineProcess, share: Path) -> None:
    with mounted(share / "cgroup", "-t", "cgroup", "-o", "none,name=qtfs-test", "cgroup"):
        (share / "cgroup/made").mkdir()
        try:
            ruled.reload(everything_below(share))
            with Session(ruled.address, share / "cgroup") as session:
                node = session.lookup(ROOT, b"release_agent").node
                assert refusal(session.open, node, os.O_WRONLY) == errno.EROFS
                tasks = session.open(session.walk("made/cgroup.procs").node, os.O_WRONLY).handle
                with subprocess.Popen(["sleep", "60"]) as process:
                    text = f"{process.pid}".encode()
                    assert session.write(tasks, 0, text) == len(text)
                    assert "qtfs-test:/made" in Path(f"/proc/{process.pid}/cgroup").read_text()
                    process.kill()
        finally:
            (share / "cgroup/made").rmdir()


@pytest.mark.root
@pytest.mark.parametrize("zero", [b"0", b"0\xa0", b"\xa00", b"0 \0x"])
def test_zero_does_not_move_the_engine(ruled: EngineProcess, share: Path, zero: bytes) -> None:
    with mounted(share / "cgroup", "-t", "cgroup", "-o", "none,name=qtfs-test", "cgroup"):
        (share / "cgroup/made").mkdir()
        try:
            ruled.reload(everything_below(share))
            with Session(ruled.address, share / "cgroup") as session:
                for name in ("cgroup.procs", "tasks"):
                    opened = session.open(session.walk(f"made/{name}").node, os.O_WRONLY)
                    assert refusal(session.write, opened.handle, 0, zero) == errno.ESRCH
                    session.release(opened.handle)
            assert (share / "cgroup/made/tasks").read_text() == ""
        finally:
            for pid in (share / "cgroup/made/tasks").read_text().split():
                (share / "cgroup/tasks").write_text(pid)
            (share / "cgroup/made").rmdir()


@pytest.mark.root
def test_zero_does_not_move_the_engine_however_deep(ruled: EngineProcess, share: Path) -> None:
    """Where the kernel does not tell the path of a descriptor any more."""
    with mounted(share / "cgroup", "-t", "cgroup", "-o", "none,name=qtfs-test", "cgroup"):
        ruled.reload(everything_below(share))
        with Session(ruled.address, share / "cgroup") as session:
            nodes, name = [ROOT], b"d" * 250
            try:
                for _ in range(17):
                    nodes.append(session.mkdir(nodes[-1], name).node)
                opened = session.open(session.lookup(nodes[-1], b"cgroup.procs").node, os.O_RDWR)
                assert refusal(session.write, opened.handle, 0, b"0") == errno.ESRCH
                assert session.read(opened.handle, 0, 100) == b""
                session.release(opened.handle)
            finally:
                (share / "cgroup/cgroup.procs").write_text(str(ruled.pid))
                for node in reversed(nodes[:-1]):
                    session.rmdir(node, name)


# ---- links


@pytest.mark.root
def test_links_to_ourselves_are_not_the_engines(ruled: EngineProcess) -> None:
    ruled.reload(everything_on("/proc"))
    with Session(ruled.address, "/proc") as session:
        names = (b"self", b"thread-self", b"mounts", b"net")
        found = {name: session.readlink(session.lookup(ROOT, name).node) for name in names}
    assert found == {
        b"self": b"/proc/self",
        b"thread-self": b"/proc/thread-self",
        b"mounts": b"1/mounts",
        b"net": b"1/net",
    }


@pytest.mark.root
def test_magic_links_are_read_and_never_followed(ruled: EngineProcess) -> None:
    """Each of a process's links, and whatever a client might do with the node of one instead of reading it."""
    ruled.reload(everything_on("/proc", "/sys"))
    links = [b"root", b"cwd", b"exe", b"ns/net", b"ns/mnt", b"fd/0", b"fd/1"]
    with Session(ruled.address, "/proc") as session, subprocess.Popen(["sleep", "60"]) as process:
        for name in links:
            path = f"{process.pid}/{name.decode()}"
            found = session.walk(path)
            assert os.path.islink(f"/proc/{path}") and found.attr.mode & 0o170000 == 0o120000
            assert session.readlink(found.node) == os.readlink(os.fsencode(f"/proc/{path}"))
            assert refusal(session.lookup, found.node, b"etc") == errno.ENOTDIR
            assert refusal(session.opendir, found.node) == errno.ENOTDIR
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_PATH, os.O_DIRECTORY):
                assert refusal(session.open, found.node, flags) == errno.ELOOP
            assert refusal(session.create, found.node, b"made") in (errno.ENOTDIR, errno.EACCES)
            assert refusal(session.setattr, found.node, size=0) in (errno.EINVAL, errno.EPERM, errno.ELOOP)
            assert refusal(session.setattr, found.node, mode=0o777) == errno.EOPNOTSUPP
            assert refusal(session.rename, found.node, b"a", found.node, b"b") in (errno.ENOTDIR, errno.EACCES)
        process.kill()


@pytest.mark.root
@pytest.mark.parametrize("path", ["root", "root/proc", "cwd"])
def test_magic_links_are_not_followed_to_what_is_mounted(ruled: EngineProcess, path: str) -> None:
    """Behind one lies another mount namespace, whose /proc or /home is not the one that the whitelist names."""
    ruled.reload(everything_on("/"))
    with pytest.raises(HandshakeError):
        Session(ruled.address, f"/proc/{ruled.pid}/{path}")
    with Session(ruled.address, "/proc/self") as session:  # an ordinary link
        assert refusal(session.opendir, session.lookup(ROOT, b"cwd").node) == errno.ENOTDIR


# ---- special.toml


def rule(path: object, action: str) -> str:
    return f'[[rule]]\npath = "{path}"\naction = "{action}"\n'


@pytest.fixture
def tree(share: Path) -> Path:
    for name in ("a", "b"):
        (share / name / "deep").mkdir(parents=True)
        (share / name / "secret").write_text("secret")
        (share / name / "plain").write_text("plain")
    (share / "17").mkdir()
    (share / "17/secret").write_text("secret")
    return share


def test_hidden_names_are_not_there(ruled: EngineProcess, tree: Path) -> None:
    ruled.reload(everything_below(tree), rule(tree / "*/secret", "hide"))
    with Session(ruled.address, tree) as session:
        a, plain = session.lookup(ROOT, b"a").node, session.walk("a/plain").node
        assert names(session, a) == {".", "..", "plain", "deep"}
        handle = session.opendir(a)
        assert [e.name for e in session.entries(handle, size=200, plus=True) if e.name == b"secret"] == []
        for call in (
            lambda: session.lookup(a, b"secret"),
            lambda: session.unlink(a, b"secret"),
            lambda: session.rename(a, b"secret", ROOT, b"shown"),
            lambda: session.rename(a, b"plain", a, b"secret"),
            lambda: session.rename(a, b"plain", a, b"secret", 2),
        ):
            assert refusal(call) == errno.ENOENT
        for call in (
            lambda: session.create(a, b"secret", flags=os.O_RDWR),
            lambda: session.mkdir(a, b"secret"),
            lambda: session.link(plain, a, b"secret"),
            lambda: session.symlink(a, b"secret", b"x"),
        ):
            assert refusal(call) in (errno.EACCES, errno.ENOENT)
    assert (tree / "a/secret").read_text() == "secret" and (tree / "a/plain").read_text() == "plain"


def test_what_is_ruled_cannot_be_moved_from_its_rule(ruled: EngineProcess, tree: Path) -> None:
    """Neither the directories above it, nor others into their place."""
    ruled.reload(everything_below(tree), rule(tree / "a/deep/secret", "hide") + rule(tree / "b/secret", "readonly"))
    with Session(ruled.address, tree) as session:
        for old, new in ((b"a", b"c"), (b"b", b"c"), (b"17", b"a")):
            assert refusal(session.rename, ROOT, old, ROOT, new) in (errno.EACCES, errno.EROFS)
        a, b = session.lookup(ROOT, b"a").node, session.lookup(ROOT, b"b").node
        assert refusal(session.rename, a, b"deep", ROOT, b"deep") == errno.EACCES
        assert refusal(session.rmdir, a, b"deep") == errno.EACCES
        assert refusal(session.rename, b, b"secret", b, b"moved") == errno.EROFS
        session.rename(a, b"plain", a, b"moved")


def test_read_only_holds_for_all_below(ruled: EngineProcess, tree: Path) -> None:
    ruled.reload(everything_below(tree), rule(tree / "a", "readonly") + rule(tree / "a/deep", "remote"))
    with Session(ruled.address, tree) as session:
        a, plain = session.lookup(ROOT, b"a").node, session.walk("a/plain").node
        assert session.read(session.open(plain).handle, 0, 9) == b"plain"
        for call in (
            lambda: session.open(plain, os.O_WRONLY),
            lambda: session.setattr(plain, mode=0o600),
            lambda: session.setattr(plain, size=0),
            lambda: session.setxattr(plain, b"user.x", b"1"),
            lambda: session.create(a, b"made"),
            lambda: session.mkdir(a, b"made"),
            lambda: session.unlink(a, b"plain"),
            lambda: session.rename(a, b"plain", ROOT, b"moved"),
            lambda: session.link(plain, a, b"linked"),
            lambda: session.tmpfile(a),
        ):
            assert refusal(call) == errno.EROFS
        # A second name elsewhere would be a way round.
        assert refusal(session.link, plain, ROOT, b"linked") == errno.EACCES
        session.create(session.walk("a/deep").node, b"made")
    assert sorted(os.listdir(tree / "a")) == ["deep", "plain", "secret"]


def test_the_last_rule_of_a_path_wins(ruled: EngineProcess, tree: Path) -> None:
    ruled.reload(everything_below(tree), rule(tree / "[pid]", "hide") + rule(tree / "17", "remote"))
    with Session(ruled.address, tree) as session:
        session.lookup(ROOT, b"17")
        ruled.reload(everything_below(tree), rule(tree / "17", "remote") + rule(tree / "[pid]", "hide"))
        assert refusal(session.lookup, ROOT, b"17") == errno.ENOENT
        assert "17" not in names(session, ROOT) and "a" in names(session, ROOT)


def test_rules_hold_against_whitelist_lines(ruled: EngineProcess, tree: Path) -> None:
    """A line opens what is protected by default; what its administrator hides stays hidden."""
    both = {kind: [tree, tree / "a/secret"] for kind in everything_below(tree)}
    ruled.reload(both, rule(tree / "a/secret", "hide"))
    with Session(ruled.address, tree) as session:
        assert refusal(session.walk, "a/secret") == errno.ENOENT


def test_rules_hold_through_symbolic_links_in_their_path(ruled: EngineProcess, tree: Path) -> None:
    (tree / "link").symlink_to("a")
    ruled.reload(everything_below(tree), rule(tree / "link/secret", "hide"))
    with Session(ruled.address, tree) as session:
        assert refusal(session.walk, "a/secret") == errno.ENOENT


def test_a_bad_file_changes_nothing(ruled: EngineProcess, tree: Path) -> None:
    ruled.reload(everything_below(tree), rule(tree / "a", "hide"))
    with Session(ruled.address, tree) as session:
        ruled.reload(everything_below(tree), rule(tree / "a", "remove"))
        assert refusal(session.lookup, ROOT, b"a") == errno.ENOENT
    assert f"{ruled.special}:1: rule 1: unknown action 'remove'" in ruled.log()
