"""Run by test_cell_types.py on two processes: score cell types once, before training, and print the metrics."""

import json
import sys
from pathlib import Path

from tests.support.training import prepare

if __name__ == "__main__":
    trainer, _, _ = prepare(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    metrics = trainer.evaluate()
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        print(json.dumps(metrics))
    trainer.accelerator.end_training()
