"""The settings of a pretraining run, in three sections: data, model and training.

Each setting has one owner. The model settings are the fields of `ScGPTConfig`, and the token settings are the arguments
of `ScGPTProcessor`: their names, types, defaults and help texts are read from there. `settings_parsing.py` reads YAML
files and command lines.
"""

import dataclasses
import inspect
import json
import math
import re
import types
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.optimization import get_scheduler
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType

from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.scoring.embedding_scores import EMBEDDING_SCORES
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.optimization.optimizers import MUON
from scgpt_hf.training.optimization.precision import gpu_has_bfloat16, has_bfloat16
from scgpt_hf.training.optimization.schedules import scheduler_arguments

# Fields of `ScGPTConfig` that a pretraining run derives from the processor and the data.
_NOT_MODEL_SETTINGS = {
    *("vocab_size", "pad_token_id", "n_bins", "n_domains", "batch_key", "domains", "modalities"),
    *("perturbation_cls", "perturbation_sum", "total_key"),  # of perturbation models
}
# Arguments of `ScGPTProcessor` that come from the data.
_NOT_TOKEN_SETTINGS = {"self", "tokenizer", "symbols", "modalities"}

# Experimental batches of the objectives that need them, unless the data have no such obs column.
DEFAULT_BATCH_KEY = "dataset_id"

CHUNKS_PER_WINDOW: int = inspect.signature(plan_epoch).parameters["chunks_per_window"].default

