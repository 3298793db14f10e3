"""Operations on open files."""
from qtfs_server.request cimport request

cdef int op_open(request *r) noexcept nogil
cdef int op_create(request *r) noexcept nogil
cdef int op_tmpfile(request *r) noexcept nogil
cdef int op_read(request *r) noexcept nogil
cdef int op_write(request *r) noexcept nogil
cdef int op_release(request *r) noexcept nogil
cdef int op_flush(request *r) noexcept nogil
cdef int op_fsync(request *r) noexcept nogil
cdef int op_fallocate(request *r) noexcept nogil
cdef int op_lseek(request *r) noexcept nogil
cdef int op_copy_file_range(request *r) noexcept nogil
cdef int op_ioctl(request *r) noexcept nogil
