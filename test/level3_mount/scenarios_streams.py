"""What programs do with FIFOs: functions of two directories, `a` and `b`, which are one, seen from two sides.

Each returns what it found; with both directories on an ordinary file system that is what it must find anywhere.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import stat
import struct
import subprocess
import termios
import threading
from collections.abc import Callable
from typing import Any

from forks import catch, children, has_reader, plain_open, plain_read, plain_write
from harness.waiting import wait_until
from kit import outcome

RD, WR, RW, NB = os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_NONBLOCK
PIPE_BYTES = 65536
WAIT_MS = 10_000


def both(a: str, b: str, first: int = RD | NB, second: int = WR | NB) -> tuple[int, int]:
    """A FIFO, opened on either side."""
    os.mkfifo(f"{a}/f")
    return os.open(f"{a}/f", first), os.open(f"{b}/f", second)


def read_all(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := os.read(fd, count - len(data))):
        data += piece
    return data


def events(fd: int, mask: int = 0xFFFF) -> str:
    """What poll(2) says at once."""
    poll = select.poll()
    poll.register(fd, mask)
    return names(poll.poll(0))


def names(found: list[tuple[int, int]]) -> str:
    known = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLRDHUP")
    return " ".join(name for _, bits in found for name in known if bits & getattr(select, name))


def closed(fd: int, other: int, until: str) -> None:
    """Close one end. Elsewhere this is known a moment later: the kernel does not wait for RELEASE."""
    os.close(fd)
    wait_until(lambda: until in events(other), f"{until} at the other end")


# ---- names


def what_it_is(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f", 0o640)
    found: list[Any] = []
    for side in (a, b):
        st = os.stat(f"{side}/f")
        found += [stat.filemode(st.st_mode), st.st_size, st.st_nlink, os.lstat(f"{side}/f").st_mode == st.st_mode]
        found += [subprocess.call(["test", "-p", f"{side}/f"])]
        found += [subprocess.check_output(["find", ".", "-type", "p"], cwd=side)]
        found += [subprocess.check_output(["ls", "-l", "."], cwd=side).splitlines()[1][:10]]
        found += [[entry.is_file() for entry in os.scandir(side)], os.access(f"{side}/f", os.R_OK | os.X_OK)]
    return found


def names_change(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    os.chmod(f"{b}/f", 0o600)
    os.chown(f"{b}/f", 5, 6)
    os.utime(f"{b}/f", ns=(1, 2))
    os.link(f"{b}/f", f"{b}/g")
    os.rename(f"{b}/f", f"{b}/h")
    st = os.stat(f"{b}/g")
    found: list[Any] = [stat.filemode(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, st.st_nlink]
    reader, writer = os.open(f"{b}/g", RD | NB), os.open(f"{b}/h", WR | NB)
    os.write(writer, b"through another name")
    found += [os.read(reader, 100), outcome(os.truncate, f"{b}/g", 0), outcome(os.mkfifo, f"{b}/g")]
    return found, os.unlink(f"{b}/g"), sorted(os.listdir(a))


def through_o_path(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    held = os.open(f"{b}/f", os.O_PATH)
    reader = os.open(f"/proc/self/fd/{held}", RD | NB)
    writer = os.open(f"{a}/f", WR)
    os.write(writer, b"data")
    return os.read(reader, 10)


def gone_while_open(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.unlink(f"{b}/f")
    os.write(writer, b"still")
    return os.read(reader, 10), sorted(os.listdir(a)), outcome(os.stat, f"{b}/f")


def stat_and_open_at_once(a: str, b: str) -> Any:
    """Threads that look and threads that open never get what is for the others."""
    os.mkfifo(f"{a}/f")
    keep = os.open(f"{a}/f", RW)
    wrong: list[Any] = []

    def look() -> None:
        wrong.extend(not stat.S_ISFIFO(os.stat(f"{b}/f").st_mode) for _ in range(60))

    def use() -> None:
        for _ in range(60):
            fd = os.open(f"{b}/f", WR)
            wrong.append(os.write(fd, b"x") != 1)
            os.close(fd)

    threads = [threading.Thread(target=target) for target in (look, use, look, use)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return any(wrong), len(wrong), read_all(keep, 120)


# ---- opening


def opens_that_need_not_wait(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    found = [outcome(os.open, f"{b}/f", WR | NB), outcome(os.open, f"{a}/f", WR | NB)]
    reader = os.open(f"{b}/f", RD | NB)
    for flags in (WR, WR | NB, RW, WR | os.O_APPEND, WR | os.O_TRUNC, WR | os.O_CREAT):
        fd = os.open(f"{a}/f", flags)
        found.append(os.write(fd, b"x"))
        os.close(fd)
    return [
        *found,
        read_all(reader, 6),
        outcome(os.open, f"{b}/f", RD | os.O_DIRECTORY),
        outcome(os.open, f"{b}/f", WR | os.O_CREAT | os.O_EXCL),
    ]


def opens_wait_for_each_other(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    found = []

    def read() -> bytes:
        with open(f"{a}/f", "rb") as file:
            return file.read()

    def write() -> int:
        with open(f"{a}/f", "wb") as file:
            return file.write(b"from the child")

    with children(read) as (child,):
        child.blocks_in("open")
        with open(f"{b}/f", "wb") as file:
            file.write(b"to the child")
        found.append(child.result())
    with children(write) as (child,):
        child.blocks_in("open")
        with open(f"{b}/f", "rb") as file:
            found.append(file.read())
        found.append(child.result())
    return found


def opens_as_somebody(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    keep = os.open(f"{a}/f", RW)
    found = []

    def attempt() -> Any:
        os.setgroups([])
        os.setresgid(2001, 2001, 2001)
        os.setresuid(1001, 1001, 1001)
        return [isinstance(outcome(os.open, f"{b}/f", flags), int) for flags in (RD | NB, WR | NB, RW)]

    for mode in (0o600, 0o604, 0o602, 0o606):
        os.chmod(f"{a}/f", mode)
        with children(attempt) as (child,):
            found.append(child.result())
    os.close(keep)
    return found


# ---- reading and writing


def the_end(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    found = [outcome(os.read, reader, 10), os.write(writer, b"x"), os.read(reader, 10)]
    closed(writer, reader, "POLLHUP")
    found += [os.read(reader, 10), os.read(reader, 10)]
    writer = os.open(f"{b}/f", WR)
    return [*found, outcome(os.read, reader, 10), os.write(writer, b"again"), os.read(reader, 10)]


def waiting_for_data_and_the_end(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.set_blocking(reader, True)

    def read() -> Any:
        os.close(writer)
        return [os.read(reader, 3) for _ in range(3)]

    with children(read) as (child,):
        os.close(reader)
        for data in (b"one", b"two"):
            child.blocks_in("read")
            os.write(writer, data)
        child.blocks_in("read")
        os.close(writer)
        return child.result()


def without_a_reader(a: str, b: str) -> Any:
    """EPIPE, and SIGPIPE unless it is ignored."""
    reader, writer = both(a, b)
    closed(reader, writer, "POLLERR")
    found = [outcome(os.write, writer, b"x"), outcome(os.write, writer, b"")]

    def killed() -> Any:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return os.write(writer, b"x")

    with children(killed) as (child,):
        return [*found, child.result()]


def the_reader_goes_while_a_writer_waits(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.set_blocking(writer, True)
    os.write(writer, bytes(PIPE_BYTES))

    def killed() -> Any:
        os.close(reader)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        return os.write(writer, b"x")

    def ignoring() -> Any:
        os.close(reader)
        return os.write(writer, b"x")

    with children(killed, ignoring) as two:
        for child in two:
            child.blocks_in("write")
        os.close(reader)
        return [child.result() for child in two]


def more_than_fits(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.set_blocking(writer, True)
    os.set_blocking(reader, True)
    data = bytes(range(251)) * 2000

    def write() -> int:
        os.close(reader)
        return os.write(writer, data)

    with children(write) as (child,):
        os.close(writer)
        got = read_all(reader, len(data))
        return got == data, child.result() == len(data), os.read(reader, 10)


def short_of_room(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    found = [os.write(writer, bytes(100_000)), outcome(os.write, writer, b"x"), len(os.read(reader, 4096))]
    found += [os.write(writer, bytes(4096)), outcome(os.write, writer, b"x"), len(os.read(reader, 8192))]
    found += [os.write(writer, bytes(10_000)), len(os.read(reader, 1 << 20)), outcome(os.read, reader, 1)]
    return [*found, outcome(os.read, writer, 1), outcome(os.write, reader, b"x")]


def small_writes_stay_whole(a: str, b: str) -> Any:
    """PIPE_BUF: pipe(7)."""
    reader, first = both(a, b)
    writers = [first, *(os.open(f"{side}/f", WR) for side in (a, b, a))]
    os.set_blocking(reader, True)

    def write(number: int) -> None:
        os.close(reader)
        os.set_blocking(writers[number], True)
        for _ in range(25):
            os.write(writers[number], bytes([number]) * select.PIPE_BUF)

    with children(*(lambda number=number: write(number) for number in range(4))) as all_of_them:
        for fd in writers:
            os.close(fd)
        data = b""
        while piece := os.read(reader, 1 << 20):
            data += piece
        for child in all_of_them:
            child.result()
    pieces = [data[at : at + select.PIPE_BUF] for at in range(0, len(data), select.PIPE_BUF)]
    return len(pieces), {len(set(piece)) for piece in pieces}, sorted(piece[0] for piece in pieces)


def waiting_or_not_is_the_descriptors(a: str, b: str) -> Any:
    reader, writer = both(a, b, second=WR)
    found = [outcome(os.read, reader, 1), os.get_blocking(reader), os.get_blocking(writer)]
    fcntl.fcntl(reader, fcntl.F_SETFL, 0)

    def read() -> bytes:
        return os.read(reader, 10)

    with children(read) as (child,):
        child.blocks_in("read")
        os.write(writer, b"now")
        found.append(child.result())
    os.set_blocking(writer, False)
    return [*found, os.write(writer, bytes(PIPE_BYTES)), outcome(os.write, writer, b"x")]


def how_much_there_is(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    found = []
    for data in (b"", b"12345", bytes(3000)):
        os.write(writer, data)
        events(reader)
        found.append(struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, bytes(4)))[0])
    return found


def no_offsets(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    calls: list[Callable[[], Any]] = [
        lambda: os.lseek(reader, 0, os.SEEK_CUR),
        lambda: os.pread(reader, 1, 0),
        lambda: os.pwrite(writer, b"x", 0),
    ]
    return [outcome(call) for call in calls]


# ---- poll, select, epoll


def poll_step_by_step(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")
    reader = os.open(f"{a}/f", RD | NB)
    found = [events(reader)]
    writer = os.open(f"{b}/f", WR | NB)
    found += [events(reader), events(writer)]
    os.write(writer, b"x")
    found += [
        events(reader),
        events(reader, select.POLLOUT),
        select.select([reader], [writer], [reader], 0) == ([reader], [writer], []),
    ]
    os.write(writer, bytes(PIPE_BYTES))
    found += [events(writer), select.select([reader], [writer], [], 0) == ([reader], [], [])]
    os.read(reader, PIPE_BYTES)
    found.append(events(writer))
    closed(writer, reader, "POLLHUP")
    found += [events(reader), events(reader, 0)]
    writer = os.open(f"{b}/f", WR | NB)
    found.append(events(reader))
    closed(reader, writer, "POLLERR")
    return [*found, events(writer), events(writer, 0), events(writer, select.POLLRDHUP)]


def poll_waits(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    found = []

    def polling() -> Any:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        return names(poll.poll(WAIT_MS))

    def selecting() -> Any:
        return select.select([reader], [], [], WAIT_MS / 1000)[0] == [reader]

    def epolling() -> Any:
        with select.epoll() as epoll:
            epoll.register(reader, select.EPOLLIN | select.EPOLLET)
            return len(epoll.poll(WAIT_MS / 1000))

    with children(polling, epolling) as two:
        two[0].blocks_in("poll")
        two[1].blocks_in("epoll_wait")
        with children(selecting) as (third,):
            third.blocks_in("select")
            os.write(writer, b"x")
            found += [child.result() for child in (*two, third)]
    os.read(reader, 1)
    with children(lambda: (os.close(writer), polling())[1]) as (child,):
        child.blocks_in("poll")
        os.close(writer)
        found.append(child.result())
    return found


def poll_for_room(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.write(writer, bytes(PIPE_BYTES))

    def polling() -> Any:
        os.close(reader)
        poll = select.poll()
        poll.register(writer, select.POLLOUT)
        return names(poll.poll(WAIT_MS))

    with children(polling) as (child,):
        child.blocks_in("poll")
        os.read(reader, PIPE_BYTES)
        found = [child.result()]
    os.write(writer, bytes(PIPE_BYTES))
    with children(polling) as (child,):
        child.blocks_in("poll")
        os.close(reader)
        return [*found, child.result()]


def epoll_edges(a: str, b: str) -> Any:
    """Each arrival once, and nothing without one."""
    reader, writer = both(a, b)
    found = []
    with select.epoll() as epoll:
        epoll.register(reader, select.EPOLLIN | select.EPOLLET | select.EPOLLRDHUP)
        found.append(epoll.poll(0))
        for step in range(5):
            os.write(writer, b"abc")
            found.append(names(epoll.poll(10)))
            found.append(epoll.poll(0))
            if step % 2:
                found.append(len(os.read(reader, 2)))
            found.append(epoll.poll(0))
        epoll.modify(reader, select.EPOLLIN | select.EPOLLET)
        found += [names(epoll.poll(10)), epoll.poll(0)]
        os.close(writer)
        found += [names(epoll.poll(10)), epoll.poll(0)]
    return found


def epoll_levels(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    found = []
    with select.epoll() as epoll:
        epoll.register(reader, select.EPOLLIN)
        for _ in range(3):
            os.write(writer, b"abc")
            found += [names(epoll.poll(10)), names(epoll.poll(10)), os.read(reader, 10), epoll.poll(0)]
        epoll.modify(reader, select.EPOLLIN | select.EPOLLONESHOT)
        os.write(writer, b"abc")
        found += [names(epoll.poll(10)), epoll.poll(0)]
        epoll.unregister(reader)
        found.append(epoll.poll(0))
        epoll.register(writer, select.EPOLLOUT)
        found += [names(epoll.poll(10)), names(epoll.poll(10))]
        closed(reader, writer, "POLLERR")
        found.append(names(epoll.poll(10)))
    return found


def epoll_edges_of_room(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    with select.epoll() as epoll:
        epoll.register(writer, select.EPOLLOUT | select.EPOLLET)
        found = [names(epoll.poll(10)), epoll.poll(0)]
        os.write(writer, bytes(PIPE_BYTES))
        found.append(epoll.poll(0))
        os.read(reader, PIPE_BYTES)
        found += [names(epoll.poll(10)), epoll.poll(0)]
        os.close(reader)
        found.append(names(epoll.poll(10)))
    return found


# ---- signals


def caught_signals(a: str, b: str) -> Any:
    os.mkfifo(f"{a}/f")

    def opening() -> Any:
        catch()
        return plain_open(f"{a}/f", RD)

    found = []
    for call in (opening,):
        with children(call) as (child,):
            found.append(child.blocks_in("open").signal(signal.SIGUSR1).result())
    reader, writer = os.open(f"{b}/f", RD | NB), os.open(f"{b}/f", WR)

    def reading() -> Any:
        catch()
        os.set_blocking(reader, True)
        return plain_read(reader)

    def writing() -> Any:
        catch()
        return plain_write(writer, bytes(1000))

    def writing_much() -> Any:
        catch()
        return plain_write(writer, bytes(3 * PIPE_BYTES))

    with children(reading) as (child,):
        found.append(child.blocks_in("read").signal(signal.SIGUSR1).result())
    with children(writing_much) as (child,):
        child.blocks_in("write")
        wait_until(lambda: events(writer) == "", "the pipe to be full")
        found.append(child.signal(signal.SIGUSR1).result())
    with children(writing) as (child,):
        found.append(child.blocks_in("write").signal(signal.SIGUSR1).result())
    return [*found, len(read_all(reader, PIPE_BYTES))]


def deaths(a: str, b: str) -> Any:
    """Whoever waits dies at once, and nothing is left of it."""
    os.mkfifo(f"{a}/f")
    found = []
    for flags in (RD, WR):
        with children(lambda flags=flags: os.open(f"{b}/f", flags)) as (child,):
            found.append(child.blocks_in("open").dies_of(signal.SIGKILL))
    wait_until(lambda: not has_reader(f"{a}/f"), "the killed reader's open to end")
    both_ends = os.open(f"{b}/f", RW)
    with children(lambda: os.read(both_ends, 10)) as (child,):
        found.append(child.blocks_in("read").dies_of(signal.SIGKILL))
    os.write(both_ends, bytes(PIPE_BYTES))
    for number in (signal.SIGKILL, signal.SIGTERM):
        with children(lambda: os.write(both_ends, b"x")) as (child,):
            found.append(child.blocks_in("write").dies_of(number))
    return [*found, len(os.read(both_ends, 1 << 20))]


def stopped_and_continued(a: str, b: str) -> Any:
    reader, writer = both(a, b)
    os.set_blocking(reader, True)
    with children(lambda: os.read(reader, 10)) as (child,):
        child.blocks_in("read").signal(signal.SIGSTOP)
        wait_until(lambda: child.state() == "T", "it to stop")
        child.signal(signal.SIGCONT).blocks_in("read")
        os.write(writer, b"data")
        return child.result()


# ---- programs


def cat_and_shells(a: str, b: str) -> Any:
    """A FIFO for each: the server hears of a close(2) a round trip later, and would still count the last reader."""
    found = []
    commands = [
        ("cat {reader}", "echo hello > {writer}"),
        ("read -r line < {reader}; echo got $line", "printf 'one\\ntwo\\n' > {writer}"),
        ("wc -c < {reader}", "head -c 300000 /dev/zero | dd of={writer} bs=7000 status=none"),
        ("dd if={reader} bs=100 count=3 iflag=fullblock status=none | wc -c", "printf %1000s x >> {writer} || true"),
        ("while read -r n; do echo $((n * 2)); done < {reader}", "seq 5 > {writer}"),
        ("timeout 10 tail -n 1 {reader}", "seq 100 | tee {writer} | tail -n 1"),
    ]
    for number, (reading, writing) in enumerate(commands):
        os.mkfifo(f"{a}/f{number}")
        reads, writes = reading.format(reader=f"{a}/f{number}"), writing.format(writer=f"{b}/f{number}")
        with_pipes = subprocess.Popen(["bash", "-c", reads], stdout=subprocess.PIPE)
        subprocess.run(["bash", "-c", writes], check=False, timeout=20, stderr=subprocess.DEVNULL)
        found.append((with_pipes.communicate(timeout=20)[0], with_pipes.returncode))
    return found


def asyncio_readers(a: str, b: str) -> Any:
    reader, writer = both(a, b)

    async def main() -> list[bytes]:
        loop = asyncio.get_running_loop()
        got: asyncio.Queue[bytes] = asyncio.Queue()
        loop.add_reader(reader, lambda: got.put_nowait(os.read(reader, 100)))
        found = []
        for number in range(5):
            os.write(writer, b"%d" % number)
            found.append(await asyncio.wait_for(got.get(), 10))
        os.close(writer)
        found.append(await asyncio.wait_for(got.get(), 10))
        loop.remove_reader(reader)
        return found

    return asyncio.run(main())


_HELPERS = (both, read_all, events, names, closed)
#: All of this module, in its order.
SCENARIOS = [x for x in list(globals().values()) if getattr(x, "__module__", "") == __name__ and x not in _HELPERS]
