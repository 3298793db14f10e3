"""Looking for something without sleeping, and without taking the processor from those who could use it."""
from libc.stdint cimport int64_t

cdef enum:
    SPIN_CAP_US = 2000              # longest search, whatever ran on the processor meanwhile

cdef struct spinner:                # a thread's own
    int64_t spent_us                # in this search: our own turns, not those that others had
    int shared                      # turns of late in which somebody else ran on our processor
    int64_t next_move_us            # not before
    int64_t move_pause_us
    int64_t long_us                 # how long the last turn was, if somebody computed in it; else 0
    int64_t computed_us             # when a turn was last that of a program that computes
    int64_t rest_until_us           # somebody else needs the processor
    int64_t rest_us

cdef bint spin_begin(spinner *s, int64_t now) noexcept nogil
cdef int64_t spin_turn(spinner *s, int64_t now) noexcept nogil
cdef void spin_found(spinner *s, int64_t now) noexcept nogil
cdef bint spin_shares(spinner *s, int patience, int64_t now) noexcept nogil
cdef void move_away() noexcept nogil
