from qtfs_server.session cimport session

cdef dict session_figures(session *s)
