"""Operations on open directories."""
from qtfs_server.request cimport request

cdef int op_opendir(request *r) noexcept nogil
cdef int op_readdir(request *r) noexcept nogil
