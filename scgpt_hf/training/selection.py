"""Select the cells and genes of a run, and record the selection in the run folder.

The first process selects and sends the result to the others. `split.json` keeps it, so that a resumed run trains on the
same cells.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import UNKNOWN, fill_missing, has_label, number_texts
from scgpt_hf.cells.modalities import RNA, modalities_of
from scgpt_hf.cells.obs import require_named_columns, take_cells
from scgpt_hf.cells.schedule.balance import Balance, balance_groups
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.selection.dispersion import dispersed_genes
from scgpt_hf.cells.selection.filters import (
    cells_expressing,
    cells_with_value,
    filter_cells,
    filter_genes,
    sample_donors,
)
from scgpt_hf.cells.selection.hvg import highly_variable_genes
from scgpt_hf.cells.selection.splits import Split, load_split, save_split, split_cells
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.demo import demo_cells, demo_census
from scgpt_hf.training.fault_tolerance.resume import changed_values, require_resumable, require_same_cells
from scgpt_hf.training.optimization.optimizers import MUON
from scgpt_hf.training.run_folder import SETTINGS, SPLIT, resolve_checkpoint
from scgpt_hf.training.settings import DEFAULT_BATCH_KEY, TOKEN_SETTINGS, DataSettings, Settings
from scgpt_hf.training.settings_parsing import settings_yaml

logger = logging.getLogger(__name__)

MAX_GENE_CELLS = 1 << 19  # training cells on which a dry run chooses the genes; of more, it takes a sample


@dataclass(frozen=True, eq=False)
class Selection:
    """The cells and genes of a run.

    Attributes:
        parts: "train" and "validation" → cell ids, ascending. Shape (cells of the part,).
        genes: Ensembl ids of the vocabulary, in the order of their token ids.
        domains: experimental batches, in the order of their ids; empty if the model uses none.
        n_donors: "train" and "validation" → number of donors.
        classes: labels that the run learns, in the order of their ids; empty if it learns none.
        balance: draws the training cells of each epoch; None visits each once.
        n_gene_cells: number of training cells on which the genes were chosen, if not on all.
    """

    parts: dict[str, Int64Array]
    genes: list[str]
    domains: list[str]
    n_donors: dict[str, int]
    classes: list[str] = field(default_factory=list)
    balance: Balance | None = None
    n_gene_cells: int | None = None

    @property
    def domain_ids(self) -> dict[str, int]:
        """Id of each experimental batch."""
        return {domain: index for index, domain in enumerate(self.domains)}

    @property
    def class_ids(self) -> dict[str, int]:
        """Id of each label."""
        return {label: index for index, label in enumerate(self.classes)}


def open_cells(settings: Settings) -> CellSource:
    """Open the source that the settings name.

    The demo is written as a local Census to `demo_folder`, unless it is there already or the run is a dry run. If obs
    lacks the default `batch_key`, it is set to None.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `open_source`.
    """
    data = settings.data
    if not data.data:
        raise ValueError("there are no data to train on; name them with --data, or under 'data' in the YAML file")
    address: Any = data.data[0] if len(data.data) == 1 else data.data
    if address == "demo":
        address = demo_cells() if settings.training.dry_run else demo_census(demo_folder(settings))
    source = open_source(
        address,
        obs_filter=data.obs_filter,
        layer=data.layer,
        primary_only=data.primary_only,
        round_counts=data.round_counts,
    )
    if data.batch_key == DEFAULT_BATCH_KEY and DEFAULT_BATCH_KEY not in source.obs_columns:
        logger.info("obs has no column %r: all cells are one experimental batch (see --batch_key)", DEFAULT_BATCH_KEY)
        data.batch_key = None
    return source


def demo_folder(settings: Settings) -> Path:
    """Return the folder of the demo's Census: beside the run folders."""
    return Path(settings.training.output_dir).parent / "demo_census"


