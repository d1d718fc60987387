"""Evaluate a finished run on validation donors from datasets that were not trained on.

  python benchmarks/unseen_datasets.py runs/blood_cpu_gepc

A split by donor holds out donors, but a dataset with many donors is still on both sides of it. This stricter test only
uses validation donors of datasets without training cells. Masks and ties are those of the run's validation, and the
baseline is the mean of each gene over the training cells.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForPreTraining, AutoProcessor

from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.baselines import sum_bins
from scgpt_hf.training.selection import load_selection, open_cells
from scgpt_hf.training.settings_parsing import parse_settings


def main() -> None:
    """Print the mean squared errors, in squared bins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run: Path = parser.parse_args().run
    settings = parse_settings([str(run / "settings.yaml")], "")
    source, (selection, _) = open_cells(settings), load_selection(run / "split.json")
    obs = source.obs(["dataset_id"])["dataset_id"].astype(str)
    train, validation = (selection.parts[part] for part in ("train", "validation"))
    unseen = validation[~obs[validation].isin(set(obs[train])).to_numpy()]
    processor = AutoProcessor.from_pretrained(run / "best_model")
    model = AutoModelForPreTraining.from_pretrained(run / "best_model").eval()

    seed, ratios = settings.training.seed, tuple(settings.data.mask_ratios)
    unmasked = stream_cells(source, [plan_validation(train, 64)], processor, StreamConfig(seed))
    n_seen, bins = sum_bins(unmasked, processor.vocab_size)
    bins[processor.tokenizer.all_special_ids] = n_seen[processor.tokenizer.all_special_ids] = 0
    gene_mean = np.where(n_seen > 0, bins / np.maximum(n_seen, 1), bins.sum() / n_seen.sum())

    errors, n_masked = np.zeros(3), 0
    for batch in stream_cells(source, [plan_validation(unseen, 64)], processor, StreamConfig(seed, ratios)):
        with torch.inference_mode():
            outputs = model(**batch)
        masked = batch["labels"][batch["labels"] != IGNORE].numpy()
        genes = batch["input_ids"][batch["labels"] != IGNORE].numpy()
        predictions = (outputs.gep.numpy(), outputs.gepc.numpy(), gene_mean[genes])
        errors += [np.square(masked - predicted).sum() for predicted in predictions]
        n_masked += len(masked)
    print(f"{len(unseen):,} cells of {', '.join(sorted(set(obs[unseen])))}, {n_masked:,} masked positions")
    for name, error in zip(("GEP", "GEPC", "gene mean"), errors / n_masked, strict=True):
        print(f"{name:>10} {error:8.2f}")


if __name__ == "__main__":
    main()
