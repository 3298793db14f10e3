"""`engine` as a user starts it: both forms of the command line, what it says, signals, and every refusal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import ENGINE, MOUNT, Outcome, Word, as_nobody, mount, mounted, run
from harness.engine_process import everything_below, whitelist_text
from harness.leaks import environment, our_processes
from harness.waiting import wait_for_text, wait_until

from qtfs_common.whitelist import Type

READY = "qtfs engine: listening on "


class Running:
    """An engine that somebody else waits for: what it writes, and how it ends."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, errors: Path) -> None:
        self.process = process
        self._output, self._errors = output, errors

    @property
    def stdout(self) -> str:
        return self._output.read_text()

    @property
    def stderr(self) -> str:
        return self._errors.read_text()

    def addresses(self) -> list[str]:
        """Of the ready line, once it is there."""
        wait_until(lambda: "\n" in self.stdout or self.process.poll() is not None, "the engine's ready line", 20)
        assert self.stdout.startswith(READY), self.stderr
        return self.stdout.splitlines()[0].removeprefix(READY).split(", ")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


Start = Callable[..., Running]


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path


@pytest.fixture
def rules(tmp_path: Path, share: Path) -> Path:
    path = tmp_path / "whitelist"
    path.write_text(whitelist_text(everything_below(share)))
    return path


@pytest.fixture
def common(tmp_path: Path, rules: Path) -> tuple[Word, ...]:
    """Options that keep an engine of this test to itself."""
    return ("--whitelist", rules, "--run-dir", tmp_path / "run")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start engines; those that still run at the end are killed, none may have shown a traceback."""
    started: list[Running] = []

    def start_one(*words: Word, command: tuple[Word, ...] = (ENGINE,)) -> Running:
        output, errors = (tmp_path / f"engine{len(started)}.{kind}" for kind in ("out", "err"))
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [*command, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment(), cwd="/"
            )
        started.append(Running(process, output, errors))
        return started[-1]

    yield start_one
    for engine in started:
        engine.process.kill()
        engine.process.wait()
        assert "Traceback" not in engine.stderr, engine.stderr


def engine(*words: Word, timeout_s: float = 20) -> Outcome:
    """An engine that is expected to refuse."""
    return run(ENGINE, *words, timeout_s=timeout_s)


# -------------------------------------------------------------------------------------------------------- how it starts


def test_the_original_s_command_line(start: Start, common: tuple[Word, ...], share: Path, point: Path) -> None:
    """The six arguments word for word, with the data port beside them: 12345 may be taken on the tester's machine."""
    running = start("16", "1", "127.0.0.1", "12121", "127.0.0.1", "12121", "--port", "0", *common)
    (address,) = running.addresses()
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", address)
    (share / "file").write_text("content")
    with mounted(share, point, f"server={address}"):
        assert (point / "file").read_text() == "content"
    assert running.end() == 0


def test_the_original_s_data_port(start: Start, common: tuple[Word, ...]) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 12345))
        except OSError:
            pytest.skip("port 12345 is in use here")
    running = start(*common, "16", "1", "127.0.0.1", "12121", "127.0.0.1", "12121")
    assert running.addresses() == ["tcp://127.0.0.1:12345"]
    assert running.end() == 0


def test_the_modern_command_line(
    start: Start, common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path
) -> None:
    path = tmp_path / "sock"
    running = start("--workers", "2", "--listen", f"unix://{path}", "--listen", "tcp://127.0.0.1:0", *common)
    first, second = running.addresses()
    assert first == f"unix://{path}" and second.startswith("tcp://127.0.0.1:")
    assert path.stat().st_mode & 0o777 == 0o600
    for address in (first, second):
        with mounted(share, point, f"server={address}"):
            assert (point / ".").is_dir()
    assert running.end() == 0
    assert not path.exists()
    assert running.stdout.count("\n") == 1 and running.stderr == ""


