"""A mount and its engine, which a process of its own starts, so that it can be replaced while files are open here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.distant_engine import DistantEngine
from harness.mounts import MountProcess
from harness.waiting import wait_until


@dataclass
class Pair:
    """A mount (`there`) of an engine's directory (`here`)."""

    engine: DistantEngine
    mount: MountProcess

    @property
    def here(self) -> Path:
        return self.engine.share

    @property
    def there(self) -> Path:
        return self.mount.point

    def replace_engine(self) -> None:
        """SIGKILL, and another engine at the same address."""
        self.engine.kill()
        self.engine.start()


@contextlib.contextmanager
def mounted(
    area: Path, transport: str, options: str = "cache=auto", grace: str = "60", kept: int = 0, workers: int = 6
) -> Iterator[Pair]:
    """`kept`: a service manager keeps so many descriptors for the engine."""
    engine = DistantEngine(area / "engine", transport, workers=workers, arguments=("--grace", grace), kept=kept)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.end)
        stack.enter_context(engine.running())
        with MountProcess(engine, engine.share, area / "mnt", f"driver=fuse3,{options}").running() as mount:
            yield Pair(engine, mount)
        wait_until(engine.is_idle, "the engine to let everything go")
        assert not list((engine.run_dir / "sessions").iterdir())
        if kept:
            wait_until(lambda: not engine.kept(), f"the store to be empty; it has {engine.kept()}")
