"""Deaths by seed: the engine, the mount's daemon, or both are killed with SIGKILL, or stopped, while actors work.

The moment is a number of messages that have passed the proxy, which may see one on its way: a request that the engine
never gets, a reply that it has not sent. Over shared memory it is a number of calls, or of requests of the kernel.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from harness.fault_proxy import Action, Cut, Fault, FaultProxy, Message, no_fault, stop

#: Whom a death meets.
ENGINE, CLIENT, BOTH, STOPS = "engine", "client", "both", "stops"
#: Before the first death, and between two: so many messages or calls, times the spread.
_FIRST, _APART = (5, 250), (40, 250)
_STOPPED_MOST_S = 0.3


class Deaths:
    """What befalls a stage in one seed. `struck` counts; `pids` tells who lives."""

    def __init__(
        self, seed: int, whom: str, count: int, pids: Callable[[], dict[str, int]], *, spread: float = 1,
        others: Fault = no_fault,
    ) -> None:
        """`others`: what becomes of messages that nobody's death meets."""
        draw = random.Random(f"{seed} {whom}")
        self.whom = whom
        self.struck: Counter[str] = Counter()
        #: One item for each engine that died.
        self.died: queue.Queue[str] = queue.Queue()
        self._pids = pids
        self._others = others
        self._moments = [draw.randrange(*_FIRST) * spread]
        while len(self._moments) < count:
            self._moments.append(self._moments[-1] + draw.randrange(*_APART) * spread)
        self._draw = draw
        self._passed = 0
        self._guard = threading.Lock()
        self._happening = False

    # ---- moments

    @contextlib.contextmanager
    def happening(self, proxy: FaultProxy | None, made: Callable[[], int]) -> Iterator[None]:
        """Nobody dies outside of this. `made` counts calls or messages, for want of a proxy."""
        self._happening = True
        try:
            if proxy is None:
                with self._watching(made):
                    yield
            else:
                proxy.fault = self._fault
                yield
                proxy.fault = no_fault
        finally:
            with self._guard:
                self._happening = False

    def _fault(self, message: Message) -> Action | None:
        with self._guard:
            self._passed += 1
            strikes = self._is_due(self._passed)
            if strikes:
                hands_on, at = self._draw.random() < 0.3, self._draw.randrange(message.length + 1)
                self._strike()
        if not strikes:
            return self._others(message)
        return None if hands_on else Cut(at)

    @contextlib.contextmanager
    def _watching(self, made: Callable[[], int]) -> Iterator[None]:
        over = threading.Event()
        before, begun = self._passed, made()

        def watch() -> None:
            while self._moments and not over.wait(0.001):
                self._passed = before + made() - begun
                if self._is_due(self._passed):
                    self._strike()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _is_due(self, count: int) -> bool:
        if not self._happening or not self._moments or count < self._moments[0] or self.died.unfinished_tasks:
            return False
        self._moments.pop(0)
        return True

    # ---- deaths

    def _strike(self) -> None:
        pids = self._pids()
        if self.whom == STOPS:
            name = self._draw.choice(sorted(pids))
            self._stop(name, pids[name])
            return
        victims = (ENGINE, CLIENT) if self.whom == BOTH else (self.whom,)
        for name in victims:
            os.kill(pids[name], signal.SIGKILL)
            self.struck[f"{name} killed"] += 1
        if ENGINE in victims:
            self.died.put(ENGINE)

    def _stop(self, name: str, pid: int) -> None:
        """For a while, in which nobody else is stopped."""
        stop(pid)
        try:
            time.sleep(self._draw.random() * _STOPPED_MOST_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.struck[f"{name} stopped"] += 1