def test_positional_and_listen_together(start: Start, common: tuple[Word, ...], tmp_path: Path) -> None:
    words = ("4", "1", "127.0.0.1", "12121", "127.0.0.1", "12121", "--port", "0", "--listen", f"unix://{tmp_path}/s")
    running = start(*words, *common)
    assert [address.partition(":")[0] for address in running.addresses()] == ["tcp", "unix"]
    assert running.end() == 0


def test_a_configuration_file(start: Start, rules: Path, tmp_path: Path) -> None:
    config = tmp_path / "engine.toml"
    config.write_text(
        f'listen = ["unix://{tmp_path}/configured"]\nworkers = 3\nwhitelist = "{rules}"\n'
        f'run_dir = "{tmp_path}/run"\nlog_level = "info"\n'
    )
    running = start("--config", config)
    assert running.addresses() == [f"unix://{tmp_path}/configured"]
    assert running.end() == 0
    overridden = start("--config", config, "--listen", f"unix://{tmp_path}/chosen")
    assert overridden.addresses() == [f"unix://{tmp_path}/chosen"]
    assert overridden.end() == 0


def test_pid_file(start: Start, common: tuple[Word, ...], tmp_path: Path) -> None:
    path = tmp_path / "pid"
    running = start("--listen", f"unix://{tmp_path}/s", "--pid-file", path, *common)
    running.addresses()
    assert int(path.read_text()) == running.process.pid
    assert running.end() == 0
    assert not path.exists()


def test_run_directory_from_the_environment(start: Start, rules: Path, tmp_path: Path) -> None:
    command = ("env", f"QTFS_RUN_DIR={tmp_path}/chosen", ENGINE)
    running = start("--listen", f"unix://{tmp_path}/s", "--whitelist", rules, command=command)
    running.addresses()
    assert any((tmp_path / "chosen").iterdir())
    assert running.end() == 0


def test_nohup_in_the_background(common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path) -> None:
    """As the original's documents start it: with nohup, from a shell that ends."""
    log = tmp_path / "nohup.log"
    words = " ".join(map(str, ("4", "1", "127.0.0.1", "12121", "127.0.0.1", "12121", "--port", "0", *common)))
    shell = run("sh", "-c", f"nohup {ENGINE} {words} >{log} 2>&1 & echo $!").check()
    pid = int(shell.stdout)
    try:
        wait_for_text(log.read_text, READY, 20)
        address = log.read_text().partition(READY)[2].strip()
        mount(share, point, f"server={address}").check()
        run("umount", point).check()
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(process.pid == pid for process in our_processes()), "the engine to end")


def test_as_an_ordinary_user(start: Start, tmp_path: Path) -> None:
    """Shares what that user may read; nothing of it needs root."""
    area = Path(f"/tmp/qtfs-nobody-{os.urandom(4).hex()}")
    area.mkdir(mode=0o700)
    os.chown(area, 65534, 65534)
    try:
        (area / "whitelist").write_text(whitelist_text(everything_below(area)))
        words = ("--listen", f"unix://{area}/s", "--whitelist", area / "whitelist", "--run-dir", area / "run")
        running = start(*words, command=tuple(as_nobody([ENGINE])))
        running.addresses()
        assert Path(f"/proc/{running.process.pid}").stat().st_uid == 65534
        assert running.end() == 0
    finally:
        shutil.rmtree(area)


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_end_it(start: Start, common: tuple[Word, ...], tmp_path: Path, number: signal.Signals) -> None:
    running = start("--listen", f"unix://{tmp_path}/s", *common)
    running.addresses()
    assert running.end(number) == 0
    assert running.stderr == ""


def test_sigterm_with_a_client(
    start: Start, common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path
) -> None:
    running = start("--listen", f"unix://{tmp_path}/s", *common)
    with mounted(share, point, f"server={running.addresses()[0]},timeout=1"):
        assert running.end() == 0
    assert "ERROR" not in running.stderr


