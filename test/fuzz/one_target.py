"""Fuzzes one target in this process, and says at the end what came of it, as a line of JSON.

    one_target.py TARGET --mutations N --seed S         mutations of the seeds, without coverage
    one_target.py TARGET --seconds N --corpus DIR       coverage-guided, by atheris (libFuzzer)
    one_target.py TARGET --input FILE ...               these inputs, once each: to look at a crash again

With coverage it has to be run over modules built for it: `make fuzz` does that. It has a mount namespace of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutation import inputs

TARGETS = ("engine-unix", "engine-shm", "client", "handshake")
LONGEST_INPUT = 8192


def make(name: str, area: Path) -> tuple[Any, list[bytes]]:
    """A target and its seeds."""
    if name.startswith("engine-"):
        from engine_target import EngineTarget, engine_seeds

        return EngineTarget(area, name.removeprefix("engine-")), engine_seeds()
    if name == "client":
        from client_target import ClientTarget, client_seeds

        return ClientTarget(), client_seeds()
    from handshake_target import HandshakeTarget, handshake_seeds

    return HandshakeTarget(area), handshake_seeds()


def tell_of_threads() -> None:
    """What each thread of this process waits for, for whoever has to find out why an execution failed."""
    for task in Path("/proc/self/task").iterdir():
        for name in ("comm", "syscall", "stack"):
            with contextlib.suppress(OSError):  # it has ended, or the kernel keeps no stacks
                print(task.name, name, (task / name).read_text().replace("\n", " "), file=sys.stderr)


def run(target: Any, data: bytes) -> None:
    """An execution; of one that fails, its input and what the threads are at."""
    try:
        target.one(data)
    except Exception:
        print(f"input {target.runs}: {data.hex()}", file=sys.stderr)
        tell_of_threads()
        raise


class Report:
    """What came of it: printed once, when everything has ended well."""

    def __init__(self, name: str, target: Any, area: Path) -> None:
        self.target = target
        self._name = name
        self._area = area
        self._began = time.monotonic()

    def finish(self) -> None:
        self.target.close()
        names = ("runs", "malformed", "breaks", "grown_descriptors", "grown_bytes")
        found = {name: getattr(self.target, name) for name in names if hasattr(self.target, name)}
        shutil.rmtree(self._area)
        print(json.dumps({"target": self._name, **found, "seconds": round(time.monotonic() - self._began, 1)}))
        sys.stdout.flush()


def guided(report: Report, seeds: list[bytes], corpus: Path, seconds: int) -> None:
    """libFuzzer's loop. It would end the process its own way, so we do when the time is over."""
    import atheris

    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    deadline = time.monotonic() + seconds

    def one(data: bytes) -> None:
        report.target.one(data)
        if time.monotonic() > deadline:
            report.finish()
            os._exit(0)

    arguments = [sys.argv[0], str(corpus), f"-max_len={LONGEST_INPUT}", "-timeout=60", "-rss_limit_mb=4096"]
    arguments.append("-handle_xfsz=0")  # a file that must not grow is an errno
    atheris.Setup([*arguments, f"-artifact_prefix={corpus.parent}/{corpus.name}-"], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz one target.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--input", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    if options.seconds:
        import atheris  # noqa: F401  before the modules that it is to see
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # what is refused is logged, every time
    os.environ.pop("LD_PRELOAD", None)  # mount(8) and umount(8) need none of it
    area = Path(tempfile.mkdtemp(prefix="qtfs-fuzz-"))
    area.chmod(0o755)
    target, seeds = make(options.target, area)
    report = Report(options.target, target, area)
    if options.seconds:
        guided(report, seeds, options.corpus, options.seconds)
    for path in options.input:
        run(target, path.read_bytes())
    for data in inputs(seeds, options.mutations, options.seed) if options.mutations else ():
        run(target, data)
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