def select_or_resume(source: CellSource, settings: Settings) -> tuple[Selection, str | None]:
    """Return the cells and genes of a run, and the checkpoint that it resumes from, or None. Nothing is written.

    The first process selects, or reads the selection that a resumed run started with, and sends it to the others.

    Raises:
        FileExistsError, FileNotFoundError: see `resolve_checkpoint`.
        ValueError: see `select_cells_and_genes`; a checkpoint that is damaged or incomplete; a resumed run whose cells,
            genes or tokens are no longer the same.
    """
    args, folder = settings.training, Path(settings.training.output_dir)
    decided: list[Any] = [None, None]
    if PartialState().is_main_process:
        checkpoint = None if args.dry_run else resolve_checkpoint(folder, args.resume_from_checkpoint)
        if checkpoint is None:
            selection = select_cells_and_genes(source, settings.data, args.seed, sample=args.dry_run)
        else:
            require_resumable(Path(checkpoint))
            selection, split = load_selection(folder / SPLIT)
            selection = replace(selection, balance=_find_balance(source, selection.parts["train"], settings.data))
            _require_same_run(split.source, _run_record(source, settings, selection.balance))
            _require_same_data(split, source, folder / SPLIT)
        decided = [selection, checkpoint]
    selection, checkpoint = broadcast_object_list(decided)
    return selection, checkpoint


def select_cells_and_genes(source: CellSource, data: DataSettings, seed: int, *, sample: bool = False) -> Selection:
    """Select the cells and genes of a new run.

    Cells without a donor or a batch are dropped, donors are sampled, cells with few genes are dropped, donors are split
    into training and validation, and genes are chosen on the training cells alone, so that nothing of the validation
    cells enters the model.

    Args:
        source: source of the cells.
        data: the settings of the selection.
        seed: determines which donors are sampled and how they are split.
        sample: choose the genes on the cells that the run would read first, if there are more than `MAX_GENE_CELLS`;
            to choose them on all takes hours where there are 100 million cells.

    Raises:
        ValueError: a step leaves too few cells, donors or genes. The message names what was found and how to fix it.
    """
    hvg_batch_key = _find_hvg_batch_key(source, data) if data.gene_selection == "hvg" else None
    named = {"--donor_key": data.donor_key, "--batch_key": data.batch_key, "--hvg_batch_key": hvg_batch_key}
    named |= {"--supervise_by": data.supervise_by, "--balance_by": data.balance_by}
    require_named_columns(named, source.obs_columns)
    obs = source.obs(sorted({data.donor_key, *([data.batch_key] if data.batch_key else [])}))
    for column in dict.fromkeys([data.donor_key, *([data.batch_key] if data.batch_key else [])]):
        obs = take_cells(obs, cells_with_value(obs, column))
    if data.max_cells is not None:
        obs = take_cells(obs, sample_donors(obs, data.max_cells, seed=seed, donor_key=data.donor_key))
    obs = take_cells(obs, filter_cells(source, obs.index.to_numpy(np.int64), data.min_genes))
    fractions = {"train": 1 - data.validation_fraction, "validation": data.validation_fraction}
    parts = split_cells(obs, fractions, donor_key=data.donor_key, seed=seed)
    classes = [] if data.supervise_by is None else labels_of(source, parts["train"], data.supervise_by)
    sampled = sample and len(parts["train"]) > MAX_GENE_CELLS
    gene_cells = _first_cells(source, parts["train"], seed) if sampled else parts["train"]
    min_counts = data.min_gene_counts
    if sampled and min_counts > 0:
        min_counts = max(1, round(min_counts * len(gene_cells) / len(parts["train"])))
    columns = _select_genes(source, gene_cells, replace(data, min_gene_counts=min_counts), hvg_batch_key)
    if data.gene_selection == "hvg" and not sampled:
        # A cell may express none of the variable genes. With all genes, `min_genes` already excludes such cells.
        parts = {part: cells_expressing(source, ids, columns) for part, ids in parts.items()}
    genes = source.genes["feature_id"].to_numpy()[columns]
    domains = [] if data.batch_key is None else number_texts(obs[data.batch_key])[1]
    n_donors = {part: len(number_texts(take_cells(obs[data.donor_key], ids))[1]) for part, ids in parts.items()}
    balance = _find_balance(source, parts["train"], data)
    n_gene_cells = len(gene_cells) if sampled else None
    return Selection(parts, genes.tolist(), domains, n_donors, classes, balance, n_gene_cells)