def test_sighup_reads_the_whitelist_again(
    start: Start, rules: Path, common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path
) -> None:
    (share / "file").write_text("old")
    running = start("--listen", f"unix://{tmp_path}/s", "--log-level", "INFO", *common)
    with mounted(share, point, f"server={running.addresses()[0]},cache=none"):
        (point / "file").write_text("new")
        rules.write_text(whitelist_text({k: v for k, v in everything_below(share).items() if k is not Type.WRITE}))
        running.process.send_signal(signal.SIGHUP)
        wait_for_text(lambda: running.stderr, "read again")
        with pytest.raises(PermissionError):
            (point / "file").write_text("newer")
        assert (point / "file").read_text() == "new"
    assert running.end() == 0


def test_sighup_with_a_bad_whitelist_changes_nothing(
    start: Start, rules: Path, common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path
) -> None:
    running = start("--listen", f"unix://{tmp_path}/s", *common)
    with mounted(share, point, f"server={running.addresses()[0]}"):
        rules.write_text("[Mount]\nPath=/\n[Rid]\n")
        running.process.send_signal(signal.SIGHUP)
        wait_for_text(lambda: running.stderr, f"{rules}:3: ")
        (point / "file").write_text("still allowed")
    mount("/etc", point, f"server=unix://{tmp_path}/s").refused(32, "whitelist")
    assert running.end() == 0


def test_special_rules_are_read_at_start_and_on_sighup(
    start: Start, common: tuple[Word, ...], tmp_path: Path, share: Path, point: Path
) -> None:
    special = tmp_path / "special.toml"
    special.write_text(f'[[rule]]\npath = "{share}/file"\naction = "hide"\n')
    (share / "file").write_text("text")
    running = start("--listen", f"unix://{tmp_path}/s", "--special", special, "--log-level", "INFO", *common)
    with mounted(share, point, f"server={running.addresses()[0]},cache=none"):
        assert not (point / "file").exists()
        special.write_text("[[rule]]\n\n[[rule]]\n")
        running.process.send_signal(signal.SIGHUP)
        wait_for_text(lambda: running.stderr, f"stays as it was: {special}:1: rule 1: path is missing")
        assert not (point / "file").exists()
        special.write_text("")
        running.process.send_signal(signal.SIGHUP)
        wait_for_text(lambda: running.stderr, "read again")
        assert (point / "file").read_text() == "text"
    assert running.end() == 0


def test_special_rules_that_cannot_be_used(common: tuple[Word, ...], tmp_path: Path) -> None:
    special = tmp_path / "special.toml"
    words = ("--listen", f"unix://{tmp_path}/s", *common, "--special", special)
    engine(*words).refused(1, f"{special}: cannot read the rules: No such file")
    special.write_text('[[rule]]\npath = "/a"\naction = "shred"\n')
    engine(*words).refused(1, f"{special}:1: rule 1: unknown action 'shred'")


def test_a_socket_left_by_a_killed_engine(start: Start, common: tuple[Word, ...], tmp_path: Path) -> None:
    words = ("--listen", f"unix://{tmp_path}/s", *common)
    first = start(*words)
    first.addresses()
    first.process.kill()
    first.process.wait()
    assert (tmp_path / "s").exists()
    second = start(*words)
    assert second.addresses() == [f"unix://{tmp_path}/s"]
    assert second.end() == 0


# ------------------------------------------------------------------------------------------------------------- refusals


def test_two_engines_on_one_address(start: Start, common: tuple[Word, ...], tmp_path: Path) -> None:
    """The message names the process that is there; the first one does not notice."""
    words = ("--listen", f"unix://{tmp_path}/s", *common)
    first = start(*words)
    first.addresses()
    engine(*words).refused(1, str(first.process.pid), "already running")
    assert (tmp_path / "s").exists()
    assert first.end() == 0


@pytest.mark.parametrize("listen", ["unix://{}/s", "tcp://127.0.0.1:{}"])
def test_two_engines_with_different_run_directories(
    start: Start, rules: Path, tmp_path: Path, share: Path, point: Path, listen: str
) -> None:
    first = start("--listen", listen.format(tmp_path if "unix" in listen else 0), "--whitelist", rules,
                  "--run-dir", tmp_path / "run1")
    (address,) = first.addresses()
    second = engine("--listen", address, "--whitelist", rules, "--run-dir", tmp_path / "run2")
    second.refused(1, re.escape(address), "in use|listens")
    with mounted(share, point, f"server={address}"):
        (point / "file").touch()
    assert first.end() == 0


