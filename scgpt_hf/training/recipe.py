"""The seed recipe, step by step: settings → cells → split → genes → processor and model.

Which cells and genes is decided once, by the first process, and written to split.json; every process and every resumed
run reads it there.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState

from scgpt_hf.cells.select import filter_cells, filter_genes, highly_variable_genes, null_free, sample_donors
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.cells.splits import load_split, save_split, split_cells
from scgpt_hf.demo import demo_cells, demo_census
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.run_folder import SETTINGS, SPLIT, claim_run_folder, write_whole
from scgpt_hf.training.settings import DataSettings, ModelSettings, Settings, settings_yaml

Int64Array = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)


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
    columns = sorted({data.split_by, *([data.domain_key] if data.domain_key else [])})
    obs = source.obs(columns)
    obs = obs.loc[null_free(obs, data.split_by)]
    if data.max_cells is not None:
        obs = obs.loc[sample_donors(obs, data.max_cells, seed=seed, by=data.split_by)]
    obs = obs.loc[filter_cells(source, obs.index.to_numpy(np.int64), data.min_genes)]
    fractions = {"train": 1 - data.validation_fraction, "validation": data.validation_fraction}
    parts = split_cells(obs, fractions, by=data.split_by, seed=seed)
    genes = source.genes["feature_id"].to_numpy()[_choose_genes(source, parts["train"], data)]
    domains = [] if data.domain_key is None else sorted(obs[data.domain_key].astype(str).unique())
    n_donors = {part: int(obs.loc[cell_ids, data.split_by].nunique()) for part, cell_ids in parts.items()}
    return Selection(parts, genes.tolist(), domains, n_donors)


def _choose_genes(source: CellSource, train: Int64Array, data: DataSettings) -> Int64Array:
    """Return the columns of the genes of the vocabulary, ascending."""
    frequent = filter_genes(source, train, data.min_gene_counts)
    if data.gene_selection == "all":
        return frequent
    return highly_variable_genes(source, train, data.n_hvg, per=data.hvg_per, candidates=frequent)


def begin_run(source: CellSource, settings: Settings) -> tuple[Selection, str | None]:
    """Return the run's cells and genes, and the checkpoint it resumes from.

    The first process decides and writes, the others read what it wrote. A dry run writes nothing.

    Raises:
        FileExistsError, FileNotFoundError: see `claim_run_folder`.
        ValueError: see `choose`; a resumed run whose cells are not there any more.
    """
    args, folder = settings.training, Path(settings.training.output_dir)
    state, checkpoint = PartialState(), None
    if args.dry_run:
        return choose(source, settings.data, args.seed), None
    with state.main_process_first():
        if state.is_main_process or args.resume_from_checkpoint is not None:
            checkpoint = claim_run_folder(folder, args.resume_from_checkpoint)
        if state.is_main_process and checkpoint is None:
            selection = choose(source, settings.data, args.seed)
            folder.mkdir(parents=True, exist_ok=True)
            save_selection(selection, source, settings.data, args.seed, folder / SPLIT)
            write_whole(folder / SETTINGS, settings_yaml(settings))
        selection = load_selection(folder / SPLIT)
    return selection, checkpoint


def save_selection(selection: Selection, source: CellSource, data: DataSettings, seed: int, path: Path) -> None:
    """Write split.json: donors and cells of each part, genes, and where they came from."""
    obs = source.obs([data.split_by])
    chosen = {"genes": selection.genes, "domains": selection.domains}
    save_split(path, selection.parts, obs, by=data.split_by, seed=seed, source={**source.describe(), **chosen})


def load_selection(path: Path) -> Selection:
    """Return what `save_selection` wrote.

    Raises:
        ValueError: a malformed file, named with the key.
    """
    split = load_split(path)
    try:
        n_donors = {part: len(donors) for part, donors in split.donors.items()}
        return Selection(split.parts, split.source["genes"], split.source["domains"], n_donors)
    except KeyError as error:
        raise ValueError(
            f"{path} lacks the key {error} under 'source'; it was not written by a pretraining run"
        ) from error


def build_processor(genes: list[str], data: DataSettings) -> ScGPTProcessor:
    """Return the processor over the chosen genes: ids [0, genes - 1], then the specials."""
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
    )


def build_model(processor: ScGPTProcessor, model: ModelSettings, n_domains: int) -> ScGPTForPreTraining:
    """Return a new model for the processor's vocabulary; weights follow from torch's seed.

    Bins are nearly uniform on 1 … n_bins - 1, so the expression head starts at their mean: one that starts at 0 spends
    its first hundreds of steps on getting there.
    """
    shape: dict[str, Any] = asdict(model)
    config = ScGPTConfig(
        vocab_size=processor.vocab_size,
        pad_token_id=processor.pad_id,
        n_bins=processor.n_bins,
        n_domains=n_domains,
        **shape,
    )
    new = ScGPTForPreTraining(config)
    if processor.input_style == "binned" and new.expression_head is not None:
        last: Any = new.expression_head.value[-1]
        torch.nn.init.constant_(last.bias, processor.n_bins / 2)
    return new
