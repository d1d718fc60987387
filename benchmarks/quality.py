#!/usr/bin/env python
"""Compare recipes of pretraining by how well the frozen cell embedding separates cell types.

Example:
    python benchmarks/quality.py --data DIR --arms seed recipe --seeds 0 1 2

DIR contains the .h5ad files of the shared blood sets. Each arm is one run of `scripts/pretrain.py` on the nine
training sets, without labels; only the listed flags differ. The frozen embedding is then scored on sets and donors that
were never trained on, beside the baselines:

    F1, bio   kNN macro-F1, and the mean of NMI, ARI and ASW label, on pbmc3k, pbmc4k, OneK1K and lupus T cells
    transfer  macro-F1 of logistic regression and of kNN: FACS-sorted cells and PBMC 8k to PBMC 3k, PBMC 4k and 8k to
              3k, and PBMC 4k and 8k (10x v2) to PBMC 1k of 10x v3, whose types are read from marker genes (`MARKERS`),
              because the set has no labels; "LR, without contradicted" leaves out reference cells as
              `scgpt-hf finetune` does, with each method
    iLISI     mixing of the 40 donors of OneK1K
    GEP       share of the gap between gene mean and floor that GEP closes, on masked genes of held-out donors

Baselines: PCA fitted on the training cells and applied ("PCA, training cells") or fitted on the scored set ("PCA,
scored cells"), logistic regression on genes, and the count network (`scgpt_hf/scoring/count_mlp.py`).
The results are `results/quality/arms.json` and the table `results/quality/arms.csv`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from measuring import RESULTS, write_result
from scipy.sparse import csr_matrix, vstack
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgpt_hf import embed_anndata
from scgpt_hf.analysis.evaluation.evaluate import evaluate_embeddings
from scgpt_hf.scoring.count_mlp import fit_count_mlp
from scgpt_hf.scoring.fitted_pca import fit_pca
from scgpt_hf.scoring.normalization import log_normalize
from scgpt_hf.training.finetuning.contradictions import find_contradicted

ROOT = Path(__file__).resolve().parents[1]
TRAINED = (
    *("aml027_bmmc_pre", "bonemarrow_cma", "pbmc1k_v2_10x", "pbmc1k_v3_10x", "pbmc_pisces", "zheng_facs_fasttopics"),
    *("zheng_frozen_pbmcA_mudan", "zheng_pbmc14k_scminer", "zheng_ref_mudan"),
)
SCORED = {  # file → short name, obs column of cell types
    "pbmc3k_10x": ("pbmc3k", "cell_type_coarse"),
    "pbmc4k_asurat": ("pbmc4k", "cell_type_coarse"),
    "onek1k_panel1000": ("OneK1K", "cell_type_coarse"),
    "lupus_healthy_tcells_panel3000": ("lupus T", "cell_type"),
}
BIO = ("NMI", "ARI", "ASW label")
WITHIN = ("kNN macro-F1", *BIO, "iLISI")
COMMON = {
    "gene_selection": "hvg",
    "n_hvg": 2000,
    "min_genes": 100,
    "min_gene_counts": 20,
    "validation_fraction": 0.1,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "dropout": 0.0,
    "use_cpu": "true",
    "precision": "bf16",
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "logging_steps": 100,
    "eval_strategy": "steps",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "cpu_threads": 1,
    "fit_baselines": "none",
}
SEED = {"train_tokens": 97, "loss_weights": '{"gep": 1.0, "gepc": 1.0}'}
COUNTS = {"train_tokens": 97, "loss_weights": '{"gep": 0.005, "counts": 1.0}', "batch_key": "dataset_id"}
SHORTCUT = {**COUNTS, "cls_shortcut": "true"}
DISPERSION = {"hvg_flavor": "seurat", "hvg_batch_key": "dataset_id"}
BINS = {**SHORTCUT, **DISPERSION, "shortcut_steps": 3000}
LOG1P = {**BINS, "input_style": "log1p", "loss_weights": '{"gep": 0.5, "counts": 1.0}'}
ARMS: dict[str, dict[str, Any]] = {
    "untrained": {**SEED, "max_steps": 1, "learning_rate": 0.0},
    "seed": SEED,
    "counts": COUNTS,
    "counts, shortcut": SHORTCUT,
    "recipe": {**LOG1P, "input_keep": (0.25, 0.5, 0.75, 1.0)},
    "complete input": LOG1P,
    "complete input, bins": BINS,
}
COUNTS_ONLY = {"loss_weights": '{"counts": 1.0}'}
# The ablation: one setting of "complete input" is changed. All arms see the same number of cells.
ABLATION: dict[str, dict[str, Any]] = {
    "shortcut alone": {"max_steps": 1, "learning_rate": 0.0},
    "norm before each layer": {"norm_scheme": "pre"},
    "1 layer": {"num_hidden_layers": 1},
    "6 layers": {"num_hidden_layers": 6},
    "width 64": {"hidden_size": 64, "intermediate_size": 128},
    "width 256": {"hidden_size": 256, "intermediate_size": 512},
    "Muon": {"optim": "muon"},
    "warmup_stable_decay": {"lr_scheduler_type": "warmup_stable_decay"},
    "moving average of weights": {"ema_decay": 0.99},
    "masks of 15 %": {"mask_ratios": 0.15},
    "masks of 75 %": {"mask_ratios": 0.75},
    "masks left out": {"leave_out_masked": "true", **COUNTS_ONLY},
    "counts only": COUNTS_ONLY,
    "49 tokens": {"train_tokens": 49},
    "385 tokens": {"train_tokens": 385},
    "32 cells a step": {"per_device_train_batch_size": 32, "max_steps": 3000},
    "256 cells a step": {"per_device_train_batch_size": 256, "max_steps": 375},
    "no steps of the shortcut alone": {"shortcut_steps": 0},
    "10,000 steps of the shortcut alone": {"shortcut_steps": 10000},
    "4,000 genes": {"n_hvg": 4000},
    "shortcut alone, thinned input": {"input_keep": (0.25, 0.5, 0.75, 1.0), "max_steps": 1, "learning_rate": 0.0},
    "shortcut alone, 4,000 genes": {"n_hvg": 4000, "max_steps": 1, "learning_rate": 0.0},
    "shortcut alone, genes by donor": {"hvg_batch_key": "donor_id", "max_steps": 1, "learning_rate": 0.0},
}
ARMS |= {name: {**LOG1P, **changed} for name, changed in ABLATION.items()}
# The same with genes that were ranked by the variance of their raw counts within donors.
SEURAT_V3 = {"hvg_flavor": "seurat_v3", "hvg_batch_key": "donor_id"}
SEURAT_V3_ABLATION = {
    "": {},
    **{
        name: ABLATION[name]
        for name in (
            *("norm before each layer", "counts only", "385 tokens", "4,000 genes"),
            *("shortcut alone", "10,000 steps of the shortcut alone"),
        )
    },
    "masks of 25 to 90 %, left out": {
        "mask_ratios": (0.25, 0.5, 0.75, 0.9),
        "leave_out_masked": "true",
        **COUNTS_ONLY,
    },
}
ARMS |= {
    ", ".join(filter(None, ("seurat_v3", name))): {**LOG1P, **SEURAT_V3, **changed}
    for name, changed in SEURAT_V3_ABLATION.items()
}
# The type of a cell of PBMC 1k v3: it expresses all genes of the first group and none of the second, by any of the
# rules of the type. Cells of no type or of several are not scored.
T_CELL = ("CD3D", "CD3E", "TRAC")
MARKERS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "B cell": [(("MS4A1", "CD79A"), (*T_CELL, "CD14", "KLRF1"))],
    "T cell": [(("CD3D", "CD3E"), ("MS4A1", "CD79A", "CD14", "KLRF1"))],
    "NK cell": [(("KLRF1", "GNLY"), ("CD3D", "CD3E", "MS4A1", "CD14"))],
    "monocyte": [
        (("CD14", "S100A8"), (*T_CELL, "MS4A1", "KLRF1", "FCER1A", "CLEC10A", "PF4")),
        (("FCGR3A", "MS4A7"), (*T_CELL, "MS4A1", "KLRF1", "FCER1A", "CLEC10A", "PF4")),
    ],
    "dendritic cell": [
        (("FCER1A", "CLEC10A"), (*T_CELL, "CD14", "MS4A1")),
        (("FCER1A", "CD1C"), (*T_CELL, "CD14", "MS4A1")),
        (("LILRA4",), T_CELL),
    ],
    "megakaryocyte/platelet": [(("PF4", "PPBP"), (*T_CELL, "CD14", "MS4A1"))],
}
CELLS, FACS_CELLS, NEIGHBORS = 3000, 1500, 15
MOST_FEATURES, N_COMPONENTS = 1000, 50
Embed = Callable[[AnnData], np.ndarray]
Transfers = dict[str, tuple[list[AnnData], AnnData]]  # name → labelled reference sets, and the query


def main() -> None:
    """Train the arms, score them and the baselines, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=[*ARMS], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="seeds of each arm (default: 0)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--no_baselines", action="store_true", help="keep the baselines of the last run")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="where runs are kept")
    parser.add_argument(
        "--precision",
        choices=["bf16", "no"],
        default="bf16",
        help="'no' where the CPU has no instructions for bfloat16 (default: %(default)s)",
    )
    options = parser.parse_args()
    census = options.runs / "census"
    if not census.exists():
        files = [str(options.data / f"{name}.h5ad") for name in TRAINED]
        launch("build_census", *files, "--out", str(census))
    cells = {name: read_labelled(options.data, file, column) for file, (name, column) in SCORED.items()}
    transfers = read_transfers(options.data, cells["pbmc3k"])
    stored = RESULTS / "quality" / "arms.json"
    result: dict[str, Any] = {"common": COMMON, "runs": {}, "baselines": {}}
    if stored.exists():
        result |= {key: value for key, value in json.loads(stored.read_text()).items() if key in result}
    if not options.no_baselines:
        result["baselines"] = baselines(options.data, cells, transfers, options.seeds)
        save(result)
    for seed in options.seeds:
        for arm in options.arms:
            folder, seconds = train(arm, seed, census, options)
            scores = score(lambda adata, model=folder / "best_model": embed(adata, model), cells, transfers)
            run = {"arm": arm, "seed": seed, "flags": flags_of(arm, options), "training_seconds": seconds}
            result["runs"][f"{arm}, seed {seed}, {options.steps} steps"] = run | scores | gap_closed(folder)
            save(result)