def labels_of(source: CellSource, cell_ids: Int64Array, column: str) -> list[str]:
    """Return the different labels of some cells in an obs column, sorted.

    Args:
        source: source of the cells.
        cell_ids: ids of the training cells. Labels that only validation cells have cannot be learned.
        column: the column. Missing values and "unknown" are no labels.

    Raises:
        ValueError: the cells have fewer than two labels.
    """
    values = take_cells(source.obs([column])[column], cell_ids)
    labels = number_texts(values[has_label(values)])[1]
    if len(labels) < 2:
        raise ValueError(
            f"of {len(values):,} training cells, obs[{column!r}] has the labels {labels}; expected two or more, not "
            "counting missing values and 'unknown'; choose another column (--supervise_by) or other cells"
        )
    return labels


def composition_of(source: CellSource, parts: dict[str, Int64Array]) -> dict[str, dict[str, int]]:
    """Count the cells of each tissue, assay, disease and data set, for those columns that the source has.

    Args:
        source: source of the cells.
        parts: part → cell ids. Shape (cells of the part,).

    Returns:
        obs column → value → number of cells, over all parts. Missing values are counted as "unknown".
    """
    columns = [
        column for column in ("tissue_general", "assay", "disease", "dataset_id") if column in source.obs_columns
    ]
    obs = take_cells(source.obs(columns), np.concatenate(list(parts.values())))
    return {column: _count_values(obs[column]) for column in columns}


def _count_values(column: pd.Series) -> dict[str, int]:
    """Return the number of cells of each value of an obs column, the most frequent first."""
    numbers, texts = number_texts(column)
    n_cells = pd.Series(np.bincount(numbers + 1, minlength=len(texts) + 1), [UNKNOWN, *texts]).groupby(level=0).sum()
    return {str(text): int(n) for text, n in n_cells[n_cells > 0].sort_values(ascending=False, kind="stable").items()}


def supervision_of(source: CellSource, selection: Selection, column: str | None) -> dict[str, Any] | None:
    """Describe the labels that a run learns: the obs column, its values, and the share of cells that have one of them.

    Args:
        source: source of the cells.
        selection: cells and classes of the run.
        column: the obs column; None if the run learns no labels, and then the result is None.
    """
    if column is None:
        return None
    values = source.obs([column])[column]
    shares = {}
    for part, cell_ids in selection.parts.items():
        of_part = take_cells(values, cell_ids)
        learned = has_label(of_part) & fill_missing(of_part).isin(selection.classes).to_numpy()
        shares[f"labelled_{part}"] = float(learned.mean())
    return {"column": column, "classes": selection.classes, **shares}


def save_selection(selection: Selection, source: CellSource, settings: Settings) -> None:
    """Write settings.yaml and split.json into the run folder: donors and cells of each part, genes, provenance."""
    folder, data = Path(settings.training.output_dir), settings.data
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **_run_record(source, settings, selection.balance),
        "genes": selection.genes,
        "domains": selection.domains,
        "classes": selection.classes,
        "composition": composition_of(source, selection.parts),
    }
    obs = source.obs([data.donor_key])
    save_split(
        folder / SPLIT, selection.parts, obs, donor_key=data.donor_key, seed=settings.training.seed, source=record
    )
    write_atomically(folder / SETTINGS, settings_yaml(settings))


def load_selection(path: Path) -> tuple[Selection, Split]:
    """Read what `save_selection` wrote.

    Returns:
        The selection, and the split that contains it. The split's `source` is the record of the run.

    Raises:
        ValueError: the file is malformed. The message names the key.
    """
    split = load_split(path)
    if absent := {"train", "validation"} - split.parts.keys():
        raise ValueError(f"{path} has no part {sorted(absent)}; it is damaged or not from a pretraining run")
    for key in ("steps", "tokens"):
        if not isinstance(split.source.get(key, {}), dict):
            raise ValueError(f"{path}: expected names with values at {key!r} under 'source'")
    for key in ("genes", "domains", *sorted({"classes", "paths"} & split.source.keys())):
        found = split.source.get(key)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError(
                f"{path}: expected a list of names at {key!r} under 'source', found {str(found)[:80]}; it is damaged "
                "or not from a pretraining run"
            )
    n_donors = {part: len(donors) for part, donors in split.donors.items()}
    record = split.source
    return Selection(split.parts, record["genes"], record["domains"], n_donors, record.get("classes", [])), split


