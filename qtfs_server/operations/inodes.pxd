"""Operations on a node itself."""
from qtfs_server.request cimport request

cdef int op_getattr(request *r) noexcept nogil
cdef int op_setattr(request *r) noexcept nogil
cdef int op_statx(request *r) noexcept nogil
cdef int op_readlink(request *r) noexcept nogil
cdef int op_access(request *r) noexcept nogil
cdef int op_statfs(request *r) noexcept nogil
cdef int op_syncfs(request *r) noexcept nogil
cdef int op_getxattr(request *r) noexcept nogil
cdef int op_listxattr(request *r) noexcept nogil
cdef int op_setxattr(request *r) noexcept nogil
cdef int op_removexattr(request *r) noexcept nogil
