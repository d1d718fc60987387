"""What a user can set, each field with its one owner: data, model, training.

The command line and a YAML file are the same three dataclasses; a YAML has the sections `data:`, `model:` and
`training:`, and flags win over it. What the fields mean is said where they are used; here are names and defaults.
"""

import dataclasses
import difflib
import json
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from scgpt_hf.training.settings_validation import validate_data_settings, validate_training_settings


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with its `--help`; mutable defaults are copied for each instance."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class DataSettings:
    """Which cells and genes, and how they become tokens. The defaults make the demo."""

    data: list[str] = setting(
        ["demo"],
        "'demo' (700 blood cells that come with scanpy), census://VERSION/ORGANISM, a local SOMA, .h5ad files, a "
        "cache, or one on the Hub, hf://datasets/OWNER/NAME",
    )
    obs_filter: str | None = setting(None, "SOMA value filter on obs, e.g. \"tissue_general == 'blood'\"")
    primary_only: bool = setting(True, "keep only cells with is_primary_data == True, so that none is seen twice")
    layer: str | None = setting(None, "layer with the raw counts; X of an .h5ad and raw of a SOMA when not given")
    max_cells: int | None = setting(None, "draw whole donors at random up to this many cells; all when not given")
    donor_key: str = setting("donor_id", "obs column that is never divided between training and validation")
    validation_fraction: float = setting(0.2, "share of the cells, in whole donors, held out for validation")
    min_genes: int = setting(10, "drop cells that express fewer genes than this")
    min_gene_counts: int = setting(3, "drop genes with fewer counts than this over all training cells")
    gene_selection: Literal["hvg", "all"] = setting(
        "all", "'hvg': the n_hvg most variable genes; 'all': every gene kept, each cell's sampled down to max_tokens"
    )
    n_hvg: int = setting(1200, "number of highly variable genes (seurat_v3), from training cells")
    hvg_batch_key: str | None = setting(
        "donor_id", "obs column whose groups each rank the genes (the batch key of seurat_v3)"
    )
    target_sum: float = setting(
        1e4, "counts per cell after normalising; quantile bins do not depend on it, input_style log1p does"
    )
    input_style: Literal["binned", "log1p"] = setting(
        "binned", "values the model reads: bins, or log1p of normalised counts"
    )
    n_bins: int = setting(51, "quantile bins per cell, the zero bin included")
    max_tokens: int = setting(1201, "most tokens of one cell, <cls> included")
    ties: Literal["random", "midpoint", "upper"] = setting("random", "bin of a count that spans several quantile edges")
    cls_value: float = setting(0.0, "value at <cls>; scGPT's published checkpoints expect -2")
    pad_value: float = setting(-2.0, "value at padding")
    mask_value: float = setting(-1.0, "value where the model has to predict")
    mask_ratios: list[float] = setting(
        [0.25, 0.5, 0.75], "shares of the genes to hide; one is drawn per cell and epoch"
    )
    batch_key: str | None = setting(None, "obs column of the experimental batch, for the heads that need one")
    cache_dir: str | None = setting(
        None,
        "write the cells to this folder during the first epoch and read them from there, shuffled over all of them, in "
        "later ones; about 5 kB a cell, twice that while it is made; a cache that is there is used from the start",
    )
    chunks_per_window: int = setting(32, "chunks of 2,048 neighbouring cells that are shuffled together")

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        validate_data_settings(self)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"expected validation_fraction between 0 and 1, found {self.validation_fraction}")
        if not self.mask_ratios or not all(0 < ratio < 1 for ratio in self.mask_ratios):
            raise ValueError(f"expected mask_ratios between 0 and 1, found {self.mask_ratios}")


