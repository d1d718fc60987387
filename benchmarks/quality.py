#!/usr/bin/env python
"""Compare recipes of pretraining by how well the frozen cell embedding separates cell types.

Example:
    python benchmarks/quality.py --data DIR --arms seed counts --seeds 1

DIR contains the .h5ad files of the shared blood sets. Each arm is one run of `scripts/pretrain.py` on the nine
training sets, with the same cells, genes and number of steps; only the listed flags differ. The embedding of the
model is then scored on sets and donors that were never trained on, beside two kinds of PCA:

    within    kNN macro-F1, the mean of NMI, ARI and ASW label, on pbmc3k, pbmc4k, OneK1K and lupus T cells
    transfer  macro-F1 of kNN and of logistic regression: from FACS-sorted cells and PBMC 8k to PBMC 3k

"PCA, training cells" fits highly variable genes, center and components on the training cells and applies them to the
scored ones: what a pretrained model must beat. "PCA, scored cells" fits them on the scored set itself.
"""

import argparse
import subprocess
import sys
import time
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
from scgpt_hf.scoring.normalization import log_normalize, variable_genes

ROOT = Path(__file__).resolve().parents[1]
TRAINED = (
    *("aml027_bmmc_pre", "bonemarrow_cma", "pbmc1k_v2_10x", "pbmc1k_v3_10x", "pbmc_pisces", "zheng_facs_fasttopics"),
    *("zheng_frozen_pbmcA_mudan", "zheng_pbmc14k_scminer", "zheng_ref_mudan"),
)
SCORED = {  # file → obs column of cell types
    "pbmc3k_10x": "cell_type_coarse",
    "pbmc4k_asurat": "cell_type_coarse",
    "onek1k_panel1000": "cell_type_coarse",
    "lupus_healthy_tcells_panel3000": "cell_type",
}
WITHIN = ("kNN macro-F1", "NMI", "ARI", "ASW label")
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
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "logging_steps": 100,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "cpu_threads": 1,
}
COUNTS = {"batch_key": "dataset_id", "loss_weights": '{"gep": 0.005, "counts": 1.0}'}
ARMS: dict[str, dict[str, Any]] = {
    "seed": {},
    "counts": COUNTS,
    "counts, shortcut": {**COUNTS, "cls_shortcut": "true"},
    "counts, shortcut, 96 tokens": {**COUNTS, "cls_shortcut": "true", "max_tokens": 97},
}
COMPONENTS, CELLS, FACS_CELLS, NEIGHBORS = 50, 3000, 1500, 15


def main() -> None:
    """Train the arms, score them and the baselines, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=[*ARMS], help="default: all")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality", help="where runs are kept")
    options = parser.parse_args()
    census = options.runs / "census"
    if not census.exists():
        files = [str(options.data / f"{name}.h5ad") for name in TRAINED]
        launch("build_census", *files, "--out", str(census))
    cells = {name: read_labelled(options.data, name, column) for name, column in SCORED.items()}
    reference = read_reference(options.data)
    result: dict[str, Any] = {"steps": options.steps, "common": COMMON, "arms": {}}
    for arm in options.arms:
        for seed in range(options.seeds):
            folder, seconds = train(arm, seed, census, options)
            scores = score(lambda adata, model=folder / "best_model": embed(adata, model), cells, reference)
            result["arms"].setdefault(arm, []).append({"seed": seed, "seconds": seconds, "flags": ARMS[arm], **scores})
            report(result)
            write_result("quality/arms", result)
    result["baselines"] = baselines(options.data, cells, reference)
    report(result)
    write_result("quality/arms", result)


def train(arm: str, seed: int, census: Path, options: argparse.Namespace) -> tuple[Path, float]:
    """Train one arm, unless it was trained before; return its run folder and the seconds it took."""
    folder = options.runs / f"{arm.replace(', ', '-').replace(' ', '_')}-{options.steps}-{seed}"
    started = time.perf_counter()
    if not (folder / "best_model").is_dir():
        flags = {**COMMON, **ARMS[arm], "max_steps": options.steps, "seed": seed, "output_dir": folder, "data": census}
        launch("pretrain", *(part for name, value in flags.items() for part in (f"--{name}", str(value))))
    return folder, round(time.perf_counter() - started, 1)


def launch(script: str, *arguments: str) -> None:
    """Run a command of the repository."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments], check=True)


def read_labelled(data: Path, name: str, column: str) -> AnnData:
    """Return up to `CELLS` labelled cells of a set, their type in obs["label"]."""
    adata = anndata.read_h5ad(data / f"{name}.h5ad")
    adata.obs["label"] = adata.obs[column].astype(str)
    adata = adata[(adata.obs["label"] != "unknown").to_numpy()]
    rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:CELLS])
    return adata[rows].copy()


