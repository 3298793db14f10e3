"""Operations on names in a directory."""
from qtfs_server.request cimport request

cdef int op_lookup(request *r) noexcept nogil
cdef int op_forget(request *r) noexcept nogil
cdef int op_symlink(request *r) noexcept nogil
cdef int op_mknod(request *r) noexcept nogil
cdef int op_mkdir(request *r) noexcept nogil
cdef int op_unlink(request *r) noexcept nogil
cdef int op_rmdir(request *r) noexcept nogil
cdef int op_rename(request *r) noexcept nogil
cdef int op_link(request *r) noexcept nogil
