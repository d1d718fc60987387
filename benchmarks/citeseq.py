"""Predict proteins from RNA on the shared CITE-seq cells, beside ridge regression and each protein's mean.

  python benchmarks/citeseq.py --data DIR/citeseq/pbmc_10k_protein_v3.h5ad

The model is pretrained on genes and proteins of three quarters of the cells, from random weights. For the others it
reads the RNA only, with all proteins masked, and predicts the bin of each protein among the proteins of its cell. Ridge
regression predicts the same bins from 50 principal components of the log-normalized variable genes; its penalty is
chosen by cross-validation. Both are fitted to the same cells. The set has 200 cells of one donor, so "donors" are
random groups, and the result says more about formats and losses than about quality.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata
import numpy as np
import scanpy as sc
from measuring import write_result
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV

from scgpt_hf.analysis.expression import predict_expression
from scgpt_hf.cells.modalities import join_modalities
from scgpt_hf.cells.selection.splits import load_split
from scgpt_hf.pretrained import load_processor
from scgpt_hf.pretraining import pretrain
from scgpt_hf.training.run_folder import SPLIT
from scgpt_hf.training.settings_parsing import parse_settings

N_GROUPS, N_HVG, N_COMPONENTS = 20, 500, 50
SIZES = ("--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "4", "--intermediate_size", "64")
RECIPE = (
    *("--loss_weights", '{"gep": 1.0, "gepc": 1.0}', "--cls_shortcut", "true", "--shortcut_size", "64"),
    *("--gene_selection", "hvg", "--n_hvg", str(N_HVG), "--learning_rate", "1e-3", "--validation_fraction", "0.25"),
    *("--per_device_train_batch_size", "16", "--shortcut_steps", "0", "--fit_baselines", "none", "--use_cpu", "true"),
)


def main() -> None:
    """Measure every seed, print a table and write results/citeseq.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file with obsm['protein_counts'] and uns['protein_names']")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of pretraining (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    options = parser.parse_args()
    joined = join_modalities(anndata.read_h5ad(options.data))
    runs = []
    for seed in options.seeds:
        runs.append(measure(joined, seed, options.epochs))
        print(f"seed {seed}: {runs[-1]}", flush=True)
        # A stopped run keeps what it has.
        write_result("citeseq", {"settings": {**vars(options), "data": None}, "cells": joined.n_obs, "seeds": runs})
    print(f"\n{'':<18}{'MSE, bins²':>18}{'Spearman over cells':>26}")
    for name in runs[0]:
        values = {metric: [run[name][metric] for run in runs] for metric in ("mse", "spearman")}
        print(f"{name:<18}" + "".join(f"{np.mean(v):>14.3f} ± {np.std(v):.3f}" for v in values.values()))


def measure(joined: anndata.AnnData, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Return the scores of each method on the held-out cells of one seed."""
    joined.obs["donor_id"] = [f"group {n}" for n in np.random.default_rng(seed).permutation(joined.n_obs) % N_GROUPS]
    with TemporaryDirectory() as folder:
        file, run = Path(folder, "joined.h5ad"), Path(folder, "run")
        joined.write_h5ad(file)
        flags = (
            "--num_train_epochs",
            str(epochs),
            "--seed",
            str(seed),
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
        )
        place = ("--data", str(file), "--output_dir", str(run), "--load_best_model_at_end", "false")
        pretrain(parse_settings([*place, *SIZES, *RECIPE, *flags]), report=lambda _: None)
        parts = load_split(run / SPLIT).parts
        train, held_out = joined[parts["train"]], joined[parts["validation"]]
        processor = load_processor(run / "best_model")
        proteins = [gene for gene in processor.genes if gene.startswith("protein:")]
        is_rna = (joined.var["modality"] == "RNA").to_numpy()
        model: Any = str(run / "best_model")
        found = predict_expression(held_out[:, is_rna].copy(), model, genes=proteins, progress=False)
    predictions = {name: found.layers[name] for name in ("gep", "gepc")}
    targets = [bins_of(cells[:, proteins].X.toarray(), processor.n_bins) for cells in (train, held_out)]
    predictions["ridge"] = ridge(train[:, is_rna], held_out[:, is_rna], targets[0])
    predictions["protein mean"] = np.repeat(np.nanmean(targets[0], axis=0)[None], held_out.n_obs, axis=0)
    return {name: score(values, targets[1]) for name, values in predictions.items()}


def bins_of(counts: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the bin of each protein among those of its cell, ties in the middle, NaN where it was not detected."""
    bins = np.full(counts.shape, np.nan)
    for row, cell in zip(bins, counts, strict=True):
        n_expressed = max(int((cell > 0).sum()), 2)
        row[cell > 0] = 1 + (rankdata(cell[cell > 0]) - 1) / (n_expressed - 1) * (n_bins - 2)
    return bins


def ridge(train: anndata.AnnData, held_out: anndata.AnnData, bins: np.ndarray) -> np.ndarray:
    """Return bins that ridge regression predicts from principal components of the variable genes."""
    both = anndata.concat([train, held_out])
    both.X = csr_matrix(both.X)
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    values = both.X.toarray()
    variable = np.argsort(-values[: train.n_obs].var(axis=0))[:N_HVG]  # of the training cells
    scale = values[: train.n_obs, variable].std(axis=0) + 1e-6
    components = PCA(N_COMPONENTS, random_state=0).fit(values[: train.n_obs, variable] / scale)
    inputs = components.transform(values[:, variable] / scale)
    targets = np.where(np.isnan(bins), np.nanmean(bins, axis=0), bins)
    return RidgeCV(alphas=np.logspace(-1, 5, 13)).fit(inputs[: train.n_obs], targets).predict(inputs[train.n_obs :])


def score(predicted: np.ndarray, bins: np.ndarray) -> dict[str, float]:
    """Return the squared error over detected proteins, and the mean over proteins of the correlation over cells."""
    detected = ~np.isnan(bins)
    correlations = [
        np.corrcoef(rankdata(predicted[seen, protein]), rankdata(bins[seen, protein]))[0, 1]
        for protein, seen in enumerate(detected.T)
        if np.ptp(predicted[seen, protein]) > 0 and np.ptp(bins[seen, protein]) > 0
    ]
    mse = float(np.square(predicted[detected] - bins[detected]).mean())
    return {"mse": mse, "spearman": float(np.mean(correlations)) if correlations else 0.0}


if __name__ == "__main__":
    main()
