"""An ext4 on a loop device that can be frozen: whoever would change something in it waits until it thaws.

    with FreezingFs(image, point).mounted() as fs, fs.frozen():
        ...

It has thawed at the end, whatever happens in between. Source: ioctl_fifreeze(2), mount(8).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from harness.waiting import wait_until

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_IMAGE_BYTES = 8 << 20


class FreezingFs:
    """Such a file system at `point`, in a file `image`."""

    def __init__(self, image: Path, point: Path) -> None:
        self.image = image
        self.point = point

    @contextlib.contextmanager
    def mounted(self) -> Iterator[FreezingFs]:
        self.point.mkdir(exist_ok=True)
        self.image.write_bytes(b"")
        os.truncate(self.image, _IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", self.image, self.point], check=True, capture_output=True)
        try:
            yield self
        finally:
            self._tell(_FITHAW)
            wait_until(lambda: subprocess.run(["umount", self.point], check=False).returncode == 0, "the unmount")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self._tell(_FIFREEZE)
        try:
            yield
        finally:
            self._tell(_FITHAW)

    def _tell(self, command: int) -> None:
        fd = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError) if command == _FITHAW else contextlib.nullcontext():
                fcntl.ioctl(fd, command, 0)
        finally:
            os.close(fd)
