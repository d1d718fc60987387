"""Pretrain a gene transformer: from a Census query to a checkpoint.

  scgpt-hf pretrain                                         the demo: 700 blood cells, two minutes
  scgpt-hf pretrain --data my.h5ad --output_dir runs/mine   your cells
  scgpt-hf pretrain blood-300k                              scGPT's recipe on blood of the Census
  scgpt-hf pretrain blood-300k --dry_run                    describe that run without doing it
  scgpt-hf pretrain my.yaml --learning_rate 3e-4            settings of a file, and one of them changed
  accelerate launch --num_processes 8 -m scgpt_hf.cli.pretrain blood-300k

Settings come from a YAML file, or from a config of the package by its name, then from flags. Without either, those of
the config "demo" apply.
The run folder (--output_dir) gets the model, the split, the metrics, the figures and a model card.
"""

import logging
import os
import sys

import accelerate
import torch

from scgpt_hf.cells.threads import n_cores
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, program_name, show_log, tune_process
from scgpt_hf.pretraining import describe_pretraining, pretrain
from scgpt_hf.training.fault_tolerance.signals import StopSignal, TrainingInterrupted
from scgpt_hf.training.settings import TrainingSettings
from scgpt_hf.training.settings_parsing import parse_settings

logger = logging.getLogger(__name__)

_SET_BY_LAUNCHERS = {"LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"}  # by torchrun, and by accelerate launch


def main(arguments: list[str] | None = None) -> None:
    """Read the settings, train, and turn errors into exit codes."""
    accept_any_locale()
    tune_process()
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments, __doc__)
        args = settings.training
        show_log(logging.INFO if args.process_index == 0 else logging.WARNING)
        set_cpu_threads(args)
        if args.dry_run:
            text = describe_pretraining(settings)
            if args.process_index == 0:
                print(text)
            return
        pretrain(settings, stop_signal=StopSignal(), report=print)
    except TrainingInterrupted as interruption:
        if args.process_index == 0:
            print(f"{program_name()}: {interruption}", file=sys.stderr, flush=True)
        accelerate.PartialState().destroy_process_group()
        # The checkpoint is complete. An orderly exit would join threads, and a read that hangs would keep it waiting.
        os._exit(interruption.exit_code)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        exit_with_error(error)
    accelerate.PartialState().destroy_process_group()


def set_cpu_threads(args: TrainingSettings) -> None:
    """Set the number of threads of a process that trains on the CPU.

    `cpu_threads` takes precedence, then OMP_NUM_THREADS, then the cores divided by the processes of this machine.
    """
    if args.device.type != "cpu":
        return
    requested = os.environ.get("OMP_NUM_THREADS")
    # Launchers set OMP_NUM_THREADS to 1 if the user has not set it; that is not the user's choice.
    set_by_launcher = requested == "1" and bool(_SET_BY_LAUNCHERS & os.environ.keys())
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    elif requested is None or set_by_launcher:
        torch.set_num_threads(max(1, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    logger.info("training on %d CPU threads", torch.get_num_threads())


if __name__ == "__main__":
    main()
