"""What both ends of a mount count, and whether that agrees: doc/control.md, section 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.mounts import MountProcess
from harness.waiting import wait_until

from qtfs_client.remote_host import mount_figures


class Ends:
    """The figures of a mount's daemon, whose run directory that is, and of its session on the engine."""

    def __init__(self, mount: MountProcess, run_dir: Path) -> None:
        self.mount = mount
        self._run_dir = run_dir

    @property
    def client(self) -> dict[str, Any]:
        return mount_figures(str(self.mount.point), str(self._run_dir))

    @property
    def session(self) -> dict[str, Any]:
        """Of the one session that somebody is connected to: that of a daemon which died may still have its grace."""
        (found,) = (s for s in self.mount.engine.figures()["sessions"] if s["connections"])
        assert isinstance(found, dict)
        return found

    def agree(self, spare: int = 0) -> bool:
        """Whether both know of the same lookups, none of them on its way. Asking makes some, so ask until they do.

        `spare`: how many more the engine may have.
        """
        client, session = self.client, self.session
        least = 1 + client["lookups"] - client["forgotten"]
        return bool(client["forgets_unsent"] == 0 and least <= session["lookups"] <= least + spare)

    def check_nothing_is_open(self, spare: int = 0) -> None:
        """Both agree on the lookups, and the engine has nothing open or locked, once what is under way has ended."""
        nothing = ("handles", "locks", "lock_owners", "waiting_locks")

        def is_so() -> bool:
            session = self.session
            return self.agree(spare) and not any(session[key] for key in nothing)

        try:
            wait_until(is_so, "both ends to agree", 20)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; the daemon has {self.client}, the engine {self.session}") from None
