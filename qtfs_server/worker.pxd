"""What a worker thread has for itself."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from qtfs_common.pipes cimport splice_pipe
from qtfs_common.protocol cimport MAX_MESSAGE
from qtfs_common.spinning cimport spinner
from qtfs_server.dispatch cimport counters
from qtfs_server.identity cimport identity
from qtfs_server.request cimport execution

cdef enum:
    BUFFER_BYTES = MAX_MESSAGE + 8192

cdef struct worker:
    worker *next                    # in all_workers
    identity me
    uint8_t *inbox
    uint8_t *outbox
    uint8_t *scratch
    counters count
    spinner spinner
    splice_pipe pipe
    int spin_credit                 # positive while spinning pays
    execution at
    uint64_t turns                  # how many at.turn has counted
    # of whoever watches the workers
    uint64_t seen_turn
    int64_t seen_us                 # when it first was that one
    uint64_t judged_turn            # the one that stuck_on is about
    uint64_t stuck_on               # st_dev of what it is stuck on; 0: unknown