def test_a_port_in_use(common: tuple[Word, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        engine("--listen", f"tcp://127.0.0.1:{port}", *common).refused(1, f"127.0.0.1:{port}", "in use|listens")


def test_an_address_that_is_not_ours(common: tuple[Word, ...], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("ab" * 32)
    (tmp_path / "key").chmod(0o600)
    outcome = engine("--listen", "tcp://192.0.2.1:0", "--key-file", tmp_path / "key", *common)
    outcome.refused(1, "192.0.2.1", "assign|not.*address")


def test_tcp_for_everybody_needs_a_key(common: tuple[Word, ...]) -> None:
    engine("--listen", "tcp://0.0.0.0:0", *common).refused(1, "0.0.0.0", "--key-file")


def test_a_socket_path_that_is_a_file(common: tuple[Word, ...], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    engine("--listen", f"unix://{tmp_path}/precious", *common).refused(1, "precious")
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ((), "no address"),
        (("16", "1", "127.0.0.1"), "got 3 of"),
        (("16", "1", "127.0.0.1", "12121", "127.0.0.1", "12121", "7"), "got 7 of"),
        (("many", "1", "127.0.0.1", "12121", "127.0.0.1", "12121"), "WORKERS.*'many'"),
        (("0", "1", "127.0.0.1", "12121", "127.0.0.1", "12121"), "WORKERS.*'0'"),
        (("513", "1", "127.0.0.1", "12121", "127.0.0.1", "12121"), "WORKERS.*512"),
        (("16", "2", "127.0.0.1", "12121", "127.0.0.1", "12121"), "PROXY_THREADS.*'2'"),
        (("16", "1", "127.0.0.1", "80", "127.0.0.1", "12121"), "MY_PROXY_PORT.*'80'"),
        (("16", "1", "127.0.0.1", "12121", "127.0.0.1", "99999"), "PEER_PROXY_PORT.*'99999'"),
        (("--listen", "smoke://signal"), "smoke"),
        (("--listen", "unix://relative"), "relative"),
        (("--listen", "tcp://127.0.0.1:0", "--workers", "0"), r"workers.*\b0\b"),
        (("--listen", "tcp://127.0.0.1:0", "--workers", "many"), "workers.*'many'"),
        (("--listen", "tcp://127.0.0.1:0", "--log-level", "LOUD"), "LOUD"),
    ],
)
def test_command_lines_that_make_no_sense(common: tuple[Word, ...], words: tuple[str, ...], cause: str) -> None:
    outcome = engine(*words, *common)
    assert outcome.status in (1, 2)
    outcome.refused(outcome.status, "engine: ", cause)


@pytest.mark.parametrize("words", [("--listne", "x"), ("--port",)])
def test_unknown_options(words: tuple[str, ...]) -> None:
    outcome = engine(*words)
    assert outcome.status == 2 and "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("usage: engine ") and words[0] in outcome.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ whitelist


def test_no_whitelist(tmp_path: Path) -> None:
    outcome = engine("--listen", f"unix://{tmp_path}/s", "--whitelist", tmp_path / "absent", "--run-dir", tmp_path)
    outcome.refused(1, f"{tmp_path}/absent", "No such file")


def test_no_whitelist_at_the_usual_place(tmp_path: Path) -> None:
    """In a mount namespace with an empty /etc: the tester's machine may well have one."""
    words = ("--listen", f"unix://{tmp_path}/s", "--run-dir", tmp_path)
    script = 'mount -t tmpfs none /etc && exec "$@"'
    run("unshare", "-m", "sh", "-c", script, "sh", ENGINE, *words).refused(1, "/etc/qtfs/whitelist", "No such file")


def test_a_whitelist_that_cannot_be_read(tmp_path: Path) -> None:
    outcome = engine("--listen", f"unix://{tmp_path}/s", "--whitelist", tmp_path, "--run-dir", tmp_path)
    outcome.refused(1, str(tmp_path), "not a regular file|Is a directory")


def test_a_whitelist_of_somebody_else() -> None:
    area = Path(f"/tmp/qtfs-nobody-{os.urandom(4).hex()}")
    area.mkdir(mode=0o755)
    try:
        (area / "whitelist").touch(mode=0o600)
        words = [ENGINE, "--listen", "tcp://127.0.0.1:0", "--whitelist", area / "whitelist", "--run-dir", area]
        run(*as_nobody(words)).refused(1, f"{area}/whitelist", "Permission denied")
    finally:
        shutil.rmtree(area)


def test_a_whitelist_that_is_too_long(rules: Path, common: tuple[Word, ...], tmp_path: Path) -> None:
    rules.write_text("[Mount]\nPath=" + ";".join(f"/{number}/a/b/c" for number in range(20_000)) + "\n")
    engine("--listen", f"unix://{tmp_path}/s", *common).refused(1, f"{rules}: ", "too long")


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("[Mount]\nPath=/srv\n\n[Opne]\nPath=/\n", 4, "Opne"),
        ("Path=/srv\n", 1, "outside any group"),
        ("[Mount]\nPath=/srv\n[Open]\nFile=/x\n", 4, "File"),
        ("[Mount]\n# a comment\nPath=/srv;relative/path\n", 3, "relative/path"),
        ("[Mount]\nPath=/srv/../etc\n", 2, r"\.\."),
        ("[Mount\nPath=/\n", 1, "bracket"),
        ("[Mount]\n/srv\n", 2, "/srv"),
    ],
)
def test_a_bad_line_in_the_whitelist(
    rules: Path, common: tuple[Word, ...], tmp_path: Path, text: str, line: int, cause: str
) -> None:
    rules.write_text(text)
    engine("--listen", f"unix://{tmp_path}/s", *common).refused(1, f"{rules}:{line}: ", cause)
    assert not (tmp_path / "s").exists()


