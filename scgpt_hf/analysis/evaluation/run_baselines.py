"""Embed cells with the baselines of a run: its PCA and its small network, and its model before training.

A run keeps the first two in its folder, fitted to training cells. The untrained model is made again from the config
and the seed of the run.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import yaml

from scgpt_hf.cells.block import FloatArray, Int64Array
from scgpt_hf.cells.source import CellSource
from scgpt_hf.inference import embed_cells
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pretrained import load_processor
from scgpt_hf.scoring.count_mlp import MLP_FILE, CountMLP
from scgpt_hf.scoring.fitted_pca import PCA_FILE, FittedPCA
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

TRAINING_PCA, COUNT_MLP, UNTRAINED = "PCA, training cells", "count-decoder MLP", "untrained model"
_MODEL, _SETTINGS = "best_model", "settings.yaml"


def run_features(
    run: Path, source: CellSource, cell_ids: Int64Array, baselines: Collection[str], *, progress: bool = False
) -> dict[str, FloatArray]:
    """Embed cells with baselines of a pretraining run.

    Args:
        run: the run folder.
        source: source of the cells.
        cell_ids: which cells, ascending. Shape (cells,).
        baselines: which of `TRAINING_PCA`, `COUNT_MLP` and `UNTRAINED`; other names are ignored.
        progress: show a progress bar of the untrained model.

    Returns:
        Baseline → float32 features, shape (cells, features). A cell without a known gene has zeros from the untrained
        model.

    Raises:
        FileNotFoundError: the run lacks the file of a baseline.
        OSError, ValueError: a file is damaged, or too few genes are known.
    """
    features: dict[str, FloatArray] = {}
    processor = load_processor(run / _MODEL)
    if {TRAINING_PCA, COUNT_MLP} & set(baselines):
        counts, genes = source.read(cell_ids).counts, name_genes(source, processor)
        if TRAINING_PCA in baselines:
            features[TRAINING_PCA] = FittedPCA.load(run / PCA_FILE).transform(counts, genes)
        if COUNT_MLP in baselines:
            features[COUNT_MLP] = CountMLP.load(run / MLP_FILE).embed(counts, genes)
    if UNTRAINED in baselines:
        model = untrained_model(run)
        embedding = embed_cells(source, cell_ids, model, processor, empty="nan", progress=progress)
        features[UNTRAINED] = np.nan_to_num(embedding)
    return features


def available_baselines(run: Path) -> list[str]:
    """Return the baselines that a run folder has the files of."""
    files = {TRAINING_PCA: PCA_FILE, COUNT_MLP: MLP_FILE, UNTRAINED: f"{_MODEL}/config.json"}
    return [name for name, file in files.items() if (run / file).is_file()]


def untrained_model(run: Path) -> ScGPTForPreTraining:
    """Return the model of a run with the random weights that its seed gives, on a GPU if there is one.

    Gene vectors that started from the data are random in it.

    Raises:
        OSError, ValueError: the folder holds no model, or settings without a seed.
    """
    config = ScGPTConfig.from_pretrained(run / _MODEL)
    try:
        settings = yaml.safe_load((run / _SETTINGS).read_text(encoding="utf-8"))
        seed = int((settings.get("training") or {}).get("seed", 42))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{run / _SETTINGS} is damaged: {error}; copy it again") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ScGPTForPreTraining(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return model


def name_genes(source: CellSource, processor: ScGPTProcessor) -> list[str]:
    """Return the id of each column of a source, as the run names its genes: those named by symbol get their id.

    A column whose gene another column has already keeps the name that it has in the source.
    """
    names = source.genes["feature_id"].astype(str).tolist()
    vocabulary, seen = processor.genes, set()
    for column, gene in enumerate(match_source_genes(source.genes, processor).gene_ids.tolist()):
        if gene >= 0 and gene not in seen:
            seen.add(gene)
            names[column] = vocabulary[gene]
    return names
