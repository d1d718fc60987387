"""Run by test_two_processes.py under torchrun: train on two processes, and print what was checked."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from scgpt_hf.training.fault_tolerance.checkpoints import newest_valid, verify
from scgpt_hf.training.fault_tolerance.nonfinite import all_finite
from scgpt_hf.training.fault_tolerance.signals import StopSignal, TrainingInterrupted
from tests.support.training import EVERY_4, QUIET, prepare, weights_of

OBJECTIVES = {
    "gep": {},
    "gepc": {},
    "gep gepc": {},
    "gep gepc ecs cce": {},
    "gep cls": {"--supervise_by": "cell_type"},
    "gep counts": {"--cls_shortcut": "true"},
    "gepc counts": {"--leave_out_masked": "true", "--train_tokens": "20"},
    "gep gepc dar": {"--domain_head": "true", "--domain_embedding": "true", "--batch_key": "dataset_id"},
    "gep gepc gep_zero gepc_zero": {"--explicit_zero_prob": "true"},
}
# One process with twice the cells has the same losses.
SAME_RUN = ("--max_steps", "6", "--dropout", "0")


def main(census: Path, scratch: Path) -> None:
    logging.basicConfig()
    rank, checks = int(os.environ["RANK"]), {}

    def run(name, *flags, stop_signal=None):
        return prepare(census, scratch / name, *flags, stop_signal=stop_signal)

    for names, flags in OBJECTIVES.items():
        weights = json.dumps(dict.fromkeys(names.split(), 1.0))
        pairs = [text for pair in flags.items() for text in pair]
        trainer, _, _ = run(f"run {names}", *QUIET, "--loss_weights", weights, "--max_steps", "2", *pairs)
        trainer.train()
        assert trainer.args.world_size == 2
        assert type(trainer.model_wrapped) is DistributedDataParallel
        assert trainer.state.global_step == 2
    checks["objectives"] = len(OBJECTIVES)

    flags = ("--loss_weights", '{"gep": 0.01, "counts": 1}', "--cls_shortcut", "true", "--gene_vectors", "data")
    trainer, _, _ = run("counts", *QUIET, *flags, "--per_device_train_batch_size", "4", *SAME_RUN)
    start = torch.cat([weight.flatten() for weight in weights_of(trainer).values()])
    checks["same_start"] = torch.equal(*trainer.accelerator.gather(start[None]))
    trainer.train()

    trainer, _, _ = run("skipped", *QUIET, "--max_steps", "4")
    open_stream = trainer.loader.open_stream

    def with_nan(first):
        for number, batch in enumerate(open_stream(first), start=first):
            if number == 1 and rank == 1:
                batch["values"][0, 1] = torch.nan
            yield batch

    trainer.loader.open_stream = with_nan
    trainer.train()
    checks["skipped"] = trainer.losses.n_steps == 0 and all_finite(weights_of(trainer).values())

    trainer, _, _ = run("stopped", *EVERY_4, "--save_in_background", "true", stop_signal=StopSignal())
    read_step = trainer.read_step

    def interrupt(*arguments):
        if trainer.state.global_step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read_step(*arguments)

    trainer.read_step = interrupt
    try:
        trainer.train()
    except TrainingInterrupted as interruption:
        checks["exit_code"] = interruption.exit_code
    checks["saved"] = verify(newest_valid(scratch / "stopped")).step

    trainer, _, checkpoint = run("stopped", *EVERY_4, "--resume_from_checkpoint", "latest")
    open_stream = trainer.loader.open_stream

    def broken(first):
        for number, batch in enumerate(open_stream(first), start=first):
            if number == 3 and rank == 0:
                raise OSError("gone")
            yield batch

    trainer.loader.open_stream = broken
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except OSError as error:
        checks["read_error"] = f"{error}".split(".")[0]
    if rank == 0:
        print(json.dumps(checks))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
