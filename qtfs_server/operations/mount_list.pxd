from qtfs_server.request cimport request

cdef int op_list_mounts(request *r) noexcept nogil
