"""Two machines in one: the engine in a mount and network namespace, the client's commands in another.

The engine's namespace sees its share at the same path as the client does, but what is mounted there is seen by nobody
else. The client's has mount.qtfs in /sbin and a run directory of its own. They meet at a Unix socket, or over a network
of their own.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
from commandline import CHECKOUT, MOUNT, Outcome, run
from harness.engine_process import EngineProcess, Rules, everything_below
from harness.leaks import end_processes, environment, our_processes
from harness.waiting import wait_until

QTCTL = CHECKOUT / "qtfs_client/qtctl"

_NETWORK = """
ip link add name qtfs-server type veth peer name qtfs-client netns {client}
ip address add 10.77.0.1/24 dev qtfs-server
ip link set qtfs-server up
nsenter --net=/proc/{client}/ns/net ip address add 10.77.0.2/24 dev qtfs-client
nsenter --net=/proc/{client}/ns/net ip link set qtfs-client up
"""

_CLIENT = """
umount -a -l -t fuse.qtfs # copies of others' mounts
sbin=$(readlink -f /sbin)
mkdir -p "$scratch/sbin"
ln -sf "$helper" "$scratch/sbin/mount.qtfs"
mount -t overlay overlay -o "lowerdir=$scratch/sbin:$sbin" "$sbin"
"""


class _Namespace:
    """A process that does nothing but keep a mount and a network namespace."""

    def __init__(self) -> None:
        command = ["unshare", "-m", "-n", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 1000"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
        assert self._process.stdout is not None and self._process.stdout.readline() == b"ready\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    def enter(self) -> list[str]:
        """Words before a command that is to run there."""
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", f"--net=/proc/{self.pid}/ns/net", "--"]

    def mountinfo(self) -> str:
        return Path(f"/proc/{self.pid}/mountinfo").read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Engine(EngineProcess):
    """An engine in a namespace."""

    namespace: _Namespace

    def command(self, script: str = "") -> list[str]:
        return [*self.namespace.enter(), *super().command(script)]


class Machines:
    """`share` is mounted at `point` on the client; `options` are of that mount."""

    def __init__(self, area: Path, rules: Rules | None = None, options: str = "", *, network: bool = False) -> None:
        """`network`: they meet by TCP, with a key."""
        self.area = area
        self.share = area / "share"
        self.point = area / "point"
        self.run_dir = area / "client-run"
        self.scratch = area / "scratch"
        for directory in (self.share, self.point, self.scratch):
            directory.mkdir()
        self.options = options
        self.server, self.client = _Namespace(), _Namespace()
        self.engine = _Engine(area, rules=rules or everything_below(self.share))
        self.engine.namespace = self.server
        self._network = network
        if network:
            self.key = area / "key"
            self.key.write_text("a key of the two machines\n")
            self.key.chmod(0o600)
            self.engine.listen = "tcp://10.77.0.1:0"
            self.engine.arguments = ("--key-file", str(self.key))
            self.options = ",".join(filter(None, (options, f"key_file={self.key}")))

    @contextlib.contextmanager
    def running(self) -> Iterator[Machines]:
        """Engine and mount; at the end both must end well."""
        try:
            if self._network:
                self.on_server(_NETWORK.format(client=self.client.pid)).check()
            with self.engine.running():
                self.on_client(_CLIENT + 'mkdir -p "$run"; chmod 700 "$run"').check()
                self.mount().check()
                yield self
                self.unmount()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # there is one only if the test failed
                end_processes([psutil.Process(pid) for pid in self.daemons()])
            self.client.close()
            self.server.close()

    def mount(self) -> Outcome:
        options = ",".join(filter(None, (f"server={self.engine.address}", f"run_dir={self.run_dir}", self.options)))
        return self.on_client(f'mount -t qtfs "$share" "$point" -o "{options}"')

    def unmount(self) -> None:
        if "propagate" in self.options:
            # The kernel has let go of a child that it has detached a moment after nobody sees it any more.
            wait_until(lambda: self.on_client('umount "$point"').status == 0, "the mount to be free", 2)
        else:
            self.on_client('umount "$point"').check()
        wait_until(lambda: not self.daemons(), "the daemon of the mount to end")

    def daemons(self) -> list[int]:
        found = []
        for process in our_processes():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if str(self.point) in process.cmdline():
                    found.append(process.pid)
        return found

    def _run(self, where: _Namespace, script: str) -> Outcome:
        names = {"share": self.share, "point": self.point, "run": self.run_dir, "scratch": self.scratch}
        names |= {"helper": MOUNT, "qtctl": QTCTL}
        assignments = "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in names.items())
        return run(*where.enter(), "sh", "-euc", assignments + script, QTFS_RUN_DIR=str(self.run_dir))

    def on_client(self, script: str) -> Outcome:
        """Run a shell script on the client; the first command that fails ends it."""
        return self._run(self.client, script)

    def on_server(self, script: str) -> Outcome:
        return self._run(self.server, script)

    def mounted_on_server(self, *below: str) -> list[list[str]]:
        """Fields of the server's mountinfo for each mount below the share, or on that path of it."""
        wanted = str(self.share.joinpath(*below))
        rows = [line.split(" ") for line in self.server.mountinfo().splitlines()]
        return [row for row in rows if row[4] == wanted or (not below and row[4].startswith(wanted + "/"))]