@dataclass
class ModelSettings:
    """The model's shape and objectives: fields of `ScGPTConfig` by the same names. The defaults make the demo."""

    hidden_size: int = setting(64, "width of the encoder")
    num_hidden_layers: int = setting(2, "encoder layers")
    num_attention_heads: int = setting(4, "attention heads")
    intermediate_size: int = setting(128, "width of the stream_config-forward")
    dropout: float = setting(0.1, "dropout of embeddings, residuals and stream_config-forward")
    attention_dropout: float = setting(
        0.0, "dropout of attention probabilities; above 0 the GPU's fast kernel is not used"
    )
    norm_scheme: Literal["post", "pre", "scgpt_pre"] = setting(
        "post", "where LayerNorm sits; scgpt_pre is the original's odd one"
    )
    value_encoder: Literal["continuous", "category", "scaling"] = setting("continuous", "how values are embedded")
    cell_pooling: Literal["cls", "average", "weighted"] = setting("cls", "how a cell's embedding is made of its tokens")
    gepc_query: Literal["inner_product", "concat", "sum"] = setting("inner_product", "query style of the GEPC head")
    gepc_detach: bool = setting(False, "keep the GEPC head's gradient from the gene embeddings")
    explicit_zero_prob: bool = setting(False, "predict the probability of expression too")
    domain_embedding: bool = setting(False, "tell the expression heads the experimental batch")
    domain_head: bool = setting(False, "adversarial head that guesses the experimental batch (DAR)")
    input_norm: Literal["none", "batch", "domain"] = setting("none", "batch norm of the embeddings; 'domain' is DSBN")
    ecs_threshold: float = setting(0.3, "similarity at which elastic cell similarity turns")
    cce_temperature: float = setting(0.5, "temperature of the contrast between two dropout passes (CCE)")
    loss_weights: dict[str, float] | str | None = setting(
        None,
        "weights of the objectives; gep and gepc 1, with those that other options bring, when not given; "
        'JSON on the command line, e.g. \'{"gep": 1, "gepc": 1, "ecs": 10}\'',
    )

    def __post_init__(self) -> None:
        """Read the weights when they come from the command line."""
        if isinstance(self.loss_weights, str):
            try:
                self.loss_weights = json.loads(self.loss_weights)
            except json.JSONDecodeError as error:
                raise ValueError(f"expected loss_weights as JSON, found {self.loss_weights!r}: {error}") from error
        if not isinstance(self.loss_weights, dict | None):
            raise ValueError(f"expected loss_weights as names with numbers, found {self.loss_weights!r}")
        if "cls" in (self.loss_weights or {}):
            raise ValueError("the objective 'cls' needs labelled cells, which pretraining does not read")


