"""What the memory of one chunk becomes: the memory of the next one.

By itself glibc hands freed memory back to the system once there is more of it than two large blocks, and TileDB asks
it to after every query (`TILEDB_CONFIG` turns that off; closing an array still does). Each chunk then began with pages
that the system had to clear anew: half of the time of reading (measured). And every thread that TileDB starts, several
for each read, may keep a store of freed memory of its own; one store for all of them is as fast and smaller.

What every TileDB context of ours is told stands here too: most of it is about memory.

Source: `mallopt(3)`; `sm.mem.malloc_trim` of TileDB 2.30.
"""

import ctypes
import platform
from functools import cache

TILEDB_CONFIG: dict[str, str | float] = {  # of every TileDB context of ours
    # Slow, as said above; in a context that ends it also corrupts memory now and then: after about 500 tables on a
    # busy machine, without it never in 43,000 (TileDB 2.30, glibc 2.36).
    "sm.mem.malloc_trim": "false",
    # Of each column of a query. Other sizes were slower (measured); the default reserves addresses of a GiB, more than
    # a cluster may grant.
    "soma.init_buffer_bytes": str(8 * 2**20),
    # Python's own serves. TileDB's ends a process that was started to ignore SIGINT by a SIGSEGV.
    "sm.enable_signal_handlers": "false",
}

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # of malloc.h
_HEAP = 64 * 2**20  # bytes: glibc gives a heap of this size back once it is empty, if less than the pad stays free
_LARGEST_ON_HEAP = _HEAP // 2  # bytes: the most that M_MMAP_THRESHOLD takes
_MOST_KEPT = 2**31 - 1  # bytes free at the end of a heap: the most that fits an int


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, in this process and from now on.

    Does nothing with another C library. Best called before threads have begun to allocate.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
        libc.mallopt(_M_TOP_PAD, _HEAP)
