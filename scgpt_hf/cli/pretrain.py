"""Pretrain a gene transformer: from a Census query to a checkpoint.

  accelerate launch scripts/pretrain.py                                    the demo: 700 blood cells, two minutes
  accelerate launch scripts/pretrain.py configs/blood_300k.yaml            the seed recipe on the CELLxGENE Census
  accelerate launch scripts/pretrain.py configs/blood_300k.yaml --dry_run  what that would be, without doing it

Settings come from a YAML file, then from flags. The run folder (--output_dir) gets model, split, metrics and figures.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import accelerate
from transformers import set_seed

from scgpt_hf.cli.process import tune_process
from scgpt_hf.publishing.card import model_card
from scgpt_hf.publishing.publish_run import check_repository
from scgpt_hf.reporting.run_figures import write_run_figures
from scgpt_hf.training import pretraining
from scgpt_hf.training.device import set_cpu_threads
from scgpt_hf.training.dry_run import describe_run
from scgpt_hf.training.fault_tolerance.signals import Interrupted, StopSignal
from scgpt_hf.training.recipe import begin_run, build_model, build_processor, open_cells, save_selection
from scgpt_hf.training.run_folder import CARD, write_whole
from scgpt_hf.training.settings import parse_settings


def main() -> None:  # noqa: C901
    """Read the settings, train, and leave a run folder that speaks for itself."""
    tune_process()
    try:
        settings = parse_settings(sys.argv[1:], __doc__)
        args, folder = settings.training, Path(settings.training.output_dir)
        if args.push_to_hub and args.process_index == 0 and not args.dry_run:
            check_repository(args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)
        logging.basicConfig(format="%(message)s")
        logging.getLogger("scgpt_hf").setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
        set_cpu_threads(args)
        with accelerate.PartialState().main_process_first():
            source = open_cells(settings)
        selection, checkpoint = begin_run(source, settings)
        processor = build_processor(selection.genes, settings.data, source)
        set_seed(args.seed)
        model = build_model(processor, settings.model, selection.domains, settings.data.batch_key)
        data_module = pretraining.DataModule(source, selection, processor, settings, checkpoint)
        if args.dry_run:
            if args.process_index == 0:
                print(describe_run(data_module, model, args))
            return
        if checkpoint and pretraining.is_finished(folder, data_module.schedule):
            return
        trainer = pretraining.make_trainer(data_module, model, args, StopSignal())
        if args.process_index == 0 and checkpoint is None:
            trainer.add_callback(pretraining.WhenItBegins(lambda: save_selection(selection, source, settings)))
        trainer.train(resume_from_checkpoint=checkpoint)
        pretraining.save_best_model(trainer, folder)
        if args.process_index == 0:
            summary = pretraining.summarize(trainer, data_module)
            shown: Any = {"donor_key": settings.data.donor_key, "seed": args.seed}
            write_run_figures(
                folder, source, selection.parts, pretraining.whole_model(trainer, folder), processor, **shown
            )
            write_whole(folder / CARD, str(model_card(folder)))
            print(pretraining.tell(summary, folder))
            if args.push_to_hub:
                try:
                    print(f"Published at {trainer.push_to_hub()}")
                except (ValueError, OSError) as error:
                    sys.exit(f"pretrain.py: {folder} is whole, but was not published: {error}")
    except Interrupted as interruption:
        if args.process_index == 0:
            print(f"pretrain.py: {interruption}", file=sys.stderr, flush=True)
        trainer.accelerator.end_training()
        os._exit(interruption.exit_code)  # all is saved; a read that hangs would abort an interpreter that ends orderly
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"pretrain.py: {error}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