# Valid ranges, checked before anything is read: lowest value, and the value that all must stay below. NaN fails both.
_DATA_RANGES: dict[str, tuple[float, float]] = {
    "max_cells": (1, 2**53),
    "min_genes": (0, 2**31),
    "min_gene_counts": (0, 2**53),
    "train_tokens": (2, 2**31),
    "chunks_per_window": (1, 2**31),
}
_TRAINING_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 2**31),
    "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31),
    "num_train_epochs": (0, 100_000),  # every epoch is planned before the first one starts
    "max_steps": (-1, 2**31),
    "learning_rate": (0, math.inf),
    "lr_decay_per_epoch": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "logging_steps": (0, 2**31),
    "eval_steps": (0, 2**31),
    "save_steps": (0, 2**31),
    "save_total_limit": (1, 2**31),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "cpu_threads": (0, 1024),  # OpenMP crashes when the system refuses to start a thread
    "ddp_timeout": (1, 10**9),
    "shortcut_steps": (0, 2**31),
    "gen_after_steps": (0, 2**31),
    "max_bad_steps": (1, 2**31),
    "ema_decay": (0, 1),
}
_HIGHER_IS_BETTER = {"variance_explained", *EMBEDDING_SCORES}
# Source: the documentation of `torch.compile`. torch itself reports an unknown mode only in a traceback.
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a text for `--help`.

    Args:
        default: value of the field. Each instance gets its own copy of a list or dictionary.
        help: one line for the command line.
    """
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def argument_help(documented: type) -> dict[str, str]:
    """Return the description of each argument in the `Args` section of a class docstring.

    Args:
        documented: class with a Google-style docstring. Without docstrings (python -OO) the result is empty.
    """
    section = (inspect.getdoc(documented) or "").partition("Args:\n")[2]
    texts: dict[str, str] = {}
    for line in section.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if named := re.match(r" {4}(\w+): (.*)", line):
            name = named[1]
            texts[name] = named[2]
        elif line.strip():
            texts[name] += f" {line.strip()}"
    # argparse formats help texts with the % operator.
    return {name: text.rstrip(".").replace("%", "%%") for name, text in texts.items()}


def _model_fields() -> list[tuple[str, Any, Any]]:
    """Return name, type and dataclass field of each setting that `ScGPTConfig` owns."""
    texts, derived = argument_help(ScGPTConfig), []
    for owned in dataclasses.fields(ScGPTConfig):
        if owned.name in ScGPTConfig.__annotations__.keys() - _NOT_MODEL_SETTINGS:  # not a field of the library's class
            default = owned.default_factory() if callable(owned.default_factory) else owned.default
            derived.append((owned.name, _parseable(owned.type), setting(default, texts.get(owned.name, ""))))
    return derived


def _token_fields() -> list[tuple[str, Any, Any]]:
    """Return name, type and dataclass field of each setting that `ScGPTProcessor` owns."""
    texts, annotations = argument_help(ScGPTProcessor), get_type_hints(ScGPTProcessor.__init__)
    return [
        (name, _parseable(annotations[name]), setting(parameter.default, texts.get(name, "")))
        for name, parameter in inspect.signature(ScGPTProcessor.__init__).parameters.items()
        if name not in _NOT_TOKEN_SETTINGS
    ]


def _parseable(annotation: Any) -> Any:
    """Return a type that `HfArgumentParser` can parse: it takes no `float | int`, and dictionaries only as text."""
    if get_origin(annotation) in {Union, types.UnionType} and set(get_args(annotation)) == {float, int}:
        return float
    return dict[str, float] | str | None if get_origin(annotation) is dict else annotation


_TokenFields: Any = make_dataclass("_TokenFields", _token_fields())
_ModelFields: Any = make_dataclass("_ModelFields", _model_fields())
# The settings that determine the tokens of a cell. A resumed run must keep them.
TOKEN_SETTINGS = tuple(owned.name for owned in dataclasses.fields(_TokenFields))


@dataclass
class CellSettings:
    """Which cells and genes a run reads, and in which order."""

    data: list[str] = setting(
        [],
        "'demo' (700 blood cells that come with scanpy), census://VERSION/ORGANISM, a local SOMA, files "
        f"({SUPPORTED}), a cache, one on the Hub, hf://datasets/OWNER/NAME, or a SOMA or cache in s3://BUCKET/FOLDER",
    )
    obs_filter: str | None = setting(None, "SOMA value filter on obs, e.g. \"tissue_general == 'blood'\"")
    primary_only: bool = setting(True, "keep only cells with is_primary_data == True, so that no cell occurs twice")
    layer: str | None = setting(
        None, "layer with the raw counts; by default 'raw' of a SOMA, and of a file the one that has them"
    )
    round_counts: bool = setting(False, "round fractional counts of files instead of stopping")
    max_cells: int | None = setting(None, "sample whole donors at random up to this many cells; by default all cells")
    donor_key: str = setting("donor_id", "obs column of the donor; no donor is in both training and validation")
    validation_fraction: float = setting(0.2, "share of the cells held out for validation, in whole donors")
    min_genes: int = setting(10, "drop cells that express fewer genes")
    min_gene_counts: int = setting(3, "drop genes with a lower sum of counts over the training cells")
    gene_selection: Literal["hvg", "all"] = setting(
        "all",
        "'hvg': use the n_hvg most variable genes; 'all': use every gene, and sample max_tokens of the genes that a "
        "cell expresses",
    )
    n_hvg: int = setting(1200, "number of highly variable genes, computed on the training cells")
    hvg_flavor: Literal["seurat_v3", "seurat"] = setting(
        "seurat_v3",
        "how scanpy's function of that name ranks genes: seurat_v3 by the variance of raw counts, seurat by the "
        "dispersion of counts scaled to the same sum per cell, which suits cells of different sequencing depth",
    )
    hvg_batch_key: str | None = setting(
        "donor_id", "obs column of the batches for highly variable genes (batch_key of scanpy's function)"
    )
    train_tokens: int | None = setting(
        None,
        "most tokens per cell while training, including <cls>: genes are sampled anew for each cell and epoch; "
        "max_tokens, the default, stays the limit of validation and inference",
    )
    mask_ratios: list[float] = setting(
        [0.25, 0.5, 0.75], "shares of a cell's genes to mask; one is drawn for each cell and epoch"
    )
    batch_key: str | None = setting(
        None,
        "obs column of the experimental batch, for heads, norms and objectives that use it; with the objectives "
        "'counts' and 'views' dataset_id, if obs has it",
    )
    input_keep: list[float] | None = setting(
        None,
        "shares of a cell's counts that its input keeps while training, as if it had been sequenced less deeply; one "
        "is drawn for each cell and epoch, and targets of the objective 'counts' stay complete; by default all",
    )
    view_keep: list[float] = setting(
        [0.25, 0.5, 0.75],
        "shares of a cell's counts that its second view keeps, for the objective 'views'; one is drawn for each cell "
        "and epoch",
    )
    supervise_by: str | None = setting(
        None,
        "obs column of labels to learn with the objective 'cls', e.g. cell_type; cells without a value or with "
        "'unknown' have no label; by default pretraining uses no labels",
    )
    cache_dir: str | None = setting(
        None,
        "write the cells to this folder during the first epoch, and read and shuffle all of them from there in later "
        "epochs; takes about 5 kB per cell, twice that while it is written; an existing cache is used from the start",
    )
    balance_by: str | None = setting(
        None,
        "obs column, e.g. cell_type, tissue, assay or donor_id: draw its rare values more often in each epoch; by "
        "default every cell is visited once an epoch",
    )
    balance_power: float = setting(
        0.5, "with balance_by: a value of n cells is drawn in proportion to n^(1 - power); 1: all values equally often"
    )
    chunks_per_window: int = setting(
        CHUNKS_PER_WINDOW, "number of chunks (2,048 neighboring cells each) whose cells are shuffled together"
    )


# The base class `_TokenFields` has a field for each argument of `ScGPTProcessor.__init__` that is not derived from the
# data: n_bins, max_tokens, cls_value, pad_value, mask_value, ties, input_style, target_sum and include_zeros. Their
# values are checked by the processor, which `check_settings` builds before any data are read.
@dataclass
class DataSettings(_TokenFields, CellSettings):  # type: ignore[misc]
    """Which cells and genes a run reads, and how they become tokens. The token settings belong to `ScGPTProcessor`."""

    _argument_group_name = "data settings"  # heading of these flags in --help

    def __post_init__(self) -> None:
        """Check the values that can be checked without reading the data."""
        _require_in_range(self, _DATA_RANGES)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected validation_fraction between 0 and 1, found {self.validation_fraction}")
        if not self.mask_ratios or not all(0 < ratio < 1 for ratio in self.mask_ratios):
            raise ValueError(f"expected mask_ratios between 0 and 1, found {self.mask_ratios}")
        for name, shares in {"input_keep": self.input_keep, "view_keep": self.view_keep}.items():
            if shares is not None and (not shares or not all(0 < share <= 1 for share in shares)):
                raise ValueError(f"expected {name} above 0 and at most 1, found {shares}")
        if not 0 <= self.balance_power <= 1:
            raise ValueError(f"expected balance_power from 0 to 1, found {self.balance_power}")
        if (self.train_tokens or 0) > self.max_tokens:
            raise ValueError(
                f"expected train_tokens <= max_tokens, found {self.train_tokens:,} > {self.max_tokens:,}; "
                "raise max_tokens"
            )


@dataclass
class ModelSettings(_ModelFields):  # type: ignore[misc]
    """Size and objectives of the model: the fields of `ScGPTConfig` that do not follow from the data."""

    _argument_group_name = "model settings"

    def __post_init__(self) -> None:
        """Decode the loss weights if they come from the command line as JSON."""
        weights = vars(self)["loss_weights"]
        if isinstance(weights, str):
            try:
                weights = json.loads(weights)
            except json.JSONDecodeError as error:
                raise ValueError(f"expected loss_weights as JSON, found {weights!r}: {error}") from error
        if not isinstance(weights, dict | None):
            raise ValueError(f"expected loss_weights as names with numbers, found {weights!r}")
        self.loss_weights = weights


@dataclass
class TrainingSettings(TrainingArguments):
    """The `TrainingArguments` of transformers with defaults for pretraining, and a few settings of our own.

    Source: learning rate, epochs and batch size of Cui et al. 2024, Nature Methods 21:1470.
    """

    _argument_group_name = "training settings"

    output_dir: str = setting("runs/pretraining", "run folder; every new run needs a new one")
    per_device_train_batch_size: int = setting(32, "cells per step and device")
    per_device_eval_batch_size: int = setting(64, "cells per validation step and device")
    num_train_epochs: float = setting(6, "number of epochs")
    optim: str = setting(
        TrainingArguments.default_optim,
        "an optimizer of transformers, or muon: Muon for the matrices of the encoder's layers, AdamW for the rest",
    )
    learning_rate: float = setting(1e-4, "peak learning rate")
    warmup_steps: float = setting(0.05, "steps of linear warm-up; a value below 1 is a share of all steps")
    weight_decay: float = setting(0.0, "weight decay")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm")
    logging_steps: float = setting(20, "number of steps between two log lines")
    logging_nan_inf_filter: bool = setting(
        False, "leave losses that are not finite out of the log; waits for the GPU at every step"
    )
    eval_strategy: str = setting("epoch", "when to validate: epoch, steps or no")
    save_strategy: str = setting("epoch", "when to save a checkpoint: epoch, steps or no")
    save_total_limit: int | None = setting(2, "checkpoints to keep, at least 2: the newest and the best one")
    load_best_model_at_end: bool = setting(True, "load the best checkpoint at the end of training")
    metric_for_best_model: str | None = setting("eval_loss", "validation metric that determines the best checkpoint")
    greater_is_better: bool | None = setting(
        None, "whether a larger value of that metric is better; by default it is for explained variance and eval_labels"
    )
    eval_labels: str | None = setting(
        None,
        "obs column with cell types, e.g. cell_type: every validation scores the embedding of up to 3,000 labelled "
        "cells (kNN macro-F1, NMI, silhouette, iLISI), beside PCA; needs the extra 'metrics'",
    )
    fit_baselines: Literal["none", "pca", "all"] = setting(
        "all",
        "simple methods to fit to the training cells at the end, for evaluate --run: 'pca' takes seconds, 'all' adds a "
        "small network, up to a minute",
    )
    remove_unused_columns: bool = setting(False, "has no effect: batches hold only what the model reads")
    ignore_data_skip: bool = setting(True, "has no effect: the data stream resumes at its position")
    ddp_find_unused_parameters: bool | None = setting(False, "not needed: every parameter gets a gradient at each step")
    precision: Literal["auto", "no", "fp16", "bf16", "bf16_if_fast"] = setting(
        "auto",
        "mixed precision; 'auto': bf16 if the GPU supports it; 'bf16_if_fast': also on a CPU with instructions for it",
    )
    ddp_timeout: int = setting(
        86_400, "seconds that processes wait for each other; the first one selects cells and genes for all"
    )
    cpu_threads: int = setting(
        0, "threads of a process that trains on the CPU; 0: OMP_NUM_THREADS if set, else all cores divided by processes"
    )
    lr_decay_per_epoch: float | None = setting(
        None, "multiply the learning rate by this after each epoch instead of using lr_scheduler_type (scGPT: 0.9)"
    )
    gene_vectors: Literal["random", "data"] = setting(
        "random",
        "initial vectors of the genes; 'data': from the correlations between genes over a sample of training cells",
    )
    shortcut_steps: int = setting(
        0,
        "first train the shortcut and the count decoder alone for this many steps of 128 cells, also before a short "
        "run (max_steps); a thousand take one to three minutes on a CPU; needs cls_shortcut and the objective 'counts'",
    )
    gen_after_steps: int = setting(
        1000, "with the objective 'gen': its second pass starts after this many steps of the run (scGPT: 1,000)"
    )
    max_bad_steps: int = setting(
        5, "stop after this many steps in a row whose loss or gradient is not finite; such steps are skipped"
    )
    ema_decay: float | None = setting(
        None, "validate and save a moving average of the weights with this decay, e.g. 0.999; by default none"
    )
    save_in_background: bool = setting(
        False,
        "write checkpoints while training goes on: needs host memory for a copy of weights and optimizer state on the "
        "first process; not for sharded models, and not with push_to_hub",
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "'latest': continue from the newest valid checkpoint of output_dir; 'auto': the same, or start if there is "
        "none, for jobs that are started again with one command; or the folder of a checkpoint; by default a new run",
    )
    dry_run: bool = setting(False, "report cells, size, time and memory of the run, and write nothing")

    def __post_init__(self) -> None:
        """Choose the precision that the device supports, and check the values."""
        # The library knows optimizers by name, and Muon is not among them. Its default stands in while it checks.
        uses_muon = self.optim == MUON
        if uses_muon:
            self.optim = TrainingArguments.default_optim
        if self.precision == "auto":
            if not (self.bf16 or self.fp16 or self.use_cpu):
                self.bf16 = gpu_has_bfloat16()
        elif self.precision == "bf16_if_fast":
            self.bf16, self.fp16 = has_bfloat16(use_cpu=self.use_cpu), False
        else:
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise the library refuses bfloat16 without a GPU
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") in _HIGHER_IS_BETTER
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ImportError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the training settings do not fit together: {error}") from error
        if uses_muon:
            self.optim = MUON
        # The library reads the launcher's choice; the settings take precedence.
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        if self.n_gpu > 1:
            raise ValueError(f"one process sees {self.n_gpu} GPUs; start one process per GPU with accelerate launch")
        _validate_training(self)

    @property
    def global_batch_size(self) -> int:
        """Cells of one step, over all processes and micro-batches."""
        return int(self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size)


@dataclass
class Settings:
    """All settings of a pretraining run.

    Attributes:
        data: cells, genes and tokens.
        model: size and objectives.
        training: optimizer, schedule, hardware, run folder.
        requested: section → setting → value as the user gave it, before anything was derived from it. This is the
            content of settings.yaml.
    """

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    requested: dict[str, dict[str, Any]]


def _validate_training(args: TrainingArguments) -> None:
    """Reject settings that the library would report only during the run, or never.

    Raises:
        ValueError: names the setting, the value and what to do.
    """
    _require_in_range(args, _TRAINING_RANGES)
    if args.save_strategy == SaveStrategy.STEPS and not args.save_steps:
        raise ValueError("expected save_steps > 0, found 0; to save no checkpoints choose save_strategy 'no'")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is for classes, which pretraining does not predict; leave it out")
    known = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if absent := set(args.report_to or []) - set(known):
        raise ValueError(
            f"report_to names {sorted(absent)}, which is unknown or not installed; install it, or leave it out"
        )
    if args.torch_compile_mode not in (None, *_COMPILE_MODES):
        raise ValueError(
            f"torch_compile_mode is {args.torch_compile_mode!r}; choose one of {', '.join(_COMPILE_MODES)}"
        )
    if args.optim == MUON and args.optim_args:
        raise ValueError(f"optim_args {args.optim_args!r} has no effect with --optim {MUON}; leave it out")
    _require_scheduler(args)
    if args.average_tokens_across_devices is False:
        raise ValueError(
            "average_tokens_across_devices=False is not supported: cells would weigh differently on each process"
        )
    if args.hub_strategy in {"checkpoint", "all_checkpoints"}:
        strategy = HubStrategy(args.hub_strategy).value
        raise ValueError(f"hub_strategy {strategy!r} would publish optimizer states; choose 'every_save' or 'end'")


def _require_scheduler(args: TrainingArguments) -> None:
    """Raise unless the learning rate schedule has all its arguments; the library finds out after the data are read."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = args.lr_scheduler_kwargs
    try:
        arguments = scheduler_arguments(args, 100)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=arguments)
    except (TypeError, ValueError, KeyError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        raise ValueError(
            f"lr_scheduler_type {name!r} does not fit lr_scheduler_kwargs {arguments}: {error}; pass all that "
            "it needs, e.g. --lr_scheduler_kwargs '{\"min_lr\": 1e-5}'"
        ) from error


def _require_in_range(settings: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise unless each number is in its range. A setting that is None is not checked."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value < high:
            below = "" if high == math.inf else f" and < {high:,}"
            raise ValueError(f"expected {name} finite, >= {low:,}{below}, found {value}")
