"""What sessions share."""
from libc.stdint cimport int64_t, uint32_t

from qtfs_server.session cimport session

cdef enum share:                    # as many as session.MAX_SHARES
    SHARE_LOCK_WAITS                # SETLKW that wait
    SHARE_LOCK_RANGES
    SHARE_OPENINGS                  # opens of FIFOs that wait
    SHARE_STREAM_WAITS              # READ and WRITE of FIFOs and devices that wait
    SHARE_STREAM_BYTES              # data of those WRITEs

cdef uint32_t max_nodes            # of a session
cdef uint32_t max_handles

cdef bint share_take(session *s, share what, int64_t amount) noexcept nogil
cdef void share_give(session *s, share what, int64_t amount) noexcept nogil
