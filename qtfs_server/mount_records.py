"""What sessions have mounted, in a file of each session in the run directory: an engine may die without a word.

A mount is told from later ones by its unique id, for which Linux 6.8 is needed: without one it is not written down, as
somebody else's mount may have its id when the next engine looks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SUFFIX = ".new"


class Made(NamedTuple):
    """A mount that a session made. `unique` is never given out again until the machine reboots; 0 before Linux 6.8."""

    id: int
    unique: int
    lazy_cleanup: bool


class MountRecords:
    """The files, one of each session that has mounted anything, beside those with the sessions' tables."""

    def __init__(self, directory: Path, sessions: Path) -> None:
        """Raises OSError if they cannot be."""
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._sessions = sessions
        self._boot = _BOOT_ID.read_text().strip()

    def save(self, session: int, mounts: Iterable[Made]) -> None:
        """Replace what was known of a session; without mounts it has no file."""
        path = self._path(session)
        lasting = [made for made in mounts if made.unique]
        try:
            # A session without tables there would seem to have ended to an engine that starts beside us.
            if lasting and (self._sessions / path.name).exists():
                _replace(path, json.dumps({"boot": self._boot, "mounts": lasting}))
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: %s: if this engine dies, the next one will not unmount these", path, error.strerror)

    def load(self, ours: set[str]) -> dict[int, list[Made]]:
        """What is known of our sessions, and of those that have ended without their mounts; not of other engines'.

        `ours`: the names of our sessions' files. Records that are of no use are removed.
        """
        found = {}
        others = {path.name for path in self._sessions.iterdir()} - ours
        for path in self._directory.iterdir():
            if path.name in others:
                continue
            try:
                found[int(path.name, 16)] = self._read(path)
            except FileNotFoundError:
                pass  # its session has just ended
            except (OSError, ValueError, TypeError, LookupError) as error:
                if path.suffix != _SUFFIX:
                    log.warning("%s is of no use: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
        return found

    def _read(self, path: Path) -> list[Made]:
        record = json.loads(path.read_text())
        if record["boot"] != self._boot:
            raise ValueError("the machine was started again since")
        return [Made(*mount) for mount in record["mounts"]]

    def _path(self, session: int) -> Path:
        return self._directory / f"{session:016x}"


def _replace(path: Path, text: str) -> None:
    """At once, whenever we die."""
    fresh = path.with_suffix(_SUFFIX)
    with open(fresh, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
    fresh.replace(path)
