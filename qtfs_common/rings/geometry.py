"""How shared memory is divided: the engine decides it when it starts (`--bar-layout`), a client reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtfs_common.errors import QtfsError

LINES_AT = 4096
LINE_BYTES = 128
PAGE_BYTES = 4096
MAX_CHANNELS = 4096
#: What a message takes besides file data, with a caller of as many groups as there can be (MAX_MESSAGE - MAX_PAYLOAD).
OVERHEAD_BYTES = 8192
#: An area holds two of the longest messages (channel.pyx), and an extended attribute of the largest size has to fit.
MIN_AREA_BYTES = 2 * (65536 + OVERHEAD_BYTES)
MAX_AREA_BYTES = 1 << 26
#: Whole transfers of 1 MiB.
DEFAULT_AREA_BYTES = 2 * ((1 << 20) + OVERHEAD_BYTES)
DEFAULT_CHANNELS = 64
#: Fewer than this, and areas are made smaller to have more: a mount needs one for its events and some for requests.
_ENOUGH_CHANNELS = 20

_SIZE = re.compile(r"([0-9]{1,12})([KMG]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class LayoutError(QtfsError):
    """Shared memory cannot be divided as it should be."""


def _whole_pages(size: int) -> int:
    return (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Geometry:
    """So many channels, each with an area for requests and one for replies, in bytes: whole pages."""

    channels: int
    request_bytes: int
    reply_bytes: int

    @property
    def areas_at(self) -> int:
        """Where the first area begins."""
        return _whole_pages(LINES_AT + 2 * self.channels * LINE_BYTES)

    @property
    def total_bytes(self) -> int:
        """The least memory that holds it."""
        return self.areas_at + self.channels * (self.request_bytes + self.reply_bytes)

    @property
    def max_payload(self) -> int:
        """The longest read or write that fits into one message: whole pages."""
        return (min(self.request_bytes, self.reply_bytes) // 2 - OVERHEAD_BYTES) // PAGE_BYTES * PAGE_BYTES

    def check(self, size: int) -> None:
        """Raises ValueError if a memory of `size` bytes cannot have this layout."""
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"{self.channels} channels (1 to {MAX_CHANNELS} are possible)")
        for area in (self.request_bytes, self.reply_bytes):
            if not MIN_AREA_BYTES <= area <= MAX_AREA_BYTES or area % PAGE_BYTES:
                raise ValueError(f"areas of {area} bytes ({MIN_AREA_BYTES} to {MAX_AREA_BYTES}, in whole pages)")
        if self.total_bytes > size:
            raise ValueError(f"{self.channels} channels take {self.total_bytes} bytes, and there are {size}")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the user wants; 0 leaves it to us."""

    channels: int = 0
    request_bytes: int = 0
    reply_bytes: int = 0

    def fit(self, size: int | None) -> Geometry:
        """The geometry for a memory of `size` bytes, or of a file yet to be made (None). Raises LayoutError."""
        areas = self._areas(size)
        channels = self.channels or (DEFAULT_CHANNELS if size is None else _most_channels(size, *areas))
        geometry = Geometry(channels, *areas)
        try:
            geometry.check(geometry.total_bytes if size is None else size)
        except ValueError as error:
            least = Geometry(1, MIN_AREA_BYTES, MIN_AREA_BYTES).total_bytes
            raise LayoutError(
                f"it is too small: {size} bytes, and one channel takes {least} at least" if size and size < least else
                f"the layout does not fit: {error}") from None
        return geometry

    def _areas(self, size: int | None) -> tuple[int, int]:
        """Of the default size or, in a small memory, smaller ones."""
        area = _whole_pages(DEFAULT_AREA_BYTES)
        wanted = self.channels or _ENOUGH_CHANNELS
        while size is not None and area > MIN_AREA_BYTES and \
                Geometry(wanted, self.request_bytes or area, self.reply_bytes or area).total_bytes > size:
            area = max(_whole_pages(area // 2), MIN_AREA_BYTES)
        return self.request_bytes or area, self.reply_bytes or area


def _most_channels(size: int, request_bytes: int, reply_bytes: int) -> int:
    each = request_bytes + reply_bytes + 2 * LINE_BYTES
    return max(1, min(DEFAULT_CHANNELS, (size - LINES_AT - PAGE_BYTES) // each))


def parse_layout(text: str) -> Layout:
    """``channels=N,request=SIZE,reply=SIZE``, each optional; sizes in bytes or with K, M or G. Raises ValueError."""
    found: dict[str, int] = {}
    for word in text.split(","):
        key, separator, value = word.partition("=")
        if key not in ("channels", "request", "reply") or not separator:
            raise ValueError(f"{word!r} is not channels=N, request=SIZE or reply=SIZE")
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = _channels(value) if key == "channels" else _area(value)
    return Layout(found.get("channels", 0), found.get("request", 0), found.get("reply", 0))


def _channels(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= MAX_CHANNELS:
        raise ValueError(f"channels={text}: not a number from 1 to {MAX_CHANNELS}")
    return int(text)


def _area(text: str) -> int:
    match = _SIZE.fullmatch(text)
    size = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if not MIN_AREA_BYTES <= size <= MAX_AREA_BYTES or size % PAGE_BYTES:
        raise ValueError(f"{text!r} is not a size from {MIN_AREA_BYTES // 1024}K to {MAX_AREA_BYTES >> 20}M in whole "
                         f"pages of {PAGE_BYTES} bytes")
    return size
