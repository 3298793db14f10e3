"""How mount.qtfs fails: the exit status of mount(8), one line that names the cause, nothing left behind."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import MOUNT, daemons, mount, mounted, mounts_at, run
from harness.engine_process import EngineProcess

from qtfs_common.protocol import OPERATIONS, REPLY, VERSION

USAGE, FAILURE = 1, 32
_HEADER = struct.Struct("<IHHiIQQ")
_WELCOME = struct.Struct("<HHIII32s")

Answer = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def _nothing_mounted(point: Path) -> Iterator[None]:
    yield
    assert not mounts_at(point)
    assert not daemons(point)


# ------------------------------------------------------------------------------------------------------ nobody there


def test_no_socket_at_that_path(point: Path, tmp_path: Path) -> None:
    mount("/srv", point, f"server=unix://{tmp_path}/none").refused(FAILURE, r"none", "cannot connect", "No such file")


def test_nobody_listens_on_that_port(point: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        mount("/srv", point, f"server=tcp://127.0.0.1:{port}").refused(FAILURE, f"127.0.0.1:{port}", "refused")


def test_a_name_that_nobody_knows(point: Path) -> None:
    mount("/srv", point, "server=tcp://host.invalid:12345,timeout=5").refused(FAILURE, "host.invalid")


def test_no_vsock_peer(point: Path) -> None:
    mount("/srv", point, "server=vsock://77:12345,timeout=2").refused(FAILURE, "vsock://77:12345", "cannot connect")


# ------------------------------------------------------------------------------------------------ somebody else there


@contextlib.contextmanager
def answering(path: Path, answer: Answer) -> Iterator[str]:
    """Somebody listens at a path and treats the first connection so."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(20)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"server=unix://{path}"
        thread.join()


def _welcome(version: int) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        body = _WELCOME.pack(version, 0, 0, 1 << 20, 16, bytes(32))
        header = _HEADER.pack(_HEADER.size + len(body), OPERATIONS["HELLO"], REPLY, 0, 0, 0, 0)
        connection.sendall(header + body)
        connection.recv(1)

    return answer


def _refuse_version(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(_HEADER.pack(_HEADER.size, OPERATIONS["HELLO"], REPLY, 93, 0, 0, 0))  # EPROTONOSUPPORT
    connection.recv(1)


def test_an_engine_of_another_version(point: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "other", _welcome(VERSION + 1)) as server:
        mount("/srv", point, server).refused(FAILURE, "version mismatch", str(VERSION), str(VERSION + 1))


def test_an_engine_that_does_not_know_our_version(point: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "old", _refuse_version) as server:
        mount("/srv", point, server).refused(FAILURE, "version mismatch", str(VERSION))


def test_a_server_of_something_else(point: Path, tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"220 mail.example.org ESMTP; say EHLO and be brief please\r\n")
        connection.recv(1)

    with answering(tmp_path / "mail", answer) as server:
        mount("/srv", point, server).refused(FAILURE, "no qtfs engine")


def test_a_server_that_hangs_up(point: Path, tmp_path: Path) -> None:
    with answering(tmp_path / "curt", lambda connection: None) as server:
        mount("/srv", point, server).refused(FAILURE, "curt", "broke|closed|reset")


def test_a_server_that_says_nothing(point: Path, tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        while connection.recv(4096):
            pass

    with answering(tmp_path / "mute", answer) as server:
        mount("/srv", point, f"{server},timeout=1").refused(FAILURE, "does not answer")


# --------------------------------------------------------------------------------------------------------- the source


def test_the_whitelist_forbids_it(point: Path, server: str) -> None:
    mount("/etc", point, server).refused(FAILURE, "/etc", "whitelist")


def test_the_whitelist_says_nothing_about_what_exists(point: Path, server: str) -> None:
    """Whoever may not mount must not learn whether there is something."""
    there = mount("/etc", point, server)
    absent = mount("/etc-that-does-not-exist", point, server)
    assert there.stderr == absent.stderr.replace("-that-does-not-exist", "")


@pytest.mark.parametrize("inside", ["", "passwd", "does-not-exist", "passwd/below"])
def test_nor_through_a_symbolic_link(point: Path, server: str, served: EngineProcess, inside: str) -> None:
    with contextlib.suppress(FileExistsError):
        (served.share / "link").symlink_to("/etc")
    mount(served.share / "link" / inside, point, server).refused(FAILURE, "whitelist")


def test_no_such_directory_on_the_server(point: Path, server: str, served: EngineProcess) -> None:
    mount(served.share / "absent", point, server).refused(FAILURE, "absent", "no such directory")


def test_not_a_directory_on_the_server(point: Path, server: str, served: EngineProcess) -> None:
    (served.share / "file").touch()
    mount(served.share / "file", point, server).refused(FAILURE, "file", "not a directory")


def test_the_source_is_relative(point: Path, server: str) -> None:
    mount("share", point, server).refused(USAGE, "share", "absolute")


def test_the_source_climbs(point: Path, server: str) -> None:
    mount("/srv/../etc", point, server).refused(USAGE, r"\.\.")


# ---------------------------------------------------------------------------------------------------- the mount point


def test_no_mount_point(tmp_path: Path, point: Path, server: str, served: EngineProcess) -> None:
    mount(served.share, tmp_path / "absent", server).refused(FAILURE, "mount point", "absent", "No such file")


def test_the_mount_point_is_a_file(tmp_path: Path, point: Path, server: str, served: EngineProcess) -> None:
    (tmp_path / "file").touch()
    mount(served.share, tmp_path / "file", server).refused(FAILURE, "mount point", "file", "not a directory")


def test_the_mount_point_is_busy(point: Path, server: str, served: EngineProcess) -> None:
    with mounted(served.share, point, server):
        mount(served.share, point, server).refused(FAILURE, "mount point", point.name, "busy")
        assert len(mounts_at(point)) == 1
        assert len(daemons(point)) == 1


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("speed=high", "unknown option 'speed=high'"),
        ("fast", "unknown option 'fast'"),
        ("cache=some", "cache.*'some'.*none, auto, always"),
        ("driver=fuse4", "driver.*'fuse4'"),
        ("timeout=soon", "timeout.*soon"),
        ("timeout=-1", "timeout.*-1"),
        ("max_read=12", "max_read.*12"),
        ("log_level=loud", "log_level"),
        ("cache", "'cache' needs a value"),
        ("ro=1", "'ro' takes no value"),
        ("server=carrier-pigeon://1", "carrier-pigeon"),
        ("server=tcp://127.0.0.1:99999", "99999"),
        ("server=vsock://self:1", "self"),
        ("server=unix://relative", "relative"),
        ('context="open', "quote"),
        ("remount", "remount"),
        ("config=/nonexistent/client.toml", "/nonexistent/client.toml"),
    ],
)
def test_options_that_make_no_sense(point: Path, server: str, served: EngineProcess, options: str, cause: str) -> None:
    mount(served.share, point, f"{server},{options}").refused(USAGE, "mount.qtfs: ", cause)


