"""The seed recipe, step by step: settings → cells → split → genes → processor and model.

Which cells and genes is decided once, by the first process, which tells the others; split.json keeps it for resuming.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError

from scgpt_hf.cells.block import Int64Array
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
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.fault_tolerance.resume import difference, require_resumable, require_same_cells
from scgpt_hf.training.provenance import composition_of
from scgpt_hf.training.run_folder import SETTINGS, SPLIT, claim_run_folder, write_whole
from scgpt_hf.training.settings import DataSettings, ModelSettings, Settings, TrainingSettings, settings_yaml

logger = logging.getLogger(__name__)


# Settings of the data that settle what a cell's tokens are.
_TOKENS = (
    *("n_bins", "max_tokens", "ties", "input_style", "target_sum"),
    *("cls_value", "pad_value", "mask_value", "batch_key"),
)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a run trains and validates on.

    Attributes:
        parts: "train" and "validation" → cell ids, ascending.
        genes: Ensembl ids of the vocabulary, in the order of their ids.
        domains: values of the domain column, in the order of their ids; empty where no head needs one.
        n_donors: "train" and "validation" → number of donors.
    """

    parts: dict[str, Int64Array]
    genes: list[str]
    domains: list[str]
    n_donors: dict[str, int]


def open_cells(settings: Settings) -> CellSource:
    """Return the source that the settings name; the demo's Census is built beside the run folders.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `open_source`.
    """
    data = settings.data
    address: Any = data.data[0] if len(data.data) == 1 else data.data
    if address == "demo":
        address = demo_cells() if settings.training.dry_run else demo_census(demo_folder(settings))
    return open_source(
        address,
        obs_filter=data.obs_filter,
        layer=data.layer,
        primary_only=data.primary_only,
    )


def demo_folder(settings: Settings) -> Path:
    """Return where the demo's Census lies."""
    return Path(settings.training.output_dir).parent / "demo_census"


def choose(source: CellSource, data: DataSettings, seed: int) -> Selection:
    """Return a run's cells and genes: donors drawn, poor cells dropped, donors split, genes chosen on training cells.

    Raises:
        ValueError: as the steps say; each names what it found and what to do.
    """
    columns = sorted({data.donor_key, *([data.batch_key] if data.batch_key else [])})
    obs = source.obs(columns)
    obs = obs.loc[cells_with_value(obs, data.donor_key)]
    if data.max_cells is not None:
        obs = obs.loc[sample_donors(obs, data.max_cells, seed=seed, donor_key=data.donor_key)]
    obs = obs.loc[filter_cells(source, obs.index.to_numpy(np.int64), data.min_genes)]
    fractions = {"train": 1 - data.validation_fraction, "validation": data.validation_fraction}
    parts = split_cells(obs, fractions, donor_key=data.donor_key, seed=seed)
    columns_chosen = _choose_genes(source, parts["train"], data)
    if data.gene_selection == "hvg":  # a cell may express none of a few genes; among all, min_genes sees to it
        parts = {part: cells_expressing(source, ids, columns_chosen) for part, ids in parts.items()}
    genes = source.genes["feature_id"].to_numpy()[columns_chosen]
    domains = [] if data.batch_key is None else sorted(obs[data.batch_key].astype(str).unique())
    n_donors = {part: int(obs.loc[cell_ids, data.donor_key].nunique()) for part, cell_ids in parts.items()}
    return Selection(parts, genes.tolist(), domains, n_donors)


def _choose_genes(source: CellSource, train: Int64Array, data: DataSettings) -> Int64Array:
    """Return the columns of the genes of the vocabulary, ascending."""
    frequent = filter_genes(source, train, data.min_gene_counts)
    if data.gene_selection == "all":
        return frequent
    return highly_variable_genes(source, train, data.n_hvg, batch_key=data.hvg_batch_key, candidates=frequent)


def begin_run(source: CellSource, settings: Settings) -> tuple[Selection, str | None]:
    """Return the run's cells and genes, and the checkpoint it resumes from; nothing is written.

    The first process decides, or reads what was decided when the run began, and tells the others.

    Raises:
        FileExistsError, FileNotFoundError: see `claim_run_folder`.
        ValueError: settings no model can have; see `choose`; a checkpoint that is not what was written, or not what a
            run needs; a resumed run whose cells, genes or tokens are other ones now.
    """
    args, folder = settings.training, Path(settings.training.output_dir)
    _config(settings.model, vocab_size=4, pad_token_id=1, n_bins=settings.data.n_bins, n_domains=2)
    told: list[Any] = [None, None]
    if PartialState().is_main_process:
        checkpoint = None if args.dry_run else claim_run_folder(folder, args.resume_from_checkpoint)
        if checkpoint is None:
            selection = choose(source, settings.data, args.seed)
        else:
            require_resumable(Path(checkpoint))
            selection, split = load_selection(folder / SPLIT)
            require_same_run(split.source, run_record(source, settings))
            _require_same_data(split, source, folder / SPLIT)
        told = [selection, checkpoint]
    selection, checkpoint = broadcast_object_list(told)
    return selection, checkpoint


def run_record(source: CellSource, settings: Settings) -> dict[str, Any]:
    """Return what must not change when a run is resumed: where its cells come from, their order, masks and tokens."""
    args, data = settings.training, settings.data
    steps = {
        "seed": args.seed,
        "chunk_size": source.chunk_size,
        "chunks_per_window": data.chunks_per_window,
        "cached": data.cache_dir is not None or None,  # null as in records that do not know the word
        "mask_ratios": list(data.mask_ratios),
    }
    return {**source.describe(), "steps": steps, "tokens": {name: getattr(data, name) for name in _TOKENS}}


