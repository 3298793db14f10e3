"""Loop devices: image files as block devices, loop(4)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import ExitStack

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_READ_ONLY = 1
_AUTOCLEAR = 4
#: struct loop_config of <linux/loop.h>: descriptor, block size, then struct loop_info64 and 8 reserved words.
_CONFIG = struct.Struct("<II5Q4I64s64s32s2Q8Q")
_ATTEMPTS = 16


def _config(image: int, name: bytes, read_only: bool) -> bytes:
    flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0)
    return _CONFIG.pack(image, 0, *[0] * 8, flags, name[:63], b"", b"", *[0] * 10)


def attach(stack: ExitStack, image: int, name: bytes, read_only: bool) -> bytes:
    """A block device's path for the regular file of a descriptor, O_PATH will do; it goes with its last user.

    What the stack closes keeps the device until it is mounted. `name` is shown by losetup(8).
    """
    if not stat.S_ISREG(os.fstat(image).st_mode):
        raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
    opened = os.open(f"/proc/self/fd/{image}", os.O_RDONLY if read_only else os.O_RDWR)
    stack.callback(os.close, opened)
    control = os.open("/dev/loop-control", os.O_RDWR)
    stack.callback(os.close, control)
    for attempt in range(_ATTEMPTS):
        path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        device = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        stack.callback(os.close, device)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _config(opened, name, read_only))
            return os.fsencode(path)
        except OSError as error:
            # Somebody else took it between the two calls.
            if error.errno != errno.EBUSY or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")
