"""What a worker thread has for itself."""
from libc.stdint cimport uint8_t

from qtfs_common.protocol cimport MAX_MESSAGE
from qtfs_common.spinning cimport spinner
from qtfs_server.dispatch cimport counters
from qtfs_server.identity cimport identity
from qtfs_server.splicing cimport splice_pipe

cdef enum:
    BUFFER_BYTES = MAX_MESSAGE + 8192

cdef struct worker:
    identity me
    uint8_t *inbox
    uint8_t *outbox
    uint8_t *scratch
    counters count
    spinner spinner
    splice_pipe pipe
    int spin_credit                 # positive while spinning pays