def flags_of(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags in which an arm differs from the others."""
    flags = {"max_steps": options.steps, **ARMS[arm]}
    return flags if options.precision == COMMON["precision"] else {**flags, "precision": options.precision}


def train(arm: str, seed: int, census: Path, options: argparse.Namespace) -> tuple[Path, float]:
    """Train one arm, unless it was trained before; return its run folder and the seconds that training took."""
    flags = {**COMMON, **flags_of(arm, options), "seed": seed, "data": census}
    flags["eval_steps"] = flags["max_steps"]
    folder = options.runs / f"{arm.replace(', ', '-').replace(' ', '_').replace('%', 'percent')}-{options.steps}-{seed}"
    if options.precision != COMMON["precision"]:
        folder = folder.with_name(f"{folder.name}-{options.precision}")
    if not (folder / "best_model").is_dir():
        started = time.perf_counter()
        flags["output_dir"] = folder
        launch("pretrain", *(part for name, value in flags.items() for part in (f"--{name}", *values_of(value))))
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - started:.0f}")
    return folder, float((folder / "seconds.txt").read_text())


def values_of(value: Any) -> list[str]:
    """Return the value of a flag as arguments of the command line."""
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def launch(script: str, *arguments: str) -> None:
    """Run a command of the repository."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments], check=True)


def gap_closed(folder: Path) -> dict[str, float]:
    """Return the share of the gap between gene mean and floor that GEP closes on masked genes of held-out donors."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next((line for line in reversed(lines) if "eval_gep_mse" in line), None)
    if last is None:
        return {}
    mean, floor = last["eval_gene_mean_mse"], last["eval_tie_floor_mse"]
    return {"gep_mse": last["eval_gep_mse"], "gep_gap_closed": round((mean - last["eval_gep_mse"]) / (mean - floor), 4)}


def read_labelled(data: Path, name: str, column: str) -> AnnData:
    """Return up to `CELLS` labelled cells of a set, their type in obs["label"]."""
    adata = anndata.read_h5ad(data / f"{name}.h5ad")
    adata.obs["label"] = adata.obs[column].astype(str)
    adata = adata[(adata.obs["label"] != "unknown").to_numpy()]
    rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:CELLS])
    return adata[rows].copy()


def read_transfers(data: Path, pbmc3k: AnnData) -> Transfers:
    """Return the labelled cells that types are transferred from, and those they are transferred to."""
    facs = read_labelled(data, "zheng_facs_fasttopics", "cell_type_coarse")
    rows = np.sort(np.random.default_rng(1).permutation(facs.n_obs)[:FACS_CELLS])
    both = read_labelled(data, "pbmc6k8k_ismb", "cell_type_coarse")
    pbmc8k = both[~both.obs["donor_id"].isin(set(pbmc3k.obs["donor_id"])).to_numpy()].copy()
    pbmc4k = read_labelled(data, "pbmc4k_asurat", "cell_type_coarse")
    return {
        "FACS + 8k to 3k": ([facs[rows].copy(), pbmc8k], pbmc3k),
        "4k + 8k to 3k": ([pbmc4k, pbmc8k], pbmc3k),
        "v2 to v3": ([pbmc4k, pbmc8k], label_by_markers(anndata.read_h5ad(data / "pbmc1k_v3_10x.h5ad"))),
    }


def label_by_markers(adata: AnnData) -> AnnData:
    """Return the cells of exactly one type by `MARKERS`, their type in obs["label"]."""
    symbols = adata.var["feature_name"].to_numpy(str)
    genes = {gene for rules in MARKERS.values() for rule in rules for group in rule for gene in group}
    expressed = {gene: np.asarray(adata.X[:, symbols == gene].sum(axis=1)).ravel() > 0 for gene in genes}
    is_type = np.zeros((adata.n_obs, len(MARKERS)), dtype=bool)
    for column, rules in enumerate(MARKERS.values()):
        for present, absent in rules:
            has, lacks = ([expressed[gene] for gene in group] for group in (present, absent))
            is_type[:, column] |= np.all(has, axis=0) & ~np.any(lacks, axis=0)
    adata.obs["label"] = np.array([*MARKERS])[is_type.argmax(axis=1)]
    return adata[is_type.sum(axis=1) == 1].copy()


def embed(adata: AnnData, model: Path) -> np.ndarray:
    """Return the embedding of each cell; cells without a known gene get zeros."""
    adata = adata.copy()
    embed_anndata(adata, model, progress=False, empty="nan", normalize=False)
    return np.nan_to_num(np.asarray(adata.obsm["X_scgpt"]))


def score(embed_cells: Embed, cells: dict[str, AnnData], transfers: Transfers) -> dict[str, Any]:
    """Return the scores within each set, and of the transfers."""
    within, found = {}, {}
    for name, adata in cells.items():
        adata = adata.copy()
        adata.obsm["X"] = embed_cells(adata)
        within[name] = scores_within(adata, "X", ())
    for name, (reference, query) in transfers.items():
        train = np.concatenate([embed_cells(part) for part in reference])
        found[name] = transfer(train, labels_of(reference), embed_cells(query), labels_of([query]))
    return {"within": within, "transfer": found}


def scores_within(adata: AnnData, method: str, baselines: tuple[str, ...]) -> dict[str, float]:
    """Return the scores of the embedding obsm["X"], or of a baseline, within one set."""
    settings: Any = {"metrics": None, "baselines": baselines, "progress": False}
    found = evaluate_embeddings(adata, ["X"], "label", "donor_id", **settings).methods[method]
    return {metric: round(found.values[metric], 4) for metric in WITHIN if metric in found.values}


def labels_of(parts: list[AnnData]) -> np.ndarray:
    """Return the cell types of all cells."""
    return np.concatenate([part.obs["label"].to_numpy(str) for part in parts])


def transfer(train: np.ndarray, labels: np.ndarray, test: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return macro-F1 over the types of the query that have at least as many reference cells as kNN counts."""
    names, sizes = np.unique(labels, return_counts=True)
    shared = sorted(set(names[sizes >= NEIGHBORS]) & set(true))
    train, labels = train[np.isin(labels, shared)], labels[np.isin(labels, shared)]
    test, true = test[np.isin(true, shared)], true[np.isin(true, shared)]
    # Neighbors among genes are those of their principal components.
    space = PCA(N_COMPONENTS, random_state=0).fit_transform(train) if train.shape[1] > MOST_FEATURES else train
    agreed = ~find_contradicted(space, np.unique(labels, return_inverse=True)[1])
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    every = np.ones_like(agreed)
    methods = {
        "LR": (regression, every),
        "LR, without contradicted": (regression, agreed),
        "kNN": (KNeighborsClassifier(NEIGHBORS), every),
    }
    return {
        name: round(float(f1_score(true, one.fit(train[used], labels[used]).predict(test), average="macro")), 4)
        for name, (one, used) in methods.items()
    }


def baselines(data: Path, cells: dict[str, AnnData], transfers: Transfers, seeds: list[int]) -> dict[str, Any]:
    """Return the scores of the baselines."""
    counts, genes, sets = join_sets({name: anndata.read_h5ad(data / f"{name}.h5ad") for name in TRAINED})
    scores: dict[str, Any] = {"PCA, scored cells": {"within": pca_of_scored_cells(cells)}}
    pca = fit_pca(counts, genes, sets, 0)
    scores["PCA, training cells"] = score(
        lambda adata: pca.transform(csr_matrix(adata.X), list(adata.var_names)), cells, transfers
    )
    for seed in seeds:
        network = fit_count_mlp(counts, genes, sets, seed=seed)
        scores[f"count network, seed {seed}"] = score(
            lambda adata, network=network: network.embed(csr_matrix(adata.X), list(adata.var_names)), cells, transfers
        )
    scores["LR on genes"] = {"within": {}, "transfer": transfer_on_genes(transfers)}
    return scores


def join_sets(sets: dict[str, AnnData]) -> tuple[csr_matrix, list[str], np.ndarray]:
    """Return the counts of several sets, shape (cells, genes of any set); these genes; and the set of each cell."""
    genes = sorted(set.union(*(set(adata.var_names) for adata in sets.values())))
    counts = vstack([on_genes(adata, genes) for adata in sets.values()], format="csr")
    return counts, genes, np.repeat(np.array([*sets]), [adata.n_obs for adata in sets.values()])


def on_genes(adata: AnnData, genes: list[str]) -> csr_matrix:
    """Return the counts of an AnnData with one column for each of the genes, 0 where it lacks a gene."""
    counts = csr_matrix(adata.X).tocoo()
    column = pd.Index(genes).get_indexer(adata.var_names)
    known = column[counts.col] >= 0
    place = counts.row[known], column[counts.col[known]]
    return csr_matrix((counts.data[known], place), shape=(adata.n_obs, len(genes)))


def pca_of_scored_cells(cells: dict[str, AnnData]) -> dict[str, Any]:
    """Return the scores of PCA on highly variable genes, fitted on each scored set."""
    within = {}
    for name, adata in cells.items():
        adata = adata.copy()
        adata.obsm["X"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))  # the evaluation asks for an embedding
        within[name] = scores_within(adata, "HVG + PCA", ("HVG + PCA",))
    return within