def test_no_server_is_named(point: Path, tmp_path: Path) -> None:
    (tmp_path / "client.toml").touch()
    mount("/srv", point, f"config={tmp_path}/client.toml").refused(USAGE, "no server given", "-o server=")


@pytest.mark.parametrize(
    ("text", "line"), [("cache = 'auto'\nserver = 7\n", ":2"), ("driver = 'x'", ":1"), ("x = [", ":1"), ("y = 1", ":1")]
)
def test_a_mistake_in_the_configuration(point: Path, tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "client.toml"
    path.write_text(text)
    mount("/srv", point, f"config={path}").refused(USAGE, f"{path}{line}: ")


def test_a_mistake_in_the_special_rules(point: Path, tmp_path: Path, server: str, served: EngineProcess) -> None:
    path = tmp_path / "special.toml"
    path.write_text('\n[[rule]]\npath = "srv"\naction = "hide"\n')
    options = f"{server},special_rules={path}"
    mount(served.share, point, options).refused(USAGE, f"{path}:2: rule 1: path 'srv' is not absolute")
    path.unlink()
    mount(served.share, point, options).refused(USAGE, f"{path}: cannot read the rules: No such file")


@pytest.mark.parametrize("words", [(), ("/srv",), ("/srv", "/mnt", "/more"), ("/srv", "/mnt", "-q")])
def test_wrong_number_of_arguments(point: Path, words: tuple[str, ...]) -> None:
    run(MOUNT, *words).refused(USAGE, "usage: mount.qtfs SOURCE DIR")


def test_another_file_system_type(point: Path, server: str, served: EngineProcess) -> None:
    mount(served.share, point, server, "-t", "nfs").refused(USAGE, "'nfs' is not qtfs")


def test_a_namespace_that_is_none(point: Path, server: str, served: EngineProcess) -> None:
    mount(served.share, point, server, "-N", "/dev/null").refused(FAILURE, "namespace", "/dev/null")


def test_no_fuse_device(point: Path, server: str, served: EngineProcess) -> None:
    """The engine is reached, the mount fails, and the session does not stay behind."""
    script = 'mount --bind /dev/null /dev/fuse && exec "$@"'
    words = ("unshare", "-m", "sh", "-c", script, "sh", MOUNT, served.share, point, "-o", server)
    run(*words).refused(FAILURE, "fuse")


def test_help_and_version() -> None:
    usage = run(MOUNT, "--help").check()
    assert "SOURCE DIR" in usage.stdout and not usage.stderr
    version = run(MOUNT, "--version").check()
    assert version.stdout.startswith("mount.qtfs ") and not version.stderr


def test_the_environment_does_not_choose_our_code(point: Path, tmp_path: Path) -> None:
    """mount(8) runs the helper with whatever its user has set, in whatever directory."""
    for name in ("qtfs_common", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    outcome = run(MOUNT, "--version", cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONHOME=str(tmp_path))
    assert outcome.check().stderr == ""
