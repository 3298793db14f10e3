"""Looking after channels whose other side is on another machine, where no bell can be heard.

A `Link` holds the far end of each channel's bell and rings in the other side's stead when it sees in the memory that there is
something to wake for. It looks again after 50 µs when there was something, then less often the longer there is nothing:
after an eighth of that time, and 4 ms at most, or 16 once that is long ago. Each look wakes a processor. It also keeps our
beat going, and hangs up where the other side's has stopped.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close, usleep

from qtfs_common.rings.layout cimport BELL_LINK, RING_CHANNELS, SLEEPS_FOR_MESSAGES, SLEEPS_FOR_ROOM, ring_line
from qtfs_common.rings.memory cimport RingMemory, client_line, control, engine_line, is_lost, ring_load, ring_load_32, \
    ring_publish
from qtfs_common.transport cimport now_us

import threading

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)

cdef enum:
    SHORTEST_US = 50
    QUIET_US = 4000                 # longest pause when there was something to ring for within
    LONG_US = 2000000
    LONGEST_US = 16000
    BEAT_US = 200000
    DEAD_US = 5000000               # a beat that did not come for so long has stopped

cdef struct linked:                 # one channel
    int fd                          # the far end of its bell; 0: none
    bint accepted                   # the engine has taken the claim up
    uint64_t epoch                  # stays when it is over
    uint64_t seen_head
    uint64_t beat                   # of the other side, when it last changed
    int64_t beat_us


cdef int64_t _pause_us(int64_t quiet_us) noexcept:
    """Until the next look, when there has been nothing to ring for that long."""
    return max(<int64_t>SHORTEST_US, min(quiet_us // 8, <int64_t>QUIET_US if quiet_us < LONG_US else <int64_t>LONGEST_US))


cdef bint _ring(linked *l) noexcept nogil:
    send(l.fd, b"\0", 1, MSG_DONTWAIT | MSG_NOSIGNAL)
    return True


cdef class Link:
    """The channels of one memory, on one side of it. One thread calls `watch` again and again."""
    cdef RingMemory memory
    cdef bint serves
    cdef object guard
    cdef linked channels[RING_CHANNELS]
    cdef uint32_t count
    cdef int64_t beaten_us
    cdef int64_t pause_us
    cdef int64_t rung_us            # when there was last something to ring for

    def __cinit__(self, RingMemory memory not None, bint serves):
        """`serves`: on the engine's side."""
        self.memory = memory
        self.serves = serves
        self.guard = threading.Lock()
        self.pause_us = SHORTEST_US
        memset(self.channels, 0, sizeof(self.channels))

    def __dealloc__(self):
        cdef uint32_t number
        for number in range(<uint32_t>RING_CHANNELS):
            if self.channels[number].fd > 0:
                close(self.channels[number].fd)

    @property
    def busy(self) -> bool:
        """Whether there is any channel to look after."""
        return self.count > 0

    def add(self, uint32_t number, uint64_t epoch, int fd) -> None:
        """Look after a channel from now on; the descriptor, one end of a socket pair, becomes ours."""
        cdef linked *l = &self.channels[number]
        with self.guard:
            self._drop(number)
            l.epoch = epoch
            l.accepted = False
            l.seen_head = l.beat = 0
            l.beat_us = self.rung_us = now_us()
            l.fd = fd
            self.count += 1
            self.pause_us = SHORTEST_US

    def claims(self) -> list[tuple[int, int]]:
        """As the engine: (number, epoch) of channels that clients on other machines have claimed and nobody serves."""
        cdef list found = []
        cdef uint32_t number
        cdef ring_line *line
        cdef uint64_t epoch
        for number in range(self.memory.m.channels):
            line = client_line(&self.memory.m, number)
            epoch = ring_load(&line.epoch)
            # A claim that was served before and ended is that of a client which died without taking it back.
            if epoch and line.bell == BELL_LINK and line.instance == self.memory.m.instance and \
                    self.channels[number].epoch != epoch and \
                    ring_load(&engine_line(&self.memory.m, number).epoch) != epoch:
                found.append((number, epoch))
        return found

    def watch(self, double for_s) -> None:
        """Look after all channels for that long."""
        cdef int64_t until = now_us() + <int64_t>(for_s * 1e6)
        cdef int64_t now = 0
        while now < until:
            with self.guard:
                now = now_us()
                self._look(now)
            with nogil:
                usleep(<unsigned int>min(self.pause_us, max(until - now, 1)))

    cdef void _look(self, int64_t now) noexcept:
        cdef bint rung = False
        cdef bint housekeeping = now - self.beaten_us >= BEAT_US
        cdef uint32_t number
        with nogil:
            for number in range(self.memory.m.channels):
                if self.channels[number].fd > 0:
                    rung |= self._look_at(number)
                    if housekeeping and self.channels[number].fd > 0:
                        self._see_to(number, now)
            if housekeeping:
                self.beaten_us = now
                if self.serves and not is_lost(&self.memory.m):
                    ring_publish(&control(&self.memory.m).beat, control(&self.memory.m).beat + 1)
        if rung:
            self.rung_us = now
        self.pause_us = BEAT_US if self.count == 0 else _pause_us(now - self.rung_us)

    cdef bint _look_at(self, uint32_t number) noexcept nogil:
        """Ring if our side sleeps and has something to wake for; hang up if the other side has gone."""
        cdef linked *l = &self.channels[number]
        cdef ring_line *ours = engine_line(&self.memory.m, number) if self.serves else client_line(&self.memory.m, number)
        cdef ring_line *theirs = client_line(&self.memory.m, number) if self.serves else engine_line(&self.memory.m, number)
        cdef uint32_t sleeping = ring_load_32(&ours.sleeping)
        cdef uint64_t head = ring_load(&theirs.head)
        cdef bint is_theirs = ring_load(&theirs.epoch) == l.epoch
        if is_theirs and not l.accepted:
            l.accepted = True
            return _ring(l)
        if l.accepted and not is_theirs or is_lost(&self.memory.m):
            self._drop(number)
            return True
        if sleeping & SLEEPS_FOR_MESSAGES and ring_load(&theirs.tail) != ours.head:
            return _ring(l)
        if sleeping & SLEEPS_FOR_ROOM and head != l.seen_head:
            l.seen_head = head
            return _ring(l)
        return False

    cdef void _see_to(self, uint32_t number, int64_t now) noexcept nogil:
        """Show that we live, and see that the other side does and that ours still wants the channel."""
        cdef linked *l = &self.channels[number]
        cdef ring_line *client = client_line(&self.memory.m, number)
        cdef uint64_t beat = ring_load(&client.beat if self.serves else &control(&self.memory.m).beat)
        cdef char rings[64]
        cdef ssize_t got = recv(l.fd, rings, sizeof(rings), MSG_DONTWAIT)
        if beat != l.beat:
            l.beat = beat
            l.beat_us = now
        if got == 0 or got < 0 and errno not in (EAGAIN, EINTR) or now - l.beat_us > DEAD_US:
            self._drop(number)
        elif not self.serves:
            ring_publish(&client.beat, client.beat + 1)

    cdef void _drop(self, uint32_t number) noexcept nogil:
        if self.channels[number].fd > 0:
            close(self.channels[number].fd)
            self.channels[number].fd = 0
            self.count = self.count - 1     # nonecheck, in debug builds, knows no -= without the GIL
            if not self.channels[number].accepted:
                self.channels[number].epoch = 0     # it was turned down, and may be tried again
