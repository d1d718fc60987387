"""Native reader: the entries of a local sparse array, read from TileDB's files without TileDB.

TileDB can read any array. This package reads only arrays that are stored as a Census is, but in less CPU time.
`benchmarks/loader.py` compares the two.
`open_native` decides whether an array qualifies; `NativeArray.read_entries` reads it. Nothing else is public:

- `fragments.py`: which bytes of which files hold the entries of a range of cells.
- `reader.py`: the two names above, and from these bytes to cell ids, genes and counts.
"""

from scgpt_hf.cells.soma.native.reader import NativeArray, open_native

__all__ = ["NativeArray", "open_native"]
