"""Turns of a thread that looks for a message again and again, and where it does so.

Between two looks it offers its processor to others, sched_yield(2). How long that takes tells who else is there. Some
microseconds: somebody who works with us, such as the engine that makes our reply. If that goes on, the two share a processor
while another may be idle, and waking that one costs more than the work; then one of them moves. More: somebody who
computes. If a message waited for that, we rest, and sleep for our messages as others do. If none did, it may have been the very
program that will send us the next one.
"""
from libc.stdint cimport int64_t

from qtfs_common.rings.memory cimport ring_pause
from qtfs_common.transport cimport now_us

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sched.h>
    """

cdef extern from "<sched.h>" nogil:
    ctypedef struct cpu_set_t:
        pass
    int sched_yield()
    int sched_getcpu()
    int sched_getaffinity(int, size_t, cpu_set_t *)
    int sched_setaffinity(int, size_t, const cpu_set_t *)
    void CPU_CLR(int, cpu_set_t *)
    int CPU_COUNT(const cpu_set_t *)

cdef enum:
    SHARED_US = 3                   # a turn that takes longer was somebody else's too
    COMPUTED_US = 300               # one that takes so long was that of a program that computes
    AGAIN_US = 10000                # two of those within that time: it still does
    FIRST_REST_US = 20000
    LONGEST_REST_US = 640000
    FIRST_MOVE_US = 5000
    LONGEST_MOVE_US = 1000000


cdef bint spin_begin(spinner *s, int64_t now) noexcept nogil:
    """Begin a search; False if somebody else needs the processor, as far as we know."""
    s.spent_us = s.long_us = 0
    return now >= s.rest_until_us


cdef void _rest(spinner *s, int64_t now, int64_t later) noexcept nogil:
    """Rest for a while if this is the second long turn within a short time: one alone may be the hypervisor's."""
    if now - s.computed_us < AGAIN_US:
        s.rest_us = min(max(2 * s.rest_us, <int64_t>FIRST_REST_US), <int64_t>LONGEST_REST_US) \
            if later < s.rest_until_us + 10 * s.rest_us else FIRST_REST_US
        s.rest_until_us = later + s.rest_us
    s.computed_us = later


cdef int64_t spin_turn(spinner *s, int64_t now) noexcept nogil:
    """Let others run, if there are any; the time afterwards (now_us)."""
    cdef int64_t later, took
    ring_pause()
    sched_yield()
    later = now_us()
    took = later - now
    s.spent_us += took if took < SHARED_US else 1
    s.long_us = took if took >= COMPUTED_US else 0
    if SHARED_US <= took < COMPUTED_US:
        s.shared += 2
    elif s.long_us == 0 and s.shared > 0:
        s.shared -= 1
    return later


cdef void spin_found(spinner *s, int64_t now) noexcept nogil:
    """What was looked for is there. If the last turn was a long one it may have waited, and had better found us asleep."""
    if s.long_us > 0:
        _rest(s, now - s.long_us, now)


cdef bint spin_shares(spinner *s, int patience, int64_t now) noexcept nogil:
    """Whether so many turns of late were shared that it is time to move; asked again, it takes longer each time."""
    if s.shared < 2 * patience or now < s.next_move_us:
        return False
    s.shared = 0
    s.move_pause_us = min(2 * s.move_pause_us, <int64_t>LONGEST_MOVE_US) \
        if now < s.next_move_us + 4 * s.move_pause_us else FIRST_MOVE_US
    s.next_move_us = now + s.move_pause_us
    return True


cdef void _visit(const cpu_set_t *allowed, const cpu_set_t *where) noexcept nogil:
    """Go there at once; the scheduler may take us elsewhere later."""
    if CPU_COUNT(where) > 0 and sched_setaffinity(0, sizeof(cpu_set_t), where) == 0:
        sched_setaffinity(0, sizeof(cpu_set_t), allowed)


cdef void move_away() noexcept nogil:
    """To any other processor that we may use."""
    cdef cpu_set_t allowed, others
    if sched_getaffinity(0, sizeof(allowed), &allowed) == 0:
        others = allowed
        CPU_CLR(sched_getcpu(), &others)
        _visit(&allowed, &others)
