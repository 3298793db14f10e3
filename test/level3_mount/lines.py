"""A mount by way of a proxy, which tests break where they want."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.engine_process import EngineProcess
from harness.fault_proxy import FaultProxy
from harness.mounts import MountProcess
from harness.waiting import wait_until


@dataclass
class Line:
    """A mount (`there`) of an engine's directory (`here`) by way of a proxy."""

    engine: EngineProcess
    proxy: FaultProxy
    mount: MountProcess

    @property
    def here(self) -> Path:
        return self.engine.share

    @property
    def there(self) -> Path:
        return self.mount.point


@contextlib.contextmanager
def connected(area: Path, options: str = "", grace_s: int = 60, transport: str = "unix") -> Iterator[Line]:
    """A line over "unix" or "tcp"; at the end engine and mount must be well and let everything go."""
    engine = EngineProcess(area / "engine", transport, workers=8, arguments=("--grace", str(grace_s)))
    with engine.running(), FaultProxy(area / "proxy.sock", engine).running() as proxy:
        mount = MountProcess(
            engine, engine.share, area / "mnt", f"driver=fuse3,cache=auto,{options}", through=proxy.address
        )
        with mount.running():
            yield Line(engine, proxy, mount)
        if engine.process is not None:
            wait_until(engine.is_idle, "the engine to let everything go")
