"""Shell scripts in a mount namespace of their own: this machine with mount.qtfs in /sbin and an fstab of the test's.

Nothing of it is seen outside, and all mounts go with the script's last process.
"""

from __future__ import annotations

import shlex
import shutil
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from commandline import CHECKOUT, MOUNT, Outcome, run

_INSTALL = """
umount -a -l -t fuse.qtfs # copies of others' mounts
trap 'umount -a -l -t fuse.qtfs' EXIT
sbin=$(readlink -f /sbin)
mkdir -p "$scratch/sbin"
ln -s "$helper" "$scratch/sbin/mount.qtfs"
mount -t overlay overlay -o "lowerdir=$scratch/sbin:$sbin" "$sbin"
"""

# As udev makes it; in containers it is often for root only.
_DEVICE = """
mknod -m 666 "$scratch/fuse" c 10 229
mount --bind "$scratch/fuse" /dev/fuse
"""

_FSTAB = """
touch /etc/fstab
mount --bind "$scratch/fstab" /etc/fstab
"""

# The checkout at its own path, below a directory that lets everybody through.
_REACHABLE = """
mkdir -p "$scratch/checkout"
mount --bind "$checkout" "$scratch/checkout"
mount -t tmpfs -o mode=755 none "$closed"
mkdir -p "$checkout"
mount --bind "$scratch/checkout" "$checkout"
"""


def closed_to_others(path: Path) -> Path | None:
    """The topmost directory on the way to `path` that only its owner may pass."""
    ways = [*reversed(path.parents), path]
    return next((way for way in ways if not way.stat().st_mode & stat.S_IXOTH), None)


@dataclass
class Namespace:
    """How the namespace of the scripts is to look; `scratch` is an empty directory for it."""

    scratch: Path
    fstab: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, script: str) -> Outcome:
        """Run a shell script; the first command that fails ends it."""
        shutil.rmtree(self.scratch)
        self.scratch.mkdir()
        (self.scratch / "fstab").write_text("".join(f"{line}\n" for line in self.fstab))
        variables = {**self.variables, "scratch": str(self.scratch), "helper": str(MOUNT), "checkout": str(CHECKOUT)}
        prelude = _INSTALL + _DEVICE + _FSTAB
        closed = closed_to_others(CHECKOUT)
        if closed is not None:
            variables["closed"] = str(closed)
            prelude += _REACHABLE
        assignments = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
        return run("unshare", "-m", "--propagation", "private", "sh", "-euc", assignments + prelude + script)

    def why_not_for_others(self) -> str | None:
        """Why other users cannot run our commands here, if so: a Python in root's home, a checkout with umask 077."""
        closed = closed_to_others(CHECKOUT)
        python = Path(sys.executable).resolve()
        if closed is not None and python.is_relative_to(closed):
            return f"{python} can be run by its owner only"
        outcome = self.run("setpriv --reuid=65534 --regid=65534 --clear-groups $helper --version")
        return outcome.stderr.strip() if outcome.status else None
