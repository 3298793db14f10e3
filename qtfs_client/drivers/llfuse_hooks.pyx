"""What llfuse 1.x cannot express, added to its replies on their way to libfuse 2.

llfuse reports a node's id as its inode number, and opens every file with keep_cache and without direct_io. The functions
below have names of libfuse's, and lie in the process's global scope if this module is loaded with RTLD_GLOBAL before
llfuse is. So llfuse calls them (dlopen(3); LD_PRELOAD works the same way), and they call libfuse's own. A handler says
by `next_reply` what the reply that llfuse sends next on this thread is to carry.

No other user of libfuse's request functions may live in the process. Sources: fuse_lowlevel.h and fuse_common.h of libfuse
2.9 (API 26), whose structures are repeated here.
"""
from libc.stdint cimport uint64_t
from posix.stat cimport struct_stat

import os
import threading

cdef extern from *:
    """
    static __thread unsigned long long qtfs_next_inode;
    static __thread unsigned int qtfs_next_bits;
    """
    uint64_t qtfs_next_inode
    unsigned int qtfs_next_bits

cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)

cdef extern from "<signal.h>" nogil:
    enum:
        SIGUSR1
    ctypedef struct sigset_t:
        pass
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int sigaction(int, const sigaction_t *, sigaction_t *)
    void (*SIG_DFL)(int) noexcept nogil

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_tgkill

cdef extern from "<unistd.h>" nogil:
    long syscall(long, ...)

ctypedef struct fuse_entry_param:
    unsigned long node
    unsigned long generation
    struct_stat attr
    double attr_timeout
    double entry_timeout

ctypedef struct fuse_file_info:
    int flags
    unsigned long fh_old
    int writepage
    unsigned int bits
    uint64_t fh
    uint64_t lock_owner

cdef enum:                          # fuse_file_info.bits
    FILE_DIRECT_IO = 1
    FILE_KEEP_CACHE = 2

DIRECT_IO = FILE_DIRECT_IO
KEEP_CACHE = FILE_KEEP_CACHE

ctypedef int (*entry_function)(void *, const fuse_entry_param *) noexcept nogil
ctypedef int (*attr_function)(void *, const struct_stat *, double) noexcept nogil
ctypedef int (*open_function)(void *, const fuse_file_info *) noexcept nogil
ctypedef int (*create_function)(void *, const fuse_entry_param *, const fuse_file_info *) noexcept nogil
ctypedef void (*add_channel_function)(void *, void *) noexcept nogil
ctypedef void (*exit_function)(void *) noexcept nogil
ctypedef int (*invalidate_function)(void *, unsigned long, long, long) noexcept nogil

cdef entry_function _reply_entry = NULL
cdef attr_function _reply_attr = NULL
cdef open_function _reply_open = NULL
cdef create_function _reply_create = NULL
cdef add_channel_function _add_channel = NULL
cdef exit_function _exit_session = NULL
cdef invalidate_function _invalidate_inode = NULL

# libfuse's objects, of the one mount that llfuse can have.
cdef void *_session = NULL
cdef void *_channel = NULL


# ---- what llfuse calls -----------------------------------------------------------------------------------------------

cdef public int fuse_reply_entry(void *req, const fuse_entry_param *given) noexcept nogil:
    """LOOKUP, MKNOD, MKDIR, SYMLINK, LINK: with the server's inode number."""
    cdef fuse_entry_param made = given[0]
    made.attr.st_ino = qtfs_next_inode
    return _reply_entry(req, &made)


cdef public int fuse_reply_attr(void *req, const struct_stat *given, double timeout_s) noexcept nogil:
    """GETATTR, SETATTR: with the server's inode number."""
    cdef struct_stat made = given[0]
    made.st_ino = qtfs_next_inode
    return _reply_attr(req, &made, timeout_s)


