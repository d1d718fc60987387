"""What a run trains on, and how much of it a process takes."""

import logging
import os
import platform

import torch

from scgpt_hf.cells.threads import n_cores
from scgpt_hf.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

_LAUNCHED = {"LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"}  # what torchrun and accelerate leave in the environment


def set_cpu_threads(args: TrainingSettings) -> None:
    """Have a process that trains on the CPU use the threads that were asked for, or else its share of the cores.

    OMP_NUM_THREADS asks too, but for the 1 that launchers set where nobody has.
    """
    if args.device.type != "cpu":
        return
    wish = os.environ.get("OMP_NUM_THREADS")
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    elif wish is None or (wish == "1" and _LAUNCHED & os.environ.keys()):
        torch.set_num_threads(max(1, n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    logger.info("training on %d CPU threads", torch.get_num_threads())


def device_name(device: torch.device) -> str:
    """Return what a person would call the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
