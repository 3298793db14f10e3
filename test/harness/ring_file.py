"""The shared memory of an engine as a test sees and spoils it, written from doc/rings.md and not from the code.

    with RingFile(engine) as ring:
        ring.set(ring.client_line(0) + TAIL, 1 << 63)
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from types import TracebackType

from harness.engine_process import EngineProcess

PAGE = 4096
LINE_BYTES = 128
#: In the control block.
MAGIC, VERSION, CHANNELS, REQUEST_BYTES, REPLY_BYTES, AREAS_AT, TOTAL_BYTES, BOOT = 0, 8, 12, 16, 24, 32, 40, 48
INSTANCE, BEAT = 128, 136
#: In a line.
EPOCH, TAIL, HEAD, SLEEPING, BELL, LINE_INSTANCE, LINE_BEAT = 0, 8, 16, 24, 28, 32, 40
#: Bits of SLEEPING.
FOR_MESSAGES, FOR_ROOM, BY_LINK = 1, 2, 4


def bar_path(engine: EngineProcess) -> Path:
    return Path(engine.listen.removeprefix("shm://").partition("?bell=")[0])


class RingFile:
    """The file, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)

    def __enter__(self) -> RingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.map.close()

    # ---- where things are

    @property
    def channels(self) -> int:
        return self.get(CHANNELS, 4)

    def client_line(self, channel: int) -> int:
        return PAGE + 2 * channel * LINE_BYTES

    def engine_line(self, channel: int) -> int:
        return self.client_line(channel) + LINE_BYTES

    def request_area(self, channel: int) -> int:
        return self.get(AREAS_AT) + channel * (self.get(REQUEST_BYTES) + self.get(REPLY_BYTES))

    def reply_area(self, channel: int) -> int:
        return self.request_area(channel) + self.get(REQUEST_BYTES)

    def served(self) -> list[int]:
        """Channels that the engine serves."""
        return [number for number in range(self.channels) if self.get(self.engine_line(number))]

    # ---- what is there

    def get(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.map[at : at + size], "little")

    def set(self, at: int, value: int, size: int = 8) -> None:
        """One store, as far as mmap promises that."""
        struct.pack_into("<Q" if size == 8 else "<I", self.map, at, value)
