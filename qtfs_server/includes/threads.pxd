"""Threads that Python does not know: detached, with a stack of 128 KiB. Source: pthread_create(3)."""

cdef extern from *:
    """
    #include <pthread.h>

    static int qtfs_start_thread(void *(*run)(void *), pthread_t *thread)
    {
        pthread_attr_t attributes;
        int error;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, 128 * 1024);
        error = pthread_create(thread, &attributes, run, NULL);
        pthread_attr_destroy(&attributes);
        return error;
    }
    """
    ctypedef unsigned long pthread_t
    int start_thread "qtfs_start_thread"(void *(*)(void *) noexcept nogil, pthread_t *) nogil
