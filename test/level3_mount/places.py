"""How mounts are made, and the directories a test gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.engine_process import ALL_TRANSPORTS, EngineProcess


@dataclass(frozen=True)
class Kind:
    """How a mount is made."""

    driver: str
    transport: str
    cache: str

    def __str__(self) -> str:
        return f"{self.driver}-{self.transport}-{self.cache}"


# To TCP and Unix sockets the driver does the same, so one of them has to do without a cache.
KINDS = [
    *(Kind("fuse3", transport, "auto") for transport in ALL_TRANSPORTS),
    *(Kind("fuse3", transport, "none") for transport in ("unix", "shm")),
    *(Kind("llfuse", transport, "auto") for transport in ALL_TRANSPORTS),
]


@dataclass(frozen=True)
class Place:
    """A directory seen through a mount (`there`) and on the server (`here`); an ordinary one beside it (`local`)."""

    kind: Kind
    engine: EngineProcess
    there: Path
    here: Path
    local: Path
