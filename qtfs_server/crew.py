"""The engine's threads: started, stopped, and started again if an upgrade comes to nothing."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator

from qtfs_server.server import Server

#: Files whose locks local processes of the server contend for, at the same time; the rest is polled.
_LOCK_QUEUERS = 4
_STACK_BYTES = 512 * 1024
_LOOK_S = 0.002
#: For a client to say who it is.
_GREETING_S = 0.5


class Crew:
    """All threads that serve clients, but for those that carry errands out."""

    def __init__(self, server: Server, workers: int) -> None:
        self._server = server
        self._workers = workers
        self._threads: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Start those that do not run. One that hung in a file system when it was to stop has gone on by itself."""
        threading.stack_size(_STACK_BYTES)
        for name, body in self._bodies():
            if name not in self._threads or not self._threads[name].is_alive():
                self._threads[name] = threading.Thread(target=body, name=name, daemon=True)
                self._threads[name].start()

    def stop(self, timeout_s: float) -> bool:
        """Let every thread finish its request; False if one is stuck in the backing file system."""
        self._server.stop()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads.values():
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads.values())

    def come_to_rest(self, timeout_s: float) -> bool:
        """As `stop`; then wait for whatever else changes what sessions have. False: something has not ended.

        Nobody is accepted any more; who has just been may begin a session.
        """
        begun = time.monotonic()
        deadline = begun + timeout_s
        self._server.accept(False)
        while self._server.greets and time.monotonic() < begun + _GREETING_S:
            time.sleep(_LOOK_S)
        self.stop(deadline - time.monotonic())
        while self._server.busy and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return not self._server.busy

    def go_on(self) -> None:
        """Undo come_to_rest."""
        self._server.go_on()
        self.start()
        self._server.accept(True)

    def _bodies(self) -> Iterator[tuple[str, Callable[[], None]]]:
        server = self._server
        for number in range(self._workers):
            yield f"worker-{number}", server.work
        yield "locks", server.wait_for_locks
        yield "streams", server.watch_streams
        yield "mounts", server.watch_mounts
        yield "watchdog", functools.partial(server.watch_workers, functools.partial(_start_helper, server))
        for number in range(_LOCK_QUEUERS):
            yield f"lock-queue-{number}", server.queue_for_locks


def _start_helper(server: Server) -> None:
    """A worker in the place of one that hangs; it ends by itself."""
    threading.Thread(target=server.help_out, name="helper", daemon=True).start()
