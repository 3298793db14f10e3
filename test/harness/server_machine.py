"""An engine in a mount namespace of its own, so that what the "server" mounts is not mounted on the "client".

    with ServerMachine(tmp_path).running() as server:
        server.mount_tmpfs("a/b", "content")
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.engine_process import EngineProcess
from harness.waiting import wait_until

ALONE = ("unshare", "--mount", "--propagation", "private")


class ServerMachine(EngineProcess):
    """Mount points are named relative to `share`."""

    def __init__(self, area: Path, transport: str = "unix", *, within: Sequence[str] = ALONE, **more: object) -> None:
        super().__init__(area, transport, within=within, **more)  # type: ignore[arg-type]

    def run(self, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A shell script on the server, in `share`; the first command that fails ends it."""
        words = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "sh", "-euc", f"cd '{self.share}'\n{script}"]
        return subprocess.run(words, capture_output=True, text=True, check=check, timeout=60)

    def mount_tmpfs(self, place: str, *names: str, options: str = "size=4m") -> None:
        """A tmpfs with files of these names."""
        files = "".join(f"; echo {name} >'{place}/{name}'" for name in names)
        self.run(f"mount -t tmpfs -o {options} none '{place}'{files}")

    def try_umount(self, place: str) -> bool:
        """Whether umount(8) succeeded; if not, it was because the mount was busy."""
        done = self.run(f"umount '{place}'", check=False)
        assert done.returncode == 0 or "busy" in done.stderr, done.stderr
        return done.returncode == 0

    def umount(self, place: str) -> None:
        """Once the engine has let it go."""
        wait_until(lambda: self.try_umount(place), f"{place} to be idle on the server", 5)
