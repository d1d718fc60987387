"""Measure whether fine-tuning for integration mixes experimental batches, compared with HVG + PCA, on real cells.

  python benchmarks/integration.py --data shared/data/blood --model runs/blood_transfer/best_model

Each file is one batch. Its cells are embedded with the pretrained model, and again after `finetune.py --task
integrate` (objectives GEP, GEPC, ECS and DAR, and a batch norm for each batch). Labels are only used for scoring.
Batches are mixed better if iLISI, ASW batch and graph connectivity rise. That is useful only if NMI, ARI, ASW label
and cLISI do not fall. Writes results/NAME.json.

The defaults train for 60 steps, which takes one or two minutes; scGPT's recipe trains for thousands. With so few
steps at finetune.py's learning rate, the new batch norms only separate the batches further (try --learning_rate
1e-4).
"""

import argparse
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
from measuring import write_result

from scgpt_hf import IntegrateSettings, embed_anndata, finetune_integration
from scgpt_hf.analysis.evaluation.baseline_embeddings import PCA
from scgpt_hf.analysis.evaluation.evaluate import evaluate_embeddings
from scgpt_hf.scoring.metrics import BATCH, BIO

BEFORE, AFTER = "pretrained", "integrated"


def main() -> None:
    """Print and write the scores before and after fine-tuning, and those of the baseline."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--model", required=True, help="folder of a pretrained model, or its repository on the Hub")
    parser.add_argument(
        "--files", nargs="+", default=["pbmc3k_10x", "pbmc4k_asurat"], help="names of the files, one for each batch"
    )
    parser.add_argument("--cells", type=int, default=200, help="cells sampled from each file")
    parser.add_argument("--labels_key", default="cell_type_coarse", help="obs column of cell types")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of fine-tuning")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step")
    parser.add_argument(
        "--input_norm", choices=("domain", "none"), default="domain", help="one batch norm per batch, or none"
    )
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="ten times that of finetune.py, because there are few steps"
    )
    parser.add_argument("--name", default="integration", help="name of the result: results/NAME.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled cells and of fine-tuning")
    options = parser.parse_args()
    cells = read_cells(options.data, options.files, options.cells, options.labels_key, options.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        training = {
            name: getattr(options, name) for name in ("epochs", "batch_size", "input_norm", "learning_rate", "seed")
        }
        settings = IntegrateSettings(
            model=options.model,
            out=f"{folder}/integrated",
            batch_key="batch",
            use_cpu=True,
            disable_tqdm=True,
            **training,
        )
        summary = finetune_integration(cells, settings)
        seconds = time.perf_counter() - started
        for key, model in ((BEFORE, options.model), (AFTER, f"{folder}/integrated/best_model")):
            embed_anndata(cells, model, key_added=key, progress=False)
    chosen = {"metrics": BIO + BATCH, "baselines": [PCA], "seed": options.seed}
    scored = evaluate_embeddings(cells, [BEFORE, AFTER], options.labels_key, "batch", **chosen)
    scores = {method: one.values for method, one in scored.methods.items()}
    for metric in scores[AFTER]:
        print(f"{metric:<20}" + "".join(f"{method:>12} {scores[method][metric]:6.3f}" for method in scores))
    used = {**training, "labels_key": options.labels_key, "batches": options.files, "cells_per_batch": options.cells}
    result = {"model": Path(options.model).parent.name, "settings": used, "cells_scored": len(scored.cells.rows)}
    write_result(
        options.name, {**result, "scores": scores, "fine_tuning_seconds": round(seconds, 1), "best": summary["best"]}
    )


def read_cells(folder: Path, files: list[str], n_cells: int, labels_key: str, seed: int) -> anndata.AnnData:
    """Sample labelled cells of each file, and join them over the genes of all files; obs["batch"] is the file name."""
    sampled = {}
    for name in files:
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        labelled = np.flatnonzero((adata.obs[labels_key] != "unknown").to_numpy())
        rows = np.random.default_rng(seed).permutation(labelled)[:n_cells]
        sampled[name] = adata[np.sort(rows)].copy()
    return anndata.concat(sampled, label="batch", join="inner", merge="same", index_unique="-")


if __name__ == "__main__":
    main()
