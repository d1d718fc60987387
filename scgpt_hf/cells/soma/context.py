"""TileDB contexts: the settings that every SOMA is read and written with."""

import tiledbsoma as soma

TILEDB_CONFIG: dict[str, str | float] = {
    # Do not return memory to the system after each query: it makes the next read start with pages that the system has
    # to clear. With the default, a context that is freed also corrupts memory now and then: after about 500 tables on a
    # busy machine, against never in 43,000 without (TileDB 2.30, glibc 2.36).
    "sm.mem.malloc_trim": "false",
    # Of each column of a query. Smaller and larger buffers were slower (measured); the default reserves 1 GiB of
    # addresses, which may exceed the limits of a cluster.
    "soma.init_buffer_bytes": str(8 * 2**20),
    # Python handles the signals. TileDB's handler ends a process that was started to ignore SIGINT by a SIGSEGV.
    "sm.enable_signal_handlers": "false",
}

REMOTE_REQUESTS = 16  # ranges that are requested from a remote store at the same time


def open_context(remote: bool, *, n_threads: int) -> soma.SOMATileDBContext:
    """Return a new TileDB context with small buffers.

    Args:
        remote: whether the store is remote; then reads wait for the network, and many requests run at the same time.
        n_threads: threads of TileDB for decompression, and for reading a local store. Its default, one for each core,
            would multiply with our own reading threads.
    """
    config: dict[str, str | float] = {
        "sm.compute_concurrency_level": n_threads,
        "sm.io_concurrency_level": REMOTE_REQUESTS if remote else n_threads,
        **TILEDB_CONFIG,
    }
    if not remote:
        return soma.SOMATileDBContext(tiledb_config=config)
    # The Census' own settings add the region of its bucket and anonymous access. Imported here: a slow import, and
    # local data do not need it.
    from cellxgene_census import get_default_soma_context

    return get_default_soma_context(tiledb_config=config)
