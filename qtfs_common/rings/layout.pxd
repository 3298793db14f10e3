"""What lies where in the shared memory: doc/rings.md, as C structures.

Page 0 is the control block, which the engine writes. From page 1 on there is a line for each side of each channel, in
cache lines of their own (pairs of them: processors fetch two). Behind them lie the areas of the channels: requests,
replies, requests, … Each field is written by one side only. Positions count bytes since the channel was claimed and never
wrap; a message begins at a multiple of RING_ALIGNMENT and never goes round the end of its area: where it would, the word
RING_SKIP tells to go on at the beginning.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define QTFS_RING_MAGIC UINT64_C(0x474e495253465451)    /* "QTFSRING" */
    """
    const uint64_t RING_MAGIC "QTFS_RING_MAGIC"

cdef enum:
    RING_VERSION = 1
    RING_LINE_BYTES = 128           # from one line to the next
    RING_LINES_AT = 4096
    RING_ALIGNMENT = 64
    RING_SKIP = 0                   # where a message's length would stand
    RING_CHANNELS = 4096            # at most
    BELL_MAGIC = 0x4c4c4542         # "BELL"

cdef enum:                          # ring_line.sleeping
    SLEEPS_FOR_MESSAGES = 1
    SLEEPS_FOR_ROOM = 2
    SLEEPS_BY_LINK = 4              # its own link looks at the memory: do not ring

cdef enum:                          # ring_line.bell of a client
    BELL_SOCKET = 1                 # it comes by the engine's bell socket
    BELL_LINK = 2                   # it is on another machine: the engine's link comes by the socket for it

cdef struct ring_control:           # the engine's
    uint64_t magic
    uint32_t version
    uint32_t channels
    uint64_t request_bytes          # of each channel's area
    uint64_t reply_bytes
    uint64_t areas_at               # from the beginning of the memory
    uint64_t total_bytes
    uint8_t boot[16]                # of the engine's machine: random/boot_id
    uint64_t layouts                # grows when the areas come to lie elsewhere
    uint8_t unused[56]
    uint64_t instance               # of the engine; 0: there is none
    uint64_t beat                   # grows while it lives

cdef struct ring_line:              # one side's of one channel
    uint64_t epoch                  # a client's: of its claim; the engine's: of the claim that it serves; 0: none
    uint64_t tail                   # what it has written
    uint64_t head                   # what it has read
    uint32_t sleeping
    uint32_t bell
    uint64_t instance               # a client's: of the engine that its claim is for
    uint64_t beat                   # a client's, with BELL_LINK: grows while it lives

cdef struct bell_greeting:          # the first bytes on a bell socket
    uint32_t magic
    uint32_t channel
    uint64_t epoch
    uint64_t instance
