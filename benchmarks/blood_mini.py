#!/usr/bin/env python
"""Make blood-mini, the small model that comes with the package, and score it on donors that it was not trained on.

Example:
    python benchmarks/blood_mini.py --data DIR

DIR contains the .h5ad files of the shared blood sets. The model is a run of `scgpt-hf pretrain blood-cpu` (30 to 60
minutes on one core) on the ten sets that 10x Genomics published. It is written to `scgpt_hf/models/blood-mini` with
weights in float16, which halves the file; they are float32 again once loaded. The donor of PBMC 4k and 8k is the
validation donor of the run; OneK1K and the lupus T cells are in no part of it. The scores are those of
`benchmarks/quality.py`, beside PCA fitted on the same training cells and on the scored cells, in
`results/blood_mini.json`. `README.md`, the card of the model, is written by hand from them.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from measuring import write_result
from quality import BIO, ROOT, SCORED, embed, join_sets, launch, pca_of_scored_cells, read_labelled, scores_within
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix

from scgpt_hf.packaged_models import MODELS
from scgpt_hf.scoring.fitted_pca import fit_pca

SETS_OF_10X = (
    *("aml027_bmmc_pre", "pbmc1k_v2_10x", "pbmc1k_v3_10x", "pbmc3k_10x", "pbmc4k_asurat", "pbmc6k8k_ismb"),
    *("zheng_facs_fasttopics", "zheng_frozen_pbmcA_mudan", "zheng_pbmc14k_scminer", "zheng_ref_mudan"),
)
VALIDATION_DONOR = "10x_pbmc4k8k_donor"
FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = "model.safetensors"


def main() -> None:
    """Train, pack, and score the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the run is, or will be")
    parser.add_argument("--model", type=Path, default=Path(MODELS, "blood-mini"), help="where the model is written")
    options = parser.parse_args()
    census, run = options.runs / "blood_mini_census", options.runs / "blood_mini"
    if not census.exists():
        launch("build_census", *(str(options.data / f"{name}.h5ad") for name in SETS_OF_10X), "--out", str(census))
    if not (run / "best_model").is_dir():
        flags = {"data": census, "output_dir": run, "use_cpu": "true", "cpu_threads": 1, "seed": 0}
        launch("pretrain", "blood-cpu", *(str(part) for name, value in flags.items() for part in (f"--{name}", value)))
    donors = json.loads((run / "split.json").read_text())["parts"]["validation"]["donors"]
    if donors != [VALIDATION_DONOR]:
        sys.exit(
            f"the scores are of donors not trained on, but {VALIDATION_DONOR} is not the validation donor: {donors}"
        )
    pack(run / "best_model", options.model)
    cells = {name: read_labelled(options.data, file, column) for file, (name, column) in SCORED.items()}
    del cells["pbmc3k"]
    write_result("blood_mini", score(options.data, cells, run / "best_model", options.model))


def pack(trained: Path, out: Path) -> None:
    """Write a copy of a model with weights in float16; its config says that they are to be loaded as float32."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(trained / name, out / name)
    config = json.loads((out / "config.json").read_text())
    del config["auto_map"]  # the code is in the package
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    weights = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in load_file(trained / WEIGHTS).items()
    }
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})


def score(data: Path, cells: dict[str, Any], trained: Path, packed: Path) -> dict[str, Any]:
    """Return the scores by method and set, and how far the packed model's embeddings are from the trained one's."""
    sets = {name: anndata.read_h5ad(data / f"{name}.h5ad") for name in SETS_OF_10X}
    trained = {name: adata[(adata.obs["donor_id"] != VALIDATION_DONOR).to_numpy()] for name, adata in sets.items()}
    counts, genes, set_of_cell = join_sets(trained)
    pca = fit_pca(counts, genes, set_of_cell, 0)
    methods: dict[str, Any] = {"blood-mini": {}, "PCA, training cells": {}}
    differences = []
    for name, adata in cells.items():
        embedded = {
            "blood-mini": embed(adata, packed),
            "PCA, training cells": pca.transform(csr_matrix(adata.X), list(adata.var_names)),
        }
        for method, adata.obsm["X"] in embedded.items():
            methods[method][name] = with_mean(scores_within(adata, "X", ()))
        pair = [torch.from_numpy(vectors) for vectors in (embedded["blood-mini"], embed(adata, trained))]
        differences.append(float(1 - torch.cosine_similarity(*pair).min()))
    of_cells = pca_of_scored_cells(cells)
    methods["PCA, scored cells"] = {name: with_mean(scores) for name, scores in of_cells.items()}
    return {
        "cells": {name: adata.n_obs for name, adata in cells.items()},
        "methods": methods,
        "cosine_distance_of_float16": max(differences),
    }


def with_mean(scores: dict[str, float]) -> dict[str, float]:
    """Return scores with the mean of NMI, ARI and ASW label."""
    return scores | {"bio": round(float(np.mean([scores[metric] for metric in BIO])), 4)}


if __name__ == "__main__":
    main()