def transfer_on_genes(transfers: Transfers) -> dict[str, dict[str, float]]:
    """Return the transfers with log-normalized counts of the genes that reference and query have, for an embedding."""
    found = {}
    for name, (reference, query) in transfers.items():
        shared = sorted(set.intersection(*(set(adata.var_names) for adata in (*reference, query))))
        train = log_normalize(vstack([on_genes(part, shared) for part in reference], format="csr")).toarray()
        test = log_normalize(on_genes(query, shared)).toarray()
        found[name] = transfer(train, labels_of(reference), test, labels_of([query]))
    return found


def save(result: dict[str, Any]) -> None:
    """Write the result and its table, and print the table."""
    rows = {**result["baselines"], **result["runs"]}
    table = pd.DataFrame({name: row_of(run) for name, run in rows.items()}).T.round(3)
    print(table.T.to_string(), flush=True)
    write_result("quality/arms", result)
    table.to_csv(RESULTS / "quality" / "arms.csv")


def row_of(run: dict[str, Any]) -> dict[str, float]:
    """Return one row of the table."""
    row = {}
    for name, scores in run["within"].items():
        row[f"{name} F1"] = scores.get("kNN macro-F1", np.nan)
        row[f"{name} bio"] = float(np.mean([scores.get(metric, np.nan) for metric in BIO]))
    row["OneK1K iLISI"] = run["within"].get("OneK1K", {}).get("iLISI", np.nan)
    for name, scores in run.get("transfer", {}).items():
        row |= {f"{name}, {classifier}": value for classifier, value in scores.items()}
    row["GEP gap closed"] = run.get("gep_gap_closed", np.nan)
    row["minutes"] = run.get("training_seconds", np.nan) / 60
    return row


if __name__ == "__main__":
    (RESULTS / "quality").mkdir(parents=True, exist_ok=True)
    main()
