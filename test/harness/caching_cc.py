"""A C compiler that does not compile the same file twice: caching_cc.py DIRECTORY CC ARGUMENT...

What it is asked to compile is known by its content and by all arguments but the names of source and object, and where
the system's headers are, which are taken to stay as they are. Headers of ours count. Objects are kept in DIRECTORY.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def _object_and_key(arguments: Sequence[str]) -> tuple[Path, str] | None:
    """Where the object of one source goes, and what tells it from others; None: that is no compilation."""
    if "-c" not in arguments or "-o" not in arguments:
        return None
    target = arguments[arguments.index("-o") + 1]
    sources = [word for word in arguments if word.endswith(".c")]
    if len(sources) != 1:
        return None
    words = [word for word in arguments if word not in (target, sources[0]) and not word.startswith("-I/")]
    digest = hashlib.sha256("\0".join(words).encode())
    for path in (Path(sources[0]), *sorted(Path().rglob("*.h"))):
        digest.update(path.read_bytes())
    return Path(target), digest.hexdigest()


def main() -> int:
    directory, *command = sys.argv[1:]
    found = _object_and_key(command)
    if found is None:
        return subprocess.run(command, check=False).returncode
    target, key = found
    kept = Path(directory) / key
    if not kept.exists():
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return status
        partial = kept.with_name(f"{key}.{os.getpid()}")
        shutil.copyfile(target, partial)
        os.replace(partial, kept)
        return 0
    shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
