"""demo/cfifo_r and demo/cfifo_w: ordinary FIFO programs, run by the system's Python without our packages."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness.leaks import descriptors, environment
from harness.waiting import wait_until

DEMO = Path(__file__).resolve().parents[2] / "demo"
END_S = 10


@contextmanager
def demo(name: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """Neither our environment's Python nor our packages are found."""
    variables = {**environment(), "PATH": "/usr/bin:/bin", "PYTHONPATH": "", "PYENV_VERSION": "system"}
    process = subprocess.Popen(
        [DEMO / name, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=variables,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def reads_from(process: subprocess.Popen[bytes], fifo: Path) -> bool:
    """Whether it has the FIFO open."""
    return str(fifo) in descriptors(process.pid).values()


@pytest.fixture
def fifos(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"fifo-{number}" for number in range(5)]
    for path in made:
        os.mkfifo(path)
    return made


def test_many_fifos_and_their_writers(fifos: list[Path]) -> None:
    """Everything that is written comes out, each FIFO is dropped with its writer, the program ends with the last."""
    with demo("cfifo_r", "-v", *fifos) as reader, ExitStack() as stack:
        wait_until(lambda: reads_from(reader, fifos[-1]), "the FIFOs to be open")
        writers = [stack.enter_context(demo("cfifo_w", fifo)) for fifo in fifos]
        expected = 0
        for number, writer in enumerate(writers):
            assert writer.stdin is not None
            writer.stdin.write(b"%d" % number * 10_000)
            writer.stdin.flush()
            expected += 10_000
        assert reader.stdout is not None
        assert sorted(reader.stdout.read(expected)) == sorted(b"01234" * 10_000)
        for number, writer in enumerate(writers):
            assert writer.communicate(timeout=END_S) == (b"", b"") and writer.returncode == 0
            assert reader.stderr is not None
            assert reader.stderr.readline() == b"cfifo_r: %s: no writer any more\n" % bytes(fifos[number])
        assert reader.communicate(timeout=END_S) == (b"", b"") and reader.returncode == 0


def test_blocks_are_not_split(fifos: list[Path]) -> None:
    """Two writers at once: blocks of 256 bytes never mix."""
    with demo("cfifo_r", fifos[0]) as reader:
        wait_until(lambda: reads_from(reader, fifos[0]), "the FIFO to be open")
        with demo("cfifo_w", fifos[0]) as one, demo("cfifo_w", fifos[0]) as two:
            # Or the reader may end with the first writer, before the second has come.
            wait_until(lambda: reads_from(one, fifos[0]) and reads_from(two, fifos[0]), "both writers to be there")
            for _ in range(200):
                for writer, letter in ((one, b"a"), (two, b"b")):
                    assert writer.stdin is not None
                    writer.stdin.write(letter * 256)
            for writer in (one, two):
                writer.communicate(timeout=END_S)
        said, _ = reader.communicate(timeout=END_S)
    blocks = [said[at : at + 256] for at in range(0, len(said), 256)]
    assert sorted(blocks) == [b"a" * 256] * 200 + [b"b" * 256] * 200


def test_a_writer_whose_reader_goes_says_so(fifos: list[Path]) -> None:
    with demo("cfifo_w", fifos[0]) as writer:
        fd = os.open(fifos[0], os.O_RDONLY)
        assert writer.stdin is not None
        writer.stdin.write(b"first")
        writer.stdin.flush()
        wait_until(lambda: reads_from(writer, fifos[0]), "the writer to have it open")
        os.close(fd)
        _, complaint = writer.communicate(b"x" * 1000, timeout=END_S)
    assert writer.returncode == 1 and complaint == b"cfifo_w: %s: Broken pipe\n" % bytes(fifos[0])


def test_a_file_that_is_no_fifo(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in ((tmp_path / "file", b"Operation not permitted"), (tmp_path / "absent", b"No such file")):
        with demo("cfifo_r", name) as reader:
            _, complaint = reader.communicate(timeout=END_S)
        assert reader.returncode == 1 and complaint.startswith(b"cfifo_r: %s: %s" % (bytes(name), reason))


def test_interrupted(fifos: list[Path]) -> None:
    with demo("cfifo_r", *fifos) as reader:
        wait_until(lambda: reads_from(reader, fifos[-1]), "the FIFOs to be open")
        reader.send_signal(signal.SIGINT)
        assert reader.communicate(timeout=END_S) == (b"", b"")
        assert reader.returncode == 128 + signal.SIGINT
