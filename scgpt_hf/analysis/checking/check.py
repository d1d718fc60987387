"""Check a file of cells before any work: raw counts, genes, species, cells, obs columns, time and memory.

The check opens and reads the file with the functions that embedding and training use, so it finds what they would find.
It reads all counts once, and runs the model on a few cells. `cell_check.py` holds the result and its text.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from scgpt_hf.analysis.checking.cell_check import CellCheck
from scgpt_hf.analysis.checking.obs_roles import DONOR, find_group_columns
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.files.contents import Contents, contents_of, open_contents
from scgpt_hf.cells.files.layers import describe_layers
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.genes import ENSEMBL, find_gene_ids, find_species
from scgpt_hf.cells.selection.counts import stream_blocks
from scgpt_hf.inference import embed_batches
from scgpt_hf.measuring import peak_memory
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes, species_of_model
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

if TYPE_CHECKING:
    from anndata import AnnData

_TIMED_BATCHES = 3  # after a first one, which compiles and allocates


def check_cells(
    data: "AnnData | str | Path",
    model: PreTrainedModel | str | Path | None = None,
    processor: ScGPTProcessor | None = None,
    *,
    layer: str | None = None,
    round_counts: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> CellCheck:
    """Check whether cells can be used, before any work: their raw counts, genes, obs columns, time and memory.

    All counts are read once. With a model, a few batches are embedded to measure time and memory. Nothing is written.

    Args:
        data: an AnnData, or the path of a file; see `open_source` for the formats.
        model: folder or Hub repository, or a loaded model. Without one, only the data are checked.
        processor: the processor of a loaded model.
        layer: layer with the raw counts; by default it is found, see `open_source`.
        round_counts: round fractional counts.
        batch_size: cells per batch, for the estimates of time and memory.
        device: where a model that is loaded here runs; by default a GPU if there is one.

    Returns:
        The findings. `problems` is empty if the file will work; otherwise each entry says what to do.

    Raises:
        OSError: the file or the model does not exist or cannot be read.
        ValueError: the file is of no known format or is damaged, or the model cannot be used.

    Example:
        >>> from scgpt_hf import check_cells, demo_cells
        >>> found = check_cells(demo_cells())
        >>> found.ok, found.layer, found.species
        (True, 'X', 'human')
        >>> print(found)  # doctest: +SKIP
    """
    if model is not None:
        model, processor = load_model(model, processor, device=device)
    contents, source, problem = _open(data, layer, round_counts)
    try:
        genes = source.genes if source else _genes_of(contents)
        check = _check_tables(contents, genes, source.parts[0].layer if source else None)
        if problem:
            check.problems.append(problem)
        match = None
        if model is not None and processor is not None:
            check.model, check.model_species = model.name_or_path, species_of_model(processor)
            match = _match_genes(check, genes, processor)
        if source is not None:
            _read_counts(check, source, match, processor)
        if source is not None and match is not None and model is not None and processor is not None and check.ok:
            _measure(check, source, match, model, processor, batch_size)
    finally:
        contents.close()
    _add_notes(check)
    return check


def _open(
    data: "AnnData | str | Path", layer: str | None, round_counts: bool
) -> tuple[Contents, AnnDataSource | None, str | None]:
    """Return the contents of the data and their source; without a source, the reason why its counts cannot be used."""
    try:
        source = AnnDataSource(data, layer=layer, primary_only=False, round_counts=round_counts)
        return source.parts[0].contents, source, None
    except ValueError as error:
        # If the tables cannot be read either, the error of that is the better one.
        contents = open_contents(data) if isinstance(data, str | Path) else contents_of(data)
        return contents, None, str(error)


def _check_tables(contents: Contents, genes: pd.DataFrame, layer: str | None) -> CellCheck:
    """Return the findings in obs, var and the first cells of each layer.

    Args:
        contents: all layers and tables of the file.
        genes: its different genes, as `CellSource.genes`.
        layer: the layer whose counts are used, if there is one.
    """
    return CellCheck(
        name=contents.name,
        kind=contents.kind,
        n_cells=len(contents.obs),
        n_columns=len(contents.genes_of(layer or "X")),
        n_genes=len(genes),
        n_ensembl=int(genes["feature_id"].str.match(ENSEMBL).sum()),
        species=find_species(genes["feature_id"], genes["feature_name"]),
        layers=describe_layers(contents),
        layer=layer,
        repeated_barcodes=int(contents.obs.index.duplicated().sum()),
        groups=find_group_columns(contents.obs),
    )


def _genes_of(contents: Contents) -> pd.DataFrame:
    """Return the different genes of X, for a file without raw counts."""
    return find_gene_ids(contents.var, contents.name).drop_duplicates("feature_id", ignore_index=True)


def _match_genes(check: CellCheck, genes: pd.DataFrame, processor: ScGPTProcessor) -> GeneMatch | None:
    """Match the genes to the vocabulary; return None, and add a problem, if too few are known."""
    try:
        match = match_source_genes(genes, processor)
    except ValueError as error:
        check.problems.append(str(error))
        return None
    check.coverage = match.coverage
    return match


def _read_counts(
    check: CellCheck, source: AnnDataSource, match: GeneMatch | None, processor: ScGPTProcessor | None
) -> None:
    """Read all counts, which validates them, and count the cells without any, and without a known gene."""
    started, n_empty, unknown = time.perf_counter(), 0, np.empty(0, np.int64)
    try:
        for block in stream_blocks(source, source.obs().index.to_numpy(np.int64), "checking counts"):
            n_empty += int((np.diff(block.indptr) == 0).sum())
            if match is not None and processor is not None:
                n_known = processor.count_known(block, match.gene_ids)
                unknown = np.append(unknown, block.cell_ids[n_known == 0])
    except (OSError, ValueError) as error:
        check.problems.append(str(error))
        return
    check.empty_cells, check.read_seconds = n_empty, time.perf_counter() - started
    if match is None:
        return
    check.unknown_cells = len(unknown)
    if len(unknown):
        check.problems.append(
            f"{len(unknown):,} of {check.n_cells:,} cells express no gene of the vocabulary, e.g. rows "
            f"{unknown[:5].tolist()}; remove them, or keep them without an embedding: --empty nan (empty='nan' in "
            "Python)"
        )


def _measure(
    check: CellCheck,
    source: AnnDataSource,
    match: GeneMatch,
    model: PreTrainedModel,
    processor: ScGPTProcessor,
    batch_size: int,
) -> None:
    """Embed a few batches of cells from all of the file; estimate the time of all, and the memory."""
    cell_ids: Int64Array = source.obs().index.to_numpy(np.int64)
    n_sampled = min(len(cell_ids), batch_size * (1 + _TIMED_BATCHES))
    sample = cell_ids[np.linspace(0, len(cell_ids) - 1, n_sampled).astype(np.int64)]
    times = [time.perf_counter()]
    for _ in embed_batches(
        source, sample, model, processor, gene_match=match, batch_size=batch_size, empty="nan", progress=False
    ):
        times.append(time.perf_counter())
    seconds = np.diff(times)
    per_batch = float(seconds[1:].mean() if len(seconds) > 1 else seconds.mean())
    check.embed_seconds = per_batch * len(cell_ids) / min(batch_size, len(cell_ids))
    device: torch.device = model.device
    check.device, check.memory = str(device), peak_memory(device)


def _add_notes(check: CellCheck) -> None:
    """Add what works, but may surprise."""
    if check.n_columns > check.n_genes:
        check.notes.append(f"{check.n_columns - check.n_genes:,} columns repeat a gene; their counts are summed.")
    if check.repeated_barcodes:
        check.notes.append(f"{check.repeated_barcodes:,} cells have the name of an earlier one; all are kept.")
    if check.empty_cells:
        check.notes.append(f"{check.empty_cells:,} cells have no counts at all; training leaves them out.")
    if check.layer not in (None, "X"):
        check.notes.append(f"X does not hold the raw counts ({check.layers.get('X', 'absent')}): {check.layer} does.")
    species = check.species, check.model_species
    if check.model and check.ok and None not in species and species[0] != species[1]:
        check.notes.append(f"the genes are of {check.species}, those of the model of {check.model_species}.")
    if not any(column.role == DONOR and column.n_groups > 1 for column in check.groups):
        check.notes.append(
            "no obs column with two or more donors was recognized; training splits cells by donor: --donor_key COLUMN."
        )
