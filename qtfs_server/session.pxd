"""What the server keeps of one mount: nodes, handles, slots, lock owners, what its event channel has to send.

Lock order: the guard of the list of all sessions, session.guard, session.outbox_guard, then nothing. Both are held for table look-ups only, never over a system call that may block.
A pinned node or handle stays what it is until it is unpinned; whoever unpins an ended handle last closes it.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from qtfs_server.includes.linux cimport pthread_mutex_t
from qtfs_server.policy cimport place
from qtfs_server.state_file cimport state_header, text_cell

cdef enum:
    MAX_NODES = 1 << 24             # of one session
    MAX_HANDLES = 1 << 20
    MAX_SHARES = 5                  # of shares.pxd
    MAX_DEVICES = 65535
    SAVED_REPLY_BYTES = 512         # longest reply kept for a repeated request that outlives the engine
    MOST_LISTED = 256               # lookups that one READDIR counts; more than fit into 32 KiB, which libc reads at a time
    NO_INDEX = 0                    # index 0 of both tables is never given out

cdef enum:                          # node.flags
    NODE_RECENT = 1                 # used since the eviction hand last came by
    NODE_REVIVE_BY_PATH = 2         # node.revive is a path, not a file handle
    NODE_PATHLESS = 4               # opened by file handle: the kernel may not know its path
    NODE_WARM = 8                   # used since the last look at those that hold mounts
    NODE_USED = NODE_RECENT | NODE_WARM

cdef enum:
    SHAPE_WORDS = 6                 # longest file handle of a folded node, in words of 4 bytes; that of btrfs

cdef struct short_handle:           # struct file_handle, if it is short; `words` is 0 if there is none
    int32_t type
    uint32_t words
    uint32_t data[SHAPE_WORDS]

cdef struct node:                   # one that is in use, has its descriptor, or cannot be folded
    uint64_t ino
    uint64_t lookups                # what the client's kernel still has to forget
    uint64_t seen                   # signature of the attributes the client last got
    uint8_t *revive                 # while fd is -1: struct file_handle or path to open it again
    node *next_open                 # ring of those that have their descriptor
    node *previous_open
    int32_t fd                      # O_PATH
    uint32_t index                  # of its record; NO_INDEX: a spare one
    uint32_t handles                # open ones; they keep the node, not its descriptor
    uint32_t path                   # where it can be found again without a file handle: texts.pxd; 0: nowhere
    short_handle by_handle          # opens it again, even for the next engine
    uint16_t pins
    uint16_t device                 # index into session.devices
    uint16_t type                   # S_IFMT bits
    uint16_t flags
    place where

cdef enum:                          # in record.stamp, below the generation
    RECORD_IN_USE = 1
    RECORD_AWAKE = 2                # there is a node
    RECORD_LISTED = 4               # its index stands in session.holders; it belongs to the index, not to the node
    RECORD_FLAGS = 7
    GENERATION_SHIFT = 3
    GENERATIONS = 0x1fffffff        # the bits above are for aliases, and for clients to mark nodes of their own

cdef union record_body:
    node *awake
    uint64_t seen                   # node.seen of a folded one

cdef struct record:                 # of every node; all there is of a folded one. There may be millions: 32 bytes
    uint64_t ino
    record_body body
    uint32_t next                   # in its hash chain, or in the free list
    uint32_t stamp                  # generation and RECORD_*
    uint32_t own                    # of a folded one: the part of its file handle that nothing else tells
    uint16_t shape                  # of a folded one: index into session.shapes
    uint16_t lookups                # of a folded one

cdef enum:
    SHAPE_CHAINS = 256
    MAX_SHAPES = 4096

cdef enum:                          # shape_key.kinds: what a word of a file handle is
    WORD_CONSTANT = 0
    WORD_INO_LOW = 1
    WORD_INO_HIGH = 2
    WORD_OWN = 3

cdef struct shape_key:
    place where
    int32_t handle_type
    uint32_t constants[SHAPE_WORDS]
    uint8_t kinds[SHAPE_WORDS]
    uint16_t words
    uint16_t device
    uint16_t type

cdef struct shape:                  # what many folded nodes have in common
    shape_key key
    uint32_t users                  # folded nodes
    uint16_t next                   # in its chain, or in the free list

cdef enum:                          # handle.flags
    HANDLE_IN_USE = 1
    HANDLE_WRITABLE = 2
    HANDLE_ENDED = 4                # released; closed when its last pin goes
    HANDLE_DIRECTORY = 8
    HANDLE_APPEND = 16              # writes go to the end unless they say otherwise
    HANDLE_STREAM = 32              # a FIFO or character device: read(2), write(2), O_NONBLOCK
    HANDLE_POLLABLE = 64            # POLL may say something else than "always ready"
    HANDLE_NAMES_ONLY = 128         # a directory whose entries' attributes nobody may trust for a moment
    HANDLE_LOST = 256               # the engine that had it open died, and it cannot be opened again
    HANDLE_STORED = 512             # systemd keeps a copy of its descriptor (descriptor_store.pyx)

cdef struct handle:
    int32_t fd                      # -1: the engine that had it open is gone, and nobody used it since
    uint32_t generation
    uint32_t pins
    uint32_t index
    uint32_t next_free
    uint32_t flags
    uint32_t open_flags             # of open(2), to open it again
    uint32_t flocked                # flock(2): LOCK_SH, LOCK_EX, or 0
    uint32_t node_index             # of `node`
    node *node                      # lives as long as the handle
    int64_t position                # directories: the d_off at which fd stands
    uint64_t notify                 # tag of the READY that the client waits for; 0: it does not
    void *stream                    # what waits for it and watches it (streams.pxd); NULL: nothing ever did

cdef struct device:                 # one mount of the server, as far as this session has met it
    uint64_t mount_id               # from Linux 6.8 on never used again: STATX_MNT_ID_UNIQUE
    uint64_t number                 # st_dev
    uint32_t listed_id              # the mount's number in /proc/self/mountinfo
    uint32_t nodes                  # records of nodes that lie on it
    int32_t mount_fd                # for open_by_handle_at; -1: not open
    uint32_t mount_users            # who uses mount_fd just now
    int64_t f_type                  # of statfs(2)
    uint16_t shield                 # where the session meets it, among the protections: policy.shield_of
    bint uncached                   # a pseudo file system
    bint warm                       # mount_fd was used since the last look
    bint known                      # was there when the mount table was last asked for
    bint reopens                    # a file of it was opened by its file handle
    bint gone                       # unmounted: the entry serves again once no node lies on it

cdef struct intent:                 # what an operation found before it had its effect, should the engine die in it
    bint known                      # the rest is valid, and the effect may have come
    uint64_t ino                    # of what the name led to; 0: to nothing
    uint64_t other_ino              # RENAME: the same of the new name
    uint64_t size                   # of the file; FORGET: items that are done
    uint64_t granted_node           # whose lookups were counted
    uint64_t granted_handle         # that was opened
    uint32_t listed_count           # READDIR, also if it was answered: whose lookups were counted
    uint64_t listed[MOST_LISTED]    # their ids

cdef struct slot:
    uint64_t sequence               # the last one executed
    void *connection                # who may use the slot now
    int32_t busy                    # a worker executes a request of it
    bint unfinished                 # the engine died while it executed the last one
    uint32_t saved_bytes
    uint8_t *long_reply             # the reply to it, if it is longer than `saved`
    intent before
    uint8_t saved[SAVED_REPLY_BYTES]    # reply to it, if it must not be executed twice

cdef struct lock_note:              # what the next engine has to know of a POSIX lock: lock_notes.pyx
    uint64_t serial                 # a range counts if it has that of its owner
    uint64_t owner                  # owners: the number
    uint64_t handle                 # owners: the one it came by
    uint64_t start                  # ranges
    uint64_t end
    uint32_t of                     # ranges: index of their owner; NO_INDEX: this is an owner
    uint32_t type                   # ranges
    uint32_t next                   # ranges of the same owner, or the free list
    bint used

cdef struct carried_write:          # to a FIFO, which the engine before us had begun
    carried_write *next
    uint64_t tag
    uint32_t done                   # bytes

cdef struct outgoing:               # a message for the event channel; its bytes follow
    outgoing *next
    uint64_t number                 # that the client acknowledges; 0: it need not arrive
    size_t size

cdef struct session:
    state_header *state             # the file that all tables lie in (state_file.pyx)
    int32_t state_fd
    uint64_t id
    uint8_t secret[32]
    pthread_mutex_t guard
    int32_t references              # the registry's and one for each attached connection
    int32_t connections
    bint ended
    bint read_only
    bint watches_mounts             # is told when the mount table changes
    bint lets_root_go               # the root's mount is not held either
    int64_t idle_since_us           # when the last connection went
    void *event                     # connection of the event channel; changes under both guards
    bint event_busy                 # a message of it, or of the one before, is being executed
    pthread_mutex_t outbox_guard    # the event channel's output (events.pyx)
    outgoing *outbox                # in order: sent and not acknowledged, then not sent
    outgoing **outbox_end
    outgoing *unsent                # the first that is not all gone
    size_t unsent_at                # how much of it is
    size_t outbox_bytes
    uint64_t event_number           # of the last message that has to arrive
    bint event_overlooked           # something was left because the outbox was full
    bint outbox_blocked             # listed among those that wait for room
    session *next_blocked
    carried_write *carried          # under _all_guard of streams.pyx
    uint32_t slots
    slot *slot_table
    uint32_t salt                   # generations begin here: ids of different sessions never meet
    record *records
    uint32_t record_count           # indexes below this were given out once
    uint32_t record_free
    uint32_t nodes_used
    node *nodes
    uint32_t node_count             # nodes that were given out once
    node *spare_nodes               # given back, by next_open
    uint32_t open_nodes             # those that have their descriptor
    node *hand                      # of the eviction clock, in their ring; NULL: there is none
    shape *shapes
    uint32_t shape_count            # indexes below this were given out once
    uint16_t shape_free
    uint16_t shape_chains[SHAPE_CHAINS]
    uint32_t *buckets
    uint32_t bucket_mask
    handle *handles
    uint32_t handle_count
    uint32_t handle_free
    uint32_t handles_used
    device *devices
    uint32_t device_count
    uint32_t *holders               # indexes of nodes whose descriptors hold mounts that are to be let go
    uint32_t holder_count
    uint32_t holder_room
    bint walked                     # somebody goes through them (letting_go.pyx)
    text_cell *texts
    uint32_t text_count             # indexes below this were given out once
    uint32_t text_free
    lock_note *lock_notes
    uint32_t lock_note_count        # indexes below this were given out once
    uint32_t lock_note_free
    uint64_t lock_serial            # of the last change of lock notes
    void *lock_owners               # list of locked_files.pxd, under its guard
    int32_t lock_files              # how many those are, under that guard; each has a descriptor
    int64_t shares[MAX_SHARES]      # atomic: what it has of what all share (shares.pxd)
    session *next                   # of all there are
    session *previous

ctypedef void (*session_function)(session *) noexcept nogil

cdef session *session_new(uint64_t id, const uint8_t *secret, uint32_t salt, uint32_t slots, uint32_t mount_flags,
                          const char *root) noexcept nogil
cdef session *session_of_state(state_header *state, int fd) noexcept nogil
cdef bint session_hold(session *s) noexcept nogil
cdef void session_unref(session *s) noexcept nogil
cdef void set_farewell(session_function farewell) noexcept nogil
cdef session *session_fullest() noexcept nogil
cdef session *session_after(session *s) noexcept nogil
cdef node *node_new_locked(session *s) noexcept nogil
cdef void node_free_locked(session *s, node *n) noexcept nogil


cdef inline record *record_at(session *s, uint32_t index) noexcept nogil:
    """The record of an index below record_count."""
    return &s.records[index]


cdef inline handle *handle_at(session *s, uint32_t index) noexcept nogil:
    """The handle of an index below handle_count."""
    return &s.handles[index]
