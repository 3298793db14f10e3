"""An engine in a process of its own: `qtfs_server.cli` with a run directory, a whitelist and a log of its own.

    with EngineProcess(area, "unix").running() as engine:
        Session(engine.address, engine.share)

It is ready when its ready line came, stops by SIGTERM to its pid, and must then have exited with 0 and have logged
neither an error nor a traceback but for what the test allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from harness.leaks import descriptor_count, descriptors, environment
from harness.service_manager import ServiceManager
from harness.waiting import wait_until

from qtfs_common.addresses import Address, parse_address
from qtfs_common.rundir import socket_path
from qtfs_common.whitelist import Type
from qtfs_server.control import control_name

CHECKOUT = Path(__file__).resolve().parents[2]
READY = re.compile(r"^qtfs engine: listening on (.+)\n", re.MULTILINE)
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
#: Those whose messages go by a socket; and all that mounts are tested over.
TRANSPORTS = ("unix", "tcp")
ALL_TRANSPORTS = (*TRANSPORTS, "shm")
#: Whitelist types whose entries are paths that an engine checks.
PATH_TYPES = tuple(t for t in Type if t not in (Type.KILL, Type.UDSCONNECT))
Rules: TypeAlias = dict[Type, Sequence[str | os.PathLike[str]]]
#: Descriptors with the least numbers, which an engine has from its start to its end.
OWN_DESCRIPTORS = 8
_SCRIPT_HEAD = "import os, signal\nfrom qtfs_server import cli, handover"
_SCRIPT_END = "raise SystemExit(cli.main())"
_BAD_LINE = re.compile(r"ERROR|CRITICAL|Traceback|Fatal Python error|AddressSanitizer")


def whitelist_text(rules: Rules) -> str:
    groups = []
    for kind, paths in rules.items():
        entries = "".join(f"{os.fspath(path)};" for path in paths)
        groups.append(f"[{kind.group}]\nPath={entries}\n")
    return "".join(groups)


def everything_below(path: str | os.PathLike[str]) -> Rules:
    """Rules that allow every operation below one path."""
    return {kind: [path] for kind in PATH_TYPES}


class EngineProcess:
    """An engine and its files: `area/share` is what it shares unless `rules` say otherwise."""

    def __init__(
        self,
        area: Path,
        transport: str = "unix",
        *,
        rules: Rules | None = None,
        arguments: Sequence[str] = (),
        workers: int = 4,
        limits: Sequence[str] = (),
        special: str = "",
        within: Sequence[str] = (),
        kept: int = 0,
    ) -> None:
        """`special`: the text of special.toml. `kept`: a service manager keeps so many descriptors for it.

        `limits`: options of prlimit(1); `within`: a command that becomes the engine, unshare(1) for example.
        """
        self.area = area
        self.share = area / "share"
        self.share.mkdir(parents=True, exist_ok=True)
        self.run_dir = area / "run"
        self.whitelist = area / "whitelist"
        self.special = area / "special.toml"
        self.log_path = area / "engine.log"
        self.listen = {
            "unix": f"unix://{area}/engine.sock",
            "tcp": "tcp://127.0.0.1:0",
            "shm": f"shm://{area}/engine.bar",
        }[transport]
        self.workers = workers
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None
        self._address: Address | None = None
        self._limits = limits
        self._kept = kept
        self.manager: ServiceManager | None = None
        self.within = within
        self._allowed: list[re.Pattern[str]] = []
        self.special.write_text(special)
        self.allow(everything_below(self.share) if rules is None else rules)

    # ---- life

    @contextlib.contextmanager
    def running(self) -> Iterator[EngineProcess]:
        """Started; stopped and judged at the end, or killed if the body fails."""
        try:
            self.start()
            yield self
            self._check_nothing_is_kept()
        except BaseException:
            self.kill()
            raise
        self.stop()
        self.check_log()
        # Its pages are there, unlike those of other files that tests leave.
        (self.area / "engine.bar").unlink(missing_ok=True)

    def start(self) -> None:
        """Start and wait for the ready line. A second start of the same engine listens at the same address."""
        self._start()

    def _start(self, *more: str, script: str = "") -> None:
        if self._kept and self.manager is None:
            self.manager = ServiceManager(self.area / "notify", self._kept)
        command, fds = [*self.command(script), *more], []
        if self.manager is not None and not more:
            command, fds = self.manager.start_with_kept(command)
        with self.log_path.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), pass_fds=fds
            )

        def ready() -> re.Match[str] | None:
            found = READY.search(self.log()[begin:])
            if found is None and self.exit_status() is not None:
                raise AssertionError(f"the engine did not start ({self.exit_status()}):\n{self.log()[begin:]}")
            return found

        found = wait_until(ready, "the engine's ready line", START_TIMEOUT_S)
        self._address = parse_address(found.group(1).split(", ")[0])

    def upgrade(self, script: str = "") -> None:
        """Have another engine take over; the one before it must end with status 0. AssertionError: it did not start.

        `script`: Python that the new one executes first, with qtfs_server.handover as `handover`.
        """
        before = self.process
        assert before is not None, "the engine was not started"
        try:
            self._start("--upgrade", script=script)
        except AssertionError:
            self.process = before
            raise
        status = before.wait(STOP_TIMEOUT_S)
        assert status == 0, f"the engine that was replaced ended with {status}\n{self.log()}"

    def command(self, script: str = "") -> list[str]:
        limit = ["prlimit", *self._limits] if self._limits else []
        listen = str(self._address) if self._address else self.listen
        options = ["--listen", listen, "--whitelist", str(self.whitelist), "--run-dir", str(self.run_dir)]
        options += ["--special", str(self.special)]
        options += ["--workers", str(self.workers), *self.arguments]
        program = ["-c", f"{_SCRIPT_HEAD}\n{script}\n{_SCRIPT_END}"] if script else ["-m", "qtfs_server.cli"]
        return [*self.within, *limit, sys.executable, *program, *options]

    def stop(self) -> None:
        """SIGTERM; the exit status must be 0. Harmless if it does not run."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the engine did not end within {STOP_TIMEOUT_S:g} s\n{self.log()}") from None
        self.process = None
        assert status == 0, f"the engine ended with {status}\n{self.log()}"

    def kill(self) -> None:
        """SIGKILL. Harmless if it does not run."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def forget_sessions(self) -> None:
        """Have the next engine know nothing of this one's sessions, as if their grace were over."""
        for left in (self.run_dir / "sessions").iterdir():
            left.unlink()

    def exit_status(self) -> int | None:
        return self.process.poll() if self.process else 0

    def _environment(self) -> dict[str, str]:
        # Set, not inherited: what the tester's shell says must not reach it.
        managed = self.manager.environment if self.manager is not None else {}
        return environment(PYTHONPATH=str(CHECKOUT), QTFS_RUN_DIR=str(self.run_dir), **managed)

    # ---- what it says

    @property
    def address(self) -> Address:
        assert self._address is not None, "the engine was not started"
        return self._address

    @property
    def pid(self) -> int:
        assert self.process is not None, "the engine does not run"
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return self.run_dir / control_name(self.address)

    def figures(self) -> dict[str, Any]:
        """What the control socket tells, see doc/control.md."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, socket_path(self.control_path) as path:
            sock.settimeout(10)
            sock.connect(path)
            data = b"".join(iter(lambda: sock.recv(65536), b""))
        figures: dict[str, Any] = json.loads(data)
        return figures

    def descriptors(self) -> int:
        """Open descriptors of the process, as the kernel counts them."""
        return descriptor_count(self.pid)

    def _own_descriptors(self) -> dict[int, str]:
        return {fd: path for fd, path in descriptors(self.pid).items() if fd < OWN_DESCRIPTORS}

    @contextlib.contextmanager
    def without_descriptors(self) -> Iterator[None]:
        """Nothing can be opened in the engine: all numbers below its limit are taken. It must keep what has them."""
        own = self._own_descriptors()
        assert len(own) == OWN_DESCRIPTORS
        before = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (OWN_DESCRIPTORS, before[1]))
        try:
            yield
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, before)
        assert self._own_descriptors() == own

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    # ---- rules

    def allow(self, rules: Rules) -> None:
        """Write the whitelist."""
        self.whitelist.write_text(whitelist_text(rules))

    def reload(self, rules: Rules, special: str | None = None) -> None:
        """Write the whitelist and have it read. INFO is not logged, so the rules' epoch tells when that is done."""
        before = self.figures()["reloads"]
        self.allow(rules)
        if special is not None:
            self.special.write_text(special)
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.figures()["reloads"] > before, "the whitelist to be read again")

    # ---- judgement

    def expect_log(self, pattern: str) -> None:
        """From now on lines that match may be errors: the test provokes them."""
        self._allowed.append(re.compile(pattern))

    def check_log(self) -> None:
        """No error, no traceback that was not expected."""
        lines = [line for line in self.log().splitlines() if _BAD_LINE.search(line)]
        unexpected = [line for line in lines if not any(pattern.search(line) for pattern in self._allowed)]
        assert not unexpected, "the engine logged:\n" + "\n".join(unexpected) + f"\n--- all\n{self.log()}"

    def _check_nothing_is_kept(self) -> None:
        """Once nobody is connected and no session is left, nothing is open; as far as it runs, and can be asked."""
        if self.process is None or self.process.poll() is not None:
            return

        def is_so() -> bool:
            try:
                figures = self.figures()
            except OSError:
                return True
            return bool(figures["connections"] or figures["sessions"] or not figures["descriptors"])

        wait_until(is_so, "the engine to close what belonged to sessions")

    def is_idle(self) -> bool:
        """Nobody is connected, and nothing is kept for anybody."""
        figures = self.figures()
        return not figures["connections"] and not figures["sessions"] and not figures["descriptors"]