def global_batch_size(args: TrainingSettings) -> int:
    """Return the cells of one step: of all processes and micro-batches together."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def require_same_run(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless a resumed run reads the same cells in the same order; how many make a step may change.

    Raises:
        ValueError: naming what differs, and how it was.
    """
    if changed := difference(recorded, now):
        began, found = ({name: values[when] for name, values in changed.items()} for when in (0, 1))
        raise ValueError(
            f"cannot resume exactly: the run began with {began}, found {found}; give the same settings and data"
        )


def _require_same_data(split: Split, source: CellSource, path: Path) -> None:
    """Raise unless a source still has the genes and cells of the selection recorded at `path`, of the same donors."""
    if absent := set(split.source["genes"]) - set(source.genes["feature_id"]):
        raise ValueError(
            f"{path} names {len(absent):,} genes that the data do not have, e.g. {sorted(absent)[:5]}; resume with "
            "the data that the run began with"
        )
    if split.donor_key is not None:
        require_same_cells(split.donors, split.parts, source.obs([split.donor_key])[split.donor_key])


def save_selection(selection: Selection, source: CellSource, settings: Settings) -> None:
    """Write settings.yaml and split.json into the run folder: donors and cells of each part, genes, provenance."""
    folder, data = Path(settings.training.output_dir), settings.data
    folder.mkdir(parents=True, exist_ok=True)
    record = {**run_record(source, settings), "genes": selection.genes, "domains": selection.domains}
    record["composition"] = composition_of(source, selection.parts)
    obs = source.obs([data.donor_key])
    save_split(
        folder / SPLIT, selection.parts, obs, donor_key=data.donor_key, seed=settings.training.seed, source=record
    )
    write_whole(folder / SETTINGS, settings_yaml(settings))


def load_selection(path: Path) -> tuple[Selection, Split]:
    """Return what `save_selection` wrote: the selection, and the split that holds it, with the run's record as source.

    Raises:
        ValueError: a malformed file, named with the key.
    """
    split = load_split(path)
    if absent := {"train", "validation"} - split.parts.keys():
        raise ValueError(f"{path} has no part {sorted(absent)}; it was not written by a pretraining run, or is damaged")
    for key in ("steps", "tokens"):
        if not isinstance(split.source.get(key, {}), dict):
            raise ValueError(f"{path}: expected names with values at {key!r} under 'source'")
    for key in ("genes", "domains", *({"paths"} & split.source.keys())):
        found = split.source.get(key)
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError(
                f"{path}: expected a list of names at {key!r} under 'source', found {str(found)[:80]}; it was not "
                "written by a pretraining run, or is damaged"
            )
    n_donors = {part: len(donors) for part, donors in split.donors.items()}
    return Selection(split.parts, split.source["genes"], split.source["domains"], n_donors), split


def build_processor(genes: list[str], data: DataSettings, source: CellSource | None = None) -> ScGPTProcessor:
    """Return the processor over the chosen genes: ids [0, genes - 1], then the specials.

    Args:
        genes: of the vocabulary.
        data: settings of the tokens.
        source: tells the symbols of the genes, by which other data may call them; unknown without it.
    """
    symbols = (
        None if source is None else source.genes.set_index("feature_id")["feature_name"].astype(str)[genes].tolist()
    )
    return ScGPTProcessor.from_genes(
        genes,
        n_bins=data.n_bins,
        max_tokens=data.max_tokens,
        cls_value=data.cls_value,
        pad_value=data.pad_value,
        mask_value=data.mask_value,
        ties=data.ties,
        input_style=data.input_style,
        target_sum=data.target_sum,
        symbols=symbols,
    )


def build_model(
    processor: ScGPTProcessor, model: ModelSettings, domains: Sequence[str] = (), batch_key: str | None = None
) -> ScGPTForPreTraining:
    """Return a new model for the processor's vocabulary; weights follow from torch's seed.

    Args:
        processor: of the model.
        model: sizes and options.
        domains: experimental batches, in the order of their ids.
        batch_key: obs column that names them.
    """
    new = ScGPTForPreTraining(
        _config(
            model,
            vocab_size=processor.vocab_size,
            pad_token_id=processor.pad_id,
            n_bins=processor.n_bins,
            n_domains=len(domains),
            domains=list(domains),
            batch_key=batch_key,
        )
    )
    start_at_mean(new, processor)
    return new


def start_at_mean(model: ScGPTForPreTraining, processor: ScGPTProcessor) -> None:
    """Let a new expression head begin at the mean of the bins.

    Bins are nearly uniform on 1 … n_bins - 1; a head that starts at 0 spends its first hundreds of steps on getting
    there.
    """
    if processor.input_style == "binned" and model.expression_head is not None:
        last: Any = model.expression_head.value[-1]
        torch.nn.init.constant_(last.bias, processor.n_bins / 2)


def _config(model: ModelSettings, **sizes: Any) -> ScGPTConfig:
    """Return the config; one that cannot be raises, naming the field."""
    fields: dict[str, Any] = {name: value for name, value in asdict(model).items() if value is not None}
    try:
        return ScGPTConfig(**fields, **sizes)
    except StrictDataclassError as error:
        raise ValueError(f"the model's settings do not fit together: {error.__cause__ or error}") from error
