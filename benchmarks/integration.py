"""Measure whether fine-tuning on several experimental batches mixes them, on real cells, beside HVG + PCA.

  python benchmarks/integration.py --data shared/data/blood --model runs/blood_transfer/best_model

Cells of each file are one batch. They are embedded by the pretrained model and, after `finetune.py --task integrate`
(GEP, GEPC, ECS, DAR and a batch norm for each batch), by what it left; labels are used by the scores alone. Batches mix
where iLISI, ASW batch and graph connectivity rise; mixing is worth something only where NMI, ARI, ASW label and cLISI
do not fall. Writes results/NAME.json.

The defaults are 60 steps, a minute or two. So few do nothing at finetune.py's learning rate but let the new norms set
the batches further apart (--learning_rate 1e-4 shows it), and scGPT's recipe takes thousands.
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
from scgpt_hf.analysis.evaluation.metrics import BATCH, BIO

BEFORE, AFTER = "pretrained", "integrated"


def main() -> None:
    """Print and write the scores before and after, beside the baseline."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=type("", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}),
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files")
    parser.add_argument("--model", required=True, help="folder of a pretrained model, or its repository on the Hub")
    parser.add_argument("--files", nargs="+", default=["pbmc3k_10x", "pbmc4k_asurat"], help="one for each batch")
    parser.add_argument("--cells", type=int, default=200, help="of each file, drawn at random")
    parser.add_argument("--labels_key", default="cell_type_coarse", help="obs column of cell types")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning")
    parser.add_argument("--batch_size", type=int, default=32, help="cells per step")
    parser.add_argument("--input_norm", choices=("domain", "none"), default="domain", help="a norm per batch, or none")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="ten times finetune.py's, for so few steps")
    parser.add_argument("--name", default="integration", help="of the result, results/NAME.json")
    parser.add_argument("--seed", type=int, default=0, help="of the cells drawn and of fine-tuning")
    options = parser.parse_args()
    cells = read_cells(options.data, options.files, options.cells, options.label, options.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        training = {
            name: getattr(options, name) for name in ("epochs", "batch_size", "input_norm", "learning_rate", "seed")
        }
        settings = IntegrateSettings(
            model=options.model, out=f"{folder}/joined", batch_key="batch", use_cpu=True, disable_tqdm=True, **training
        )
        summary = finetune_integration(cells, settings)
        seconds = time.perf_counter() - started
        for key, model in ((BEFORE, options.model), (AFTER, f"{folder}/joined/best_model")):
            embed_anndata(cells, model, key_added=key, progress=False)
    chosen = {"metrics": BIO + BATCH, "baselines": [PCA], "seed": options.seed}
    scored = evaluate_embeddings(cells, [BEFORE, AFTER], options.label, "batch", **chosen)
    scores = {method: one.values for method, one in scored.methods.items()}
    for metric in scores[AFTER]:
        print(f"{metric:<20}" + "".join(f"{method:>12} {scores[method][metric]:6.3f}" for method in scores))
    asked = {**training, "label": options.label, "batches": options.files, "cells_each": options.cells}
    told = {"model": Path(options.model).parent.name, "settings": asked, "cells_scored": len(scored.cells.rows)}
    write_result(
        options.name, {**told, "scores": scores, "fine_tuning_seconds": round(seconds, 1), "best": summary["best"]}
    )


def read_cells(folder: Path, files: list[str], n_cells: int, label: str, seed: int) -> anndata.AnnData:
    """Return cells of each file that have a label, with the file's name in obs["batch"], and the genes of all."""
    drawn = {}
    for name in files:
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        labelled = np.flatnonzero((adata.obs[label] != "unknown").to_numpy())
        rows = np.random.default_rng(seed).permutation(labelled)[:n_cells]
        drawn[name] = adata[np.sort(rows)].copy()
    return anndata.concat(drawn, label="batch", join="inner", merge="same", index_unique="-")


if __name__ == "__main__":
    main()
