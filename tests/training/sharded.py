"""Run by test_sharded.py on two processes: train, save and resume a model sharded by FSDP2, on CPUs.

accelerate enables FSDP2 on GPUs only. `enable_fsdp_on_cpus` removes that check; all other code is that of a GPU run.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

from scgpt_hf.training.run_folder import save_best_model, unsharded_model
from tests.support.training import prepare

EVERY_2 = (
    *("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"),
    *("--logging_steps", "1", "--dropout", "0"),
)


def enable_fsdp_on_cpus() -> None:
    original_init = AcceleratorState.__init__

    def init(self: Any, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
        original_init(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(census: Path, folder: Path) -> None:
    enable_fsdp_on_cpus()
    trainer, _, _ = prepare(census, folder, *EVERY_2, "--max_steps", "4")
    trainer.train()
    assert trainer.args.world_size == 2
    assert trainer.accelerator.is_fsdp2
    assert isinstance(trainer.model_wrapped, FSDPModule)
    assert all(type(weight).__name__ == "DTensor" for weight in trainer.model.parameters())
    save_best_model(trainer, folder)
    if trainer.is_world_process_zero():
        model = unsharded_model(trainer, folder)
        assert all(type(weight).__name__ == "Parameter" for weight in model.parameters())
    resumed, _, checkpoint = prepare(census, folder, *EVERY_2, "--max_steps", "6", "--resume_from_checkpoint", "latest")
    resumed.train(resume_from_checkpoint=checkpoint)
    losses = {line["step"]: line["loss"] for line in resumed.state.log_history if "loss" in line}
    if trainer.is_world_process_zero():
        print(json.dumps(losses))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