def _find_hvg_batch_key(source: CellSource, data: DataSettings) -> str | None:
    """Return the column of the batches within which variable genes are ranked.

    By default they are the donors. If these are in another column than by default, so are the batches.
    """
    default = DataSettings.__dataclass_fields__["hvg_batch_key"].default
    if data.hvg_batch_key != default or default in source.obs_columns or data.donor_key not in source.obs_columns:
        return data.hvg_batch_key
    logger.info("variable genes are ranked within each %s, because obs has no column %s", data.donor_key, default)
    return data.donor_key


def _first_cells(source: CellSource, train: Int64Array, seed: int) -> Int64Array:
    """Return the training cells of the first shuffle window of a run, whose chunks are a random sample, ascending."""
    plan = plan_epoch(train, seed=seed, epoch=0, batch_size=1, chunk_size=source.chunk_size)
    return np.sort(plan.window(0), axis=None)


def _select_genes(source: CellSource, train: Int64Array, data: DataSettings, hvg_batch_key: str | None) -> Int64Array:
    """Return the columns of the vocabulary's genes, ascending. Shape (genes,)."""
    frequent = filter_genes(source, train, data.min_gene_counts)
    if data.gene_selection == "all":
        return frequent
    is_rna = np.array([one == RNA for one in modalities_of(source.genes["feature_id"].iloc[frequent].tolist())])
    choose = dispersed_genes if data.hvg_flavor == "seurat" else highly_variable_genes
    variable = choose(source, train, data.n_hvg, batch_key=hvg_batch_key, candidates=frequent[is_rna])
    return np.sort(np.concatenate([variable, frequent[~is_rna]]))  # all proteins: panels are small, and chosen already


def _find_balance(source: CellSource, train: Int64Array, data: DataSettings) -> Balance | None:
    """Return how often each group of training cells is drawn, or None for natural order."""
    if data.balance_by is None:
        return None
    return balance_groups(source.obs([data.balance_by])[data.balance_by].reindex(train), data.balance_power)


def _run_record(source: CellSource, settings: Settings, balance: Balance | None) -> dict[str, Any]:
    """Return the record that a resumed run must match: its source, and the settings of order, masks and tokens.

    The batch size is not part of it: `RunSchedule` continues an epoch with another one.
    """
    args, data = settings.training, settings.data
    steps = {
        "seed": args.seed,
        "chunk_size": source.chunk_size,
        "chunks_per_window": data.chunks_per_window,
        "cached": data.cache_dir is not None or None,  # None, as in a record that does not have the key
        "mask_ratios": list(data.mask_ratios),
        "train_tokens": data.train_tokens,
        "leave_out_masked": settings.model.leave_out_masked or None,
        "objective": None if settings.model.objective == "masked" else settings.model.objective,
        "gen_after_steps": args.gen_after_steps if (settings.model.loss_weights or {}).get("gen") else None,
        "batch_key": data.batch_key,
        "supervise_by": data.supervise_by,
        "input_keep": data.input_keep,
        "view_keep": list(data.view_keep) if (settings.model.loss_weights or {}).get("views") else None,
        # What a checkpoint holds depends on these two.
        "ema_decay": args.ema_decay,
        "optim": MUON if args.optim == MUON else None,
        "balance_by": data.balance_by,
        "balance_power": None if balance is None else balance.power,
        "balanced_cells": None if balance is None else balance.fingerprint(),
    }
    values = asdict(data)
    return {**source.describe(), "steps": steps, "tokens": {name: values[name] for name in TOKEN_SETTINGS}}


def _require_same_run(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless a resumed run reads the same cells in the same order and makes the same tokens of them.

    Raises:
        ValueError: names the settings that differ, with the recorded and the present value.
    """
    if changed := changed_values(recorded, now):
        before, after = ({name: values[when] for name, values in changed.items()} for when in (0, 1))
        raise ValueError(
            f"cannot resume exactly: the run started with {before}, found {after}; use the same settings and data"
        )


def _require_same_data(split: Split, source: CellSource, path: Path) -> None:
    """Raise unless the source still has the genes and cells recorded at `path`, from the same donors."""
    if absent := set(split.source["genes"]) - set(source.genes["feature_id"]):
        raise ValueError(
            f"{path} names {len(absent):,} genes that are not in the data, e.g. {sorted(absent)[:5]}; resume with the "
            "data that the run started with"
        )
    if split.donor_key is not None:
        require_same_cells(split.donors, split.parts, source.obs([split.donor_key])[split.donor_key])