@dataclass
class TrainingSettings(TrainingArguments):
    """transformers' TrainingArguments, with defaults for pretraining on cells and fields of our own."""

    output_dir: str = setting("runs/demo", "the run folder; a new one for every run")
    per_device_train_batch_size: int = setting(32, "cells per step and device")
    per_device_eval_batch_size: int = setting(64, "cells per validation step and device")
    num_train_epochs: float = setting(20, "epochs")
    learning_rate: float = setting(2e-3, "highest learning rate")
    warmup_steps: float = setting(0.05, "steps of linear warm-up, or below 1 their share of all steps")
    weight_decay: float = setting(0.0, "weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    logging_steps: float = setting(20, "steps between two lines of the log")
    logging_nan_inf_filter: bool = setting(
        False, "hide losses that are not finite (costs a wait for the GPU every step)"
    )
    eval_strategy: str = setting("epoch", "when to validate: epoch, steps or no")
    save_strategy: str = setting("epoch", "when to save a checkpoint: epoch or steps")
    save_total_limit: int | None = setting(2, "checkpoints kept, 2 or more; the newest and the best always are")
    load_best_model_at_end: bool = setting(True, "keep the best model by validation loss")
    metric_for_best_model: str | None = setting("eval_loss", "what 'best' means")
    greater_is_better: bool | None = setting(False, "whether more of it is better")
    remove_unused_columns: bool = setting(False, "not used: the stream gives what the model takes")
    ignore_data_skip: bool = setting(True, "not used: the stream starts where it stopped")
    ddp_find_unused_parameters: bool | None = setting(False, "every parameter has a gradient in every step")
    precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", "mixed precision; auto: bf16 where the GPU has it"
    )
    ddp_timeout: int = setting(86_400, "seconds the processes wait for the first one, which chooses cells and genes")
    cpu_threads: int = setting(
        0, "threads of a process that trains on the CPU; 0: OMP_NUM_THREADS, or all cores, shared by the processes"
    )
    lr_decay_per_epoch: float | None = setting(
        None, "multiply the learning rate by this after each epoch, instead of lr_scheduler_type (the seed recipe: 0.9)"
    )
    max_bad_steps: int = setting(
        5, "steps whose loss or gradient is not finite are skipped; so many in a row end the run"
    )
    dry_run: bool = setting(False, "print what would be trained, how long and how large, and write nothing")

    def __post_init__(self) -> None:
        """Choose the precision by what the machine has."""
        if self.precision == "auto":
            if not (self.bf16 or self.fp16 or self.use_cpu):
                self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        else:
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except (ImportError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the settings of the training do not fit together: {error}") from error
        self.mixed_precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"  # not the launcher's
        if self.n_gpu > 1:
            raise ValueError(f"one process sees {self.n_gpu} GPUs; start one process a GPU with accelerate launch")
        validate_training_settings(self)


@dataclass
class Settings:
    """All settings of a run, and by section what was asked for: what settings.yaml keeps."""

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    asked: dict[str, dict[str, Any]]


_SECRETS = {"hub_token", "push_to_hub_token"}
SECTIONS: dict[str, type] = {"data": DataSettings, "model": ModelSettings, "training": TrainingSettings}


def parse_settings(arguments: list[str], description: str) -> Settings:
    """Return the settings of a command line: at most one YAML file first, then flags, which win over it.

    Args:
        arguments: without the program's name.
        description: of the program, for `--help`.

    Raises:
        ValueError: an unknown or misplaced key, with the nearest known one; YAML that is not three sections.
        SystemExit: `--help`, or a flag that argparse refuses.
    """
    parser = HfArgumentParser(
        list(SECTIONS.values()),  # type: ignore[arg-type]
        description=description,
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.usage = "%(prog)s [SETTINGS.yaml] [--flag VALUE …]"
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        saved = read_yaml(Path(arguments[0]))
        parser.set_defaults(**{key: None for key, value in saved.items() if value is None})
        arguments = [*_as_flags(saved), *arguments[1:]]
    *sections, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}{_nearest(unknown[0].lstrip('-'), _all_fields())}")
    given = vars(parser.parse_known_args(arguments)[0])
    data, model, training = sections
    settings = Settings(data, model, training, _asked(parser, given))
    if settings.data.batch_key is None and (settings.model.domain_embedding or settings.model.domain_head):
        raise ValueError("domain_embedding and domain_head need --batch_key, the obs column of the experimental batch")
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings of a YAML file as one flat dictionary.

    Raises:
        ValueError: no such file, an alias, no mapping of sections, an unknown section or key.
    """
    if not path.is_file():
        raise ValueError(f"no settings file {path}; configs/ holds examples")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # may hold itself, or grow without end
            raise ValueError("it has an alias (*name); write the value itself")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"expected {path} to hold the sections {', '.join(SECTIONS)}, each with its settings")
    flat: dict[str, Any] = {}
    for name, section in content.items():
        if name not in SECTIONS:
            raise ValueError(f"unknown section {name!r} in {path}{_nearest(name, SECTIONS)}")
        known = [f.name for f in dataclasses.fields(SECTIONS[name]) if f.init]
        for key, value in section.items():
            if key not in known:
                raise ValueError(f"unknown setting {key!r} in section {name!r} of {path}{_nearest(key, known)}")
            flat[key] = value
    return flat


def settings_yaml(settings: Settings) -> str:
    """Return the settings as YAML: `pretrain.py` reads it back as the same run. Credentials are left out."""
    return str(yaml.safe_dump(settings.asked, sort_keys=False, allow_unicode=True, width=120))


def _asked(parser: HfArgumentParser, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by section what was asked for before anything was derived: our fields, the library's if not default."""
    return {
        name: {
            f.name: _plain(given[f.name])
            for f in dataclasses.fields(section)
            if f.name in section.__annotations__ or given.get(f.name) != parser.get_default(f.name)
            if f.name in given and f.name not in _SECRETS
        }
        for name, section in SECTIONS.items()
    }


def _plain(value: Any) -> Any:
    """Return what YAML can hold: the library reads some words as its own enumerations."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """Return the settings as a command line, so that one parser checks both."""
    flags: list[str] = []
    for key, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _all_fields() -> list[str]:
    return [f.name for section in SECTIONS.values() for f in dataclasses.fields(section) if f.init]


def _nearest(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)[:20])} …"
