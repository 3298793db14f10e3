"""`make fuzz`: hostile bytes for both decoders and the whole engine, target by target; what came of it, as a table.

With modules built by clang and with atheris it is guided by coverage (libFuzzer, address sanitizer); without either it
makes do with mutations, and says so. The exit status is 1 if a target crashed, hung, or kept descriptors or memory; the
input that did it is then in build/fuzz/corpus. Corpora stay there, so that the next run goes on where this one ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from one_target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/fuzz"
#: What allocators and libFuzzer's own corpus may keep. Without sanitizers the tests demand far less.
LARGEST_GROWTH_BYTES = 512 << 20
MUTATIONS_PER_SECOND = 500


@dataclass
class Outcome:
    """Of one target."""

    target: str
    status: int
    found: dict[str, Any]
    coverage: str
    log: Path

    @property
    def failed(self) -> bool:
        return self.status != 0 or self.found.get("grown_bytes", 0) > LARGEST_GROWTH_BYTES

    def row(self) -> str:
        found = self.found
        cells = [found.get("runs", "-"), found.get("malformed", "-"), found.get("grown_descriptors", "-")]
        grown = f"{found['grown_bytes'] >> 10} KiB" if "grown_bytes" in found else "-"
        verdict = f"FAILED ({self.status}), see {self.log}" if self.failed else "ok"
        return " ".join(f"{cell!s:>12}" for cell in (*cells, grown, self.coverage)) + f"  {self.target}: {verdict}"


def can_be_guided() -> bool:
    """Whether there are instrumented modules, and atheris."""
    return importlib.util.find_spec("atheris") is not None and (BUILD / "lib/qtfs_server").is_dir()


def environment(guided: bool) -> dict[str, str]:
    if not guided:
        return {**os.environ, "PYTHONPATH": str(ROOT)}
    import atheris

    sanitizer = Path(atheris.path()) / "asan_with_fuzzer.so"
    # The interpreter's leaks would drown ours, which grow, and growth is seen.
    options = "detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0"
    return {**os.environ, "PYTHONPATH": str(BUILD / "lib"), "LD_PRELOAD": str(sanitizer), "ASAN_OPTIONS": options}


def fuzz(target: str, seconds: int, guided: bool) -> Outcome:
    log = BUILD / f"{target}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("one_target.py")), target]
    if guided:
        command += ["--seconds", str(seconds), "--corpus", str(BUILD / "corpus" / target)]
    else:
        command += ["--mutations", str(seconds * MUTATIONS_PER_SECOND), "--seed", "2"]
    with log.open("wb") as errors, tempfile.TemporaryDirectory() as area:
        variables = environment(guided) | {"TMPDIR": area}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=errors, check=False)
        errors.write(done.stdout)  # where atheris shows an exception
        for share in Path(area).glob("*/share"):  # of one that crashed
            subprocess.run(["umount", "-R", share], capture_output=True, check=False)
    reports = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith('{"target"')]
    covered = re.findall(r" cov: (\d+) ", log.read_text(errors="replace"))
    found = json.loads(reports[-1]) if reports else {}
    return Outcome(target, done.returncode, found, covered[-1] if covered else "-", log)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz qtfs.")
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together (600)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    options = parser.parse_args()
    targets = options.target or TARGETS
    guided = can_be_guided()
    print("fuzz: guided by coverage (atheris)" if guided else "fuzz: WITHOUT coverage: clang or atheris is not here")
    names = ("executions", "malformed", "descriptors", "memory", "coverage")
    print(" ".join(f"{name:>12}" for name in names) + "  target", flush=True)
    failed = 0
    for target in targets:
        outcome = fuzz(target, max(1, options.seconds // len(targets)), guided)
        failed += outcome.failed
        print(outcome.row(), flush=True)
    print(f"fuzz: {failed} of {len(targets)} targets failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