cdef public int fuse_reply_open(void *req, const fuse_file_info *given) noexcept nogil:
    """OPEN, OPENDIR: with the bits that the handler wants."""
    cdef fuse_file_info made = given[0]
    made.bits = qtfs_next_bits
    return _reply_open(req, &made)


cdef public int fuse_reply_create(void *req, const fuse_entry_param *entry, const fuse_file_info *opened) noexcept nogil:
    """CREATE: both."""
    cdef fuse_entry_param made = entry[0]
    cdef fuse_file_info made_open = opened[0]
    made.attr.st_ino = qtfs_next_inode
    made_open.bits = qtfs_next_bits
    return _reply_create(req, &made, &made_open)


cdef public void fuse_session_add_chan(void *session, void *channel) noexcept nogil:
    """Called once the mount stands: note libfuse's objects, which llfuse keeps to itself."""
    global _session, _channel
    _session = session
    _channel = channel
    _add_channel(session, channel)


# ---- for the driver --------------------------------------------------------------------------------------------------

cdef void *_find(void *library, const char *name) except NULL:
    cdef void *found = dlsym(library, name)
    if found == NULL:
        raise ImportError(f"libfuse.so.2 has no {name.decode()}")
    return found


def install() -> None:
    """Find libfuse's own functions; before the first mount. ImportError without libfuse 2."""
    global _reply_entry, _reply_attr, _reply_open, _reply_create, _add_channel, _exit_session, _invalidate_inode
    cdef void *library = dlopen("libfuse.so.2", RTLD_NOW)
    if library == NULL:
        raise ImportError("there is no libfuse.so.2")
    _reply_entry = <entry_function>_find(library, "fuse_reply_entry")
    _reply_attr = <attr_function>_find(library, "fuse_reply_attr")
    _reply_open = <open_function>_find(library, "fuse_reply_open")
    _reply_create = <create_function>_find(library, "fuse_reply_create")
    _add_channel = <add_channel_function>_find(library, "fuse_session_add_chan")
    _exit_session = <exit_function>_find(library, "fuse_session_exit")
    _invalidate_inode = <invalidate_function>_find(library, "fuse_lowlevel_notify_inval_inode")


def is_mounted() -> bool:
    """Whether llfuse has a mount and went through here to make it."""
    return _session != NULL


def next_reply(uint64_t inode=0, unsigned int bits=0) -> None:
    """What the next reply on this thread carries: st_ino, and DIRECT_IO or KEEP_CACHE of an opened file."""
    global qtfs_next_inode, qtfs_next_bits
    qtfs_next_inode = inode
    qtfs_next_bits = bits


def forget_attributes(unsigned long node) -> None:
    """Make the kernel ask again for a node's attributes; in force when this returns, unlike llfuse.invalidate_inode."""
    with nogil:
        if _channel != NULL:
            _invalidate_inode(_channel, node, -1, 0)


def exit_session() -> None:
    """Let llfuse.main return, as soon as its thread is woken by SIGUSR1."""
    if _session != NULL:
        _exit_session(_session)


def unmounted() -> None:
    """llfuse.close is about to free libfuse's objects."""
    global _session, _channel
    _session = _channel = NULL


def wake_threads() -> None:
    """Interrupt what the other threads sleep in: whatever they then do is up to them."""
    own = threading.get_native_id()
    for name in os.listdir("/proc/self/task"):
        if int(name) not in (own, os.getpid()):
            syscall(SYS_tgkill, <int>os.getpid(), <int>int(name), <int>SIGUSR1)


cdef void _do_nothing(int number) noexcept nogil:
    pass


def allow_waking() -> None:
    """Make SIGUSR1 interrupt system calls instead of ending the process: llfuse.main sends it to its workers at the end."""
    cdef sigaction_t action
    if sigaction(SIGUSR1, NULL, &action) == 0 and action.sa_handler == SIG_DFL:
        action.sa_handler = _do_nothing
        action.sa_flags = 0
        sigaction(SIGUSR1, &action, NULL)