def test_nothing_may_be_mounted(rules: Path, common: tuple[Word, ...], tmp_path: Path) -> None:
    rules.write_text("[Open]\nPath=/\n")
    engine("--listen", f"unix://{tmp_path}/s", *common).refused(1, str(rules), r"\[Mount\]")


# ---------------------------------------------------------------------------------------------------------------- logs


def test_denials_are_logged_once(start: Start, common: tuple[Word, ...], tmp_path: Path, point: Path) -> None:
    running = start("--listen", f"unix://{tmp_path}/s", *common)
    running.addresses()
    for _ in range(3):
        mount("/etc", point, f"server=unix://{tmp_path}/s").refused(32, "whitelist")
    assert running.end() == 0
    assert running.stderr.count("[Mount]") == 1


def test_log_level_none(start: Start, common: tuple[Word, ...], tmp_path: Path, point: Path) -> None:
    running = start("--listen", f"unix://{tmp_path}/s", "--log-level", "NONE", *common)
    running.addresses()
    mount("/etc", point, f"server=unix://{tmp_path}/s").refused(32, "whitelist")
    assert running.end() == 0
    assert running.stderr == ""


def test_readiness_for_systemd(start: Start, common: tuple[Word, ...], tmp_path: Path) -> None:
    """READY=1 once clients can connect, STOPPING=1 at the end: sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        command = ("env", f"NOTIFY_SOCKET={tmp_path}/notify", ENGINE)
        running = start("--listen", f"unix://{tmp_path}/s", *common, command=command)
        assert b"READY=1" in notified.recv(4096)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
        assert running.end() == 0
        assert b"STOPPING=1" in notified.recv(4096)


def test_help_and_version() -> None:
    usage = engine("--help").check()
    assert "WORKERS PROXY_THREADS MY_ADDR" in usage.stdout and usage.stderr == ""
    assert engine("--version").check().stdout.startswith("qtfs ")
    assert run(MOUNT, "--version").check().stdout.split()[1] == engine("--version").stdout.split()[1]
