"""An engine that a process of its own starts and ends, for tests which have files open on a mount of it meanwhile.

A program that this process starts is a copy of it until it calls execve(2), which then closes those files: a close(2)
that waits for the very engine that is about to be started.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from harness.engine_process import EngineProcess


class DistantEngine(EngineProcess):
    """As EngineProcess. `pid` and the exit status are asked for over a pipe."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pipe: Connection | None = None
        self._keeper: Any = None

    def start(self) -> None:
        if self._pipe is None:
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._keeper = context.Process(target=self._keep, args=(theirs, self._pipe), daemon=True)
            self._keeper.start()
            theirs.close()
        self._address = self._ask("start")

    def upgrade(self, script: str = "") -> None:
        self._ask("upgrade", script)

    def kill(self) -> None:
        if self._pipe is not None:
            self._ask("kill")

    def stop(self) -> None:
        if self._pipe is None:
            return
        self._ask("stop")

    def end(self) -> None:
        """End the process that keeps the engine, and the engine. Harmless when repeated."""
        if self._pipe is not None:
            self.kill()
            self._pipe.send(("end", ""))
            self._pipe.close()
            self._keeper.join()
            self._keeper.close()
            self._pipe = None

    @property
    def pid(self) -> int:
        found: int = self._ask("pid")
        return found

    def kept(self) -> list[str]:
        """Names of the descriptors that the service manager keeps."""
        found: list[str] = self._ask("kept")
        return found

    def _ask(self, what: str, script: str = "") -> Any:
        assert self._pipe is not None
        self._pipe.send((what, script))
        done, answer = self._pipe.recv()
        if not done:
            raise AssertionError(answer)
        return answer

    def _keep(self, pipe: Connection, others: Connection) -> None:
        """The process that starts and ends the engine."""
        others.close()
        while True:
            try:
                what, script = pipe.recv()
            except EOFError:
                what, script = "end", ""
            if what == "end":
                EngineProcess.kill(self)
                if self.manager is not None:
                    self.manager.close()
                return
            try:
                pipe.send((True, self._do(what, script)))
            except AssertionError as failure:
                pipe.send((False, str(failure)))

    def _do(self, what: str, script: str) -> Any:
        if what == "start":
            EngineProcess.start(self)
            return self._address
        if what == "kill":
            EngineProcess.kill(self)
        elif what == "stop":
            EngineProcess.stop(self)
        elif what == "kept":
            assert self.manager is not None
            return self.manager.names()
        elif what == "upgrade":
            EngineProcess.upgrade(self, script)
        assert what != "pid" or self.process is not None, "the engine does not run"
        return self.process.pid if self.process is not None else None
