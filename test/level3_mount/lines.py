"""Mounts by way of a proxy, which tests break where they want; and an engine that is there over every transport."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.engine_process import ALL_TRANSPORTS, READY, EngineProcess
from harness.fault_proxy import FaultProxy
from harness.mounts import MountProcess
from harness.waiting import wait_until

from qtfs_common.addresses import Address, parse_address


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
            wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


@contextlib.contextmanager
def engine_everywhere(
    area: Path, grace_s: int = 1, more: tuple[str, ...] = ()
) -> Iterator[tuple[EngineProcess, dict[str, Address]]]:
    """One engine, and its address by transport. `more`: further names of shared memory, which have an address, too."""
    listens = ["tcp://127.0.0.1:0", *(f"shm://{area}/{name}.bar" for name in ("engine", *more))]
    arguments = [word for address in listens for word in ("--listen", address)]
    with EngineProcess(area, "unix", arguments=(*arguments, "--grace", str(grace_s)), workers=8).running() as engine:
        found = READY.search(engine.log())
        assert found is not None
        addresses = map(parse_address, found.group(1).split(", "))
        yield engine, dict(zip((*ALL_TRANSPORTS, *more), addresses, strict=True))
