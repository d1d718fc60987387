"""A subprocess of `test_reader_stops.py`: read a stream of a SOMA and stop in the requested way.

Run it as `python reading.py HOW ADDRESS`, where HOW is "read", "stall" or "leave". It prints "opened", then "reading"
for each batch, then "left" with the names of the threads that are alive after the reader was closed.
"""

import sys
import threading
import time
from contextlib import closing

import numpy as np

from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def main(how: str, address: str) -> None:
    """Read, and stop in the requested way."""
    source = open_source(address)
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())
    plans = [plan_validation(source.obs().index.to_numpy(np.int64), 10, cells_per_window=20)] * 100
    batches = prefetch(stream_cells(source, plans, processor, StreamConfig(0, (0.5,))))
    print("opened", flush=True)
    if how == "stall":
        sys.stdin.readline()  # the test sends a line when the server has started to stall
    if how == "leave":
        next(batches)
        return  # neither exhausted nor closed
    try:
        with closing(batches):
            for _ in batches:
                print("reading", flush=True)
                time.sleep(0.05)
    finally:
        print("left", [thread.name for thread in threading.enumerate() if thread.name.startswith("scgpt")], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
