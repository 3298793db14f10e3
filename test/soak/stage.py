"""Where seeds are played: an engine, a proxy unless it is shared memory, a mount, and a company of actors.

    with Stage(area, "tcp").set_up() as stage:
        stage.play_faults(seed)

A stage stands for many seeds, so that one is cheap. AssertionError says which seed failed and how to repeat it.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from harness.ends import Ends
from harness.engine_process import EngineProcess
from harness.fault_proxy import Fault, FaultProxy, no_fault
from harness.fault_schedule import Schedule
from harness.mounts import MountProcess
from harness.ring_faults import RingFaults
from harness.ring_file import bar_path
from harness.waiting import wait_until
from soak.actors import Company, Scene
from soak.killing import BOTH, CLIENT, ENGINE, Deaths

from qtfs_common.errors import QtfsError

#: Enough for an engine to come again under any load.
GRACE_S = 60
#: Where clients die: their locks are in the way of others for so long.
SHORT_GRACE_S = 1
#: Shared memory: its size, and how an engine may lay it out when it comes again, never with smaller areas.
_BAR_BYTES = 96 << 20
_LAYOUTS = [f"channels={channels},request={area},reply={area}" for channels, area in ((24, "512K"), (40, "1M"))]


@contextlib.contextmanager
def named(transport: str, kind: str, seed: int) -> Iterator[None]:
    """Whatever fails within says how to repeat it."""
    try:
        yield
    except Exception as error:
        again = f"make soak SOAK_ARGS='--transport {transport} --only {kind} --seed {seed}'"
        raise AssertionError(f"seed {seed} ({kind}, {transport}) failed; again: {again}\n{error!r}") from error


@contextlib.contextmanager
def _given(proxy: FaultProxy, fault: Fault) -> Iterator[None]:
    proxy.fault = fault
    try:
        yield
    finally:
        proxy.fault = no_fault


class Fate:
    """The deaths of one seed, as whoever plays it sees them. Outside of the body nobody dies."""

    def __init__(
        self, stage: Stage, deaths: Deaths, engine_is_back: Callable[[], None], made: Callable[[], int]
    ) -> None:
        self.deaths = deaths
        #: How often the mount was made again.
        self.remounted = 0
        self._stage = stage
        self._engine_is_back = engine_is_back
        self._made = made
        self._moments = contextlib.ExitStack()

    def __enter__(self) -> Fate:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._moments.close()

    def begin(self) -> None:
        """From now on they die."""
        self._moments.enter_context(self.deaths.happening(self._stage.proxy, self._made))

    def revive(self) -> None:
        """Nobody dies any more, and all live again."""
        self._moments.close()
        self._engine_is_back()
        if self.remounted < self.deaths.struck["client killed"]:
            self.remounted = self.deaths.struck["client killed"]
            self._stage.mount_again()

    def go_on(self) -> None:
        self.revive()
        self.begin()


class Stage:
    """`faults` counts what was done to the mount, by kind."""

    def __init__(
        self, area: Path, transport: str, *, actors: int = 3, grace_s: int = GRACE_S, cache: str = "auto",
        has_key: bool = False,
    ) -> None:  # fmt: skip
        """`has_key`: over TCP, each side proves to the other that it knows a key."""
        self.transport = transport
        self.area = area
        self.grace_s = grace_s
        self.has_key = has_key = has_key and transport == "tcp"
        self._arguments = ("--grace", str(grace_s), *(("--key-file", str(area / "key")) if has_key else ()))
        self.engine = EngineProcess(area / "engine", transport, workers=8, arguments=self._arguments)
        if transport == "shm":
            self.engine.arguments = (*self._arguments, "--bar-layout", _LAYOUTS[0])
            with bar_path(self.engine).open("wb") as bar:
                bar.truncate(_BAR_BYTES)
        self.proxy: FaultProxy | None = None
        self.faults: Counter[str] = Counter()
        self._last_seen = 0
        self.company = Company(area / "mnt", self.engine.share, actors)
        self._options = f"driver=fuse3,cache={cache},run_dir={area / 'run'}"
        if has_key:
            (area / "key").write_text("a key of this stage alone\n")
            (area / "key").chmod(0o600)
            self._options += f",key_file={area / 'key'}"

    @contextlib.contextmanager
    def set_up(self) -> Iterator[Stage]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.engine.running())
            if self.transport != "shm":
                proxy = FaultProxy(self.area / "proxy.sock", self.engine)
                self.proxy = stack.enter_context(proxy.running())
            through = self.proxy.address if self.proxy else None
            self.mount = MountProcess(
                self.engine, self.engine.share, self.area / "mnt", self._options, through=through
            )
            self._ends = Ends(self.mount, self.area / "run")
            with self.mount.running(), self.company.running():
                yield self
            wait_until(self.engine.is_idle, f"the engine to let everything go; it has {self.engine.figures()}")

    def check_nothing_is_open(self) -> None:
        """Nobody uses the mount: neither side has anything open, and both know of the same lookups."""
        self._ends.check_nothing_is_open()

    def play_faults(self, seed: int, calls: int = 50) -> None:
        """One seed of what a proxy can do, or who writes into shared memory."""
        with named(self.transport, "faults", seed):
            struck, striking = self._faults(seed)
            with contextlib.ExitStack() as faults:
                self.company.play(
                    Scene(seed, calls), begun=lambda: faults.enter_context(striking), ended=faults.close
                )
            self._ends.check_nothing_is_open()
        self.faults += struck

    def _faults(self, seed: int) -> tuple[Counter[str], AbstractContextManager[object]]:
        """What will have been struck, and the time in which faults strike."""
        if self.proxy is None:
            in_memory = RingFaults(bar_path(self.engine), seed, self.company.made)
            return in_memory.struck, in_memory.striking()
        schedule = Schedule(seed)
        return schedule.struck, _given(self.proxy, schedule)

    # ---- deaths

    def play_deaths(self, seed: int, whom: str, calls: int = 50, count: int = 2, *, and_faults: bool = False) -> None:
        """One seed of killed and stopped processes, `and_faults` of the connections between."""
        scene = Scene(seed, calls, mortal=whom in (CLIENT, BOTH), orphans=whom not in (ENGINE, BOTH))
        schedule = Schedule(seed)
        kind, others = (f"{whom}+faults", schedule) if and_faults else (whom, no_fault)
        with self.fate(seed, whom, count, made=self.company.made, kind=kind, others=others) as fate:
            self.company.play(scene, begun=fate.begin, revive=fate.go_on, ended=fate.revive)
            most = max(self.company.downs.values(), default=0)
            assert most <= fate.remounted, f"{most} times ENOTCONN, and {dict(fate.deaths.struck)}"
            # One that dies between two instructions may leave a lookup counted: doc/reliability.md, 1.2.
            spare = self.faults["engine killed"] + fate.deaths.struck["engine killed"]
            self._ends.check_nothing_is_open(spare)
        self.faults += schedule.struck

    def _messages(self) -> int:
        """About as many as a proxy would have seen; of a daemon that is dead, those that it was last known to have."""
        with contextlib.suppress(QtfsError, OSError):
            self._last_seen = 2 * self._ends.client["requests"]
        return self._last_seen

    def _pids(self) -> dict[str, int]:
        return {ENGINE: self.engine.pid, CLIENT: self.mount.pid}

    @contextlib.contextmanager
    def fate(
        self, seed: int, whom: str, count: int, *, made: Callable[[], int] | None = None, spread: float = 1,
        kind: str, others: Fault = no_fault,
    ) -> Iterator[Fate]:
        """Who dies in the body, and when. `kind`: how the seed is called. `made`: see `Deaths.happening`."""
        deaths = Deaths(seed, whom, count, self._pids, spread=spread, others=others)
        with named(self.transport, kind, seed), self._resurrection(deaths, seed) as engine_is_back:
            with Fate(self, deaths, engine_is_back, made or self._messages) as fate:
                yield fate
            fate.revive()
        self.faults += deaths.struck

    @contextlib.contextmanager
    def _resurrection(self, deaths: Deaths, seed: int) -> Iterator[Callable[[], None]]:
        """A thread starts the engine again whenever it died. What is yielded waits until it is there."""
        draw = random.Random(f"{seed} layout")
        failures: list[BaseException] = []

        def start_again() -> None:
            try:
                while deaths.died.get():
                    self.engine.kill()
                    if self.transport == "shm":
                        self.engine.arguments = (*self._arguments, "--bar-layout", draw.choice(_LAYOUTS))
                    self.engine.start()
                    deaths.died.task_done()
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                deaths.died.task_done()

        thread = threading.Thread(target=start_again, daemon=True)
        thread.start()

        def is_back() -> None:
            wait_until(lambda: failures or not deaths.died.unfinished_tasks, "the engine to be back", 30)
            assert not failures, f"the engine did not come back: {failures}"

        try:
            yield is_back
        finally:
            deaths.died.put("")
            thread.join(30)

    def mount_again(self) -> None:
        """Once the engine has finished with what the dead daemon asked for."""
        self.mount.kill()
        wait_until(lambda: not self.engine.figures()["connections"], "the engine to see that the client is gone")
        self.mount.start()