def read_reference(data: Path) -> list[AnnData]:
    """Return the labelled cells that types are transferred from: FACS-sorted cells, and the 8k half of PBMC 6k + 8k."""
    facs = read_labelled(data, "zheng_facs_fasttopics", "cell_type_coarse")
    rows = np.sort(np.random.default_rng(1).permutation(facs.n_obs)[:FACS_CELLS])
    both = read_labelled(data, "pbmc6k8k_ismb", "cell_type_coarse")
    donors_of_3k = set(anndata.read_h5ad(data / "pbmc3k_10x.h5ad", backed="r").obs["donor_id"])
    return [facs[rows].copy(), both[~both.obs["donor_id"].isin(donors_of_3k).to_numpy()].copy()]


def embed(adata: AnnData, model: Path) -> np.ndarray:
    """Return the embedding of each cell; cells without a known gene get zeros."""
    adata = adata.copy()
    embed_anndata(adata, model, progress=False, empty="nan")
    return np.nan_to_num(np.asarray(adata.obsm["X_scgpt"]))


def score(embed_cells: Any, cells: dict[str, AnnData], reference: list[AnnData]) -> dict[str, Any]:
    """Return the scores within each set, and of the transfer to PBMC 3k."""
    within = {}
    for name, adata in cells.items():
        adata = adata.copy()
        adata.obsm["X"] = embed_cells(adata)
        found = evaluate_embeddings(
            adata, ["X"], "label", "donor_id", metrics=None, baselines=(), progress=False
        ).methods["X"]
        within[name] = {metric: round(found.values[metric], 4) for metric in WITHIN if metric in found.values}
    train = np.concatenate([embed_cells(part) for part in reference])
    labels = np.concatenate([part.obs["label"].to_numpy(str) for part in reference])
    query = cells["pbmc3k_10x"]
    test, true = embed_cells(query), query.obs["label"].to_numpy(str)
    return {"within": within, "transfer": transfer(train, labels, test, true)}


def transfer(train: np.ndarray, labels: np.ndarray, test: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return macro-F1 over the types that both sides have."""
    shared = sorted(set(labels) & set(true))
    train, labels = train[np.isin(labels, shared)], labels[np.isin(labels, shared)]
    test, true = test[np.isin(true, shared)], true[np.isin(true, shared)]
    classifiers = {
        "kNN": KNeighborsClassifier(NEIGHBORS),
        "LR": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    return {
        name: round(float(f1_score(true, one.fit(train, labels).predict(test), average="macro")), 4)
        for name, one in classifiers.items()
    }


def baselines(data: Path, cells: dict[str, AnnData], reference: list[AnnData]) -> dict[str, Any]:
    """Return the scores of PCA fitted on the training cells, and of PCA fitted on each scored set."""
    trained = [anndata.read_h5ad(data / f"{name}.h5ad") for name in TRAINED]
    genes = trained[0].var_names
    for adata in trained[1:]:
        genes = genes.intersection(adata.var_names)
    stacked = log_normalize(vstack([csr_matrix(adata[:, genes].X) for adata in trained], format="csr"))
    batches = np.repeat(np.array(TRAINED), [adata.n_obs for adata in trained])
    chosen = genes[variable_genes(stacked, batches, 2000)]
    fitted = PCA(COMPONENTS, random_state=0).fit(stacked[:, genes.get_indexer(chosen)].toarray())

    def project(adata: AnnData) -> np.ndarray:
        place = adata.var_names.get_indexer(chosen)
        logged = log_normalize(csr_matrix(adata.X)).toarray()
        values = np.where(place >= 0, logged[:, place], fitted.mean_)  # genes that are not measured: the mean
        return fitted.transform(values)

    own = {}
    for name, adata in cells.items():
        found = evaluate_embeddings(
            with_zeros(adata), ["X"], "label", "donor_id", metrics=None, baselines=("HVG + PCA",), progress=False
        ).methods["HVG + PCA"]
        own[name] = {metric: round(found.values[metric], 4) for metric in WITHIN if metric in found.values}
    return {"PCA, training cells": score(project, cells, reference), "PCA, scored cells": {"within": own}}


def with_zeros(adata: AnnData) -> AnnData:
    """Return a copy with a placeholder embedding, where the evaluation asks for one."""
    adata = adata.copy()
    adata.obsm["X"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    return adata


def report(result: dict[str, Any]) -> None:
    """Print one row per run: kNN macro-F1 and the mean of NMI, ARI and ASW label of each set, then transfer."""
    rows = {f"{arm} {run['seed']}": run for arm, runs in result["arms"].items() for run in runs}
    rows |= result.get("baselines", {})
    table = {}
    for name, run in rows.items():
        table[name] = {}
        for data, scores in run["within"].items():
            table[name][f"{data.split('_')[0]} F1"] = scores.get("kNN macro-F1", np.nan)
            table[name][f"{data.split('_')[0]} bio"] = np.mean([scores.get(metric, np.nan) for metric in WITHIN[1:]])
        table[name] |= {f"transfer {metric}": value for metric, value in run.get("transfer", {}).items()}
    print(pd.DataFrame(table).T.round(3).to_string(), flush=True)


if __name__ == "__main__":
    (RESULTS / "quality").mkdir(parents=True, exist_ok=True)
    main()
