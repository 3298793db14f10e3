"""Long WRITEs, begun before all of them has come."""
from libc.stdint cimport int64_t

from qtfs_common.transport cimport message
from qtfs_server.connection cimport connection
from qtfs_server.worker cimport worker

cdef void write_early(worker *w, connection *c, message *msg, int64_t until_us) noexcept nogil
