"""The settings of `finetune_perturbation`."""

from dataclasses import dataclass
from typing import Literal

from scgpt_hf.perturbation.cells import ScreenColumns
from scgpt_hf.perturbation.splits import SplitKind
from scgpt_hf.training.finetuning.settings import FinetuneSettings
from scgpt_hf.training.settings import setting


@dataclass(kw_only=True)
class PerturbationSettings(FinetuneSettings):
    """The settings of `finetune_perturbation`.

    Source: values, pairing and optimizer follow bowang-lab/scGPT:tutorials/Tutorial_Perturbation.ipynb; the target
        `pseudobulk`, `hide_names`, `made_up_doubles` and the learning rates come from our own measurements
        (`benchmarks/perturbation.py`).
    """

    model: str = setting("", "folder of a pretrained model, or its repository on the Hub; by default a new model")
    add_genes: bool = setting(
        False,
        "add the genes of the screen that the pretrained model lacks, measured and perturbed ones, to its vocabulary; "
        "without it, a perturbed gene that the model lacks is an error, and a measured one is left out",
    )
    condition_key: str = setting(
        "condition", "obs column with the conditions, as in GEARS: KLF1+ctrl, KLF1+MAP2K6, ctrl"
    )
    control: str = setting("ctrl", "name of the control in it")
    batch_key: str | None = setting(
        None,
        "obs column of the experimental batch, e.g. replicate; cells are compared with controls of their own batch",
    )
    context_key: str | None = setting(
        None, "obs column of what effects may differ between, e.g. the cell line; effects are predicted for each"
    )
    total_key: str | None = setting(
        None, "obs column with the total counts of a cell; needed for panels of genes, whose own sum varies"
    )
    target_sum: float | None = setting(
        None, "counts per cell after normalizing; by default 10,000 with total_key, else the median sum of the cells"
    )
    split: SplitKind = setting(
        "simulation",
        "which conditions to hold out for the evaluation; simulation: GEARS's, singles and doubles with unseen genes "
        "and doubles of seen ones; unseen_single, combo_seen0, combo_seen1, combo_seen2: only these; leave_out: those "
        "of --held_out; none: train on everything",
    )
    held_out: list[str] = setting([], "genes or conditions to hold out with --split leave_out")
    test_fraction: float = setting(0.25, "share of the genes or conditions to hold out")
    control_fraction: float = setting(
        0.5, "share of the control cells that the model sees; the truth is computed with the others"
    )
    validation_fraction: float = setting(
        0.1, "share of the training conditions that choose the best checkpoint; 0 trains on all and keeps the last one"
    )
    target: Literal["pseudobulk", "cell"] = setting(
        "pseudobulk",
        "what a control cell is turned into; pseudobulk: itself plus the mean difference that the perturbation makes; "
        "cell: the perturbed cell that it is paired with, as in scGPT",
    )
    epochs: int = setting(100, "number of epochs; in each, every condition is seen cells_per_condition times")
    cells_per_condition: int = setting(8, "cells of each condition in an epoch")
    max_tokens: int = setting(128, "genes per cell while training, sampled anew each time; prediction uses all genes")
    learning_rate: float | None = setting(
        None, "peak learning rate; by default 1e-2 for a new model, 1e-3 for a pretrained one"
    )
    weight_decay: float = setting(0.3, "weight decay of linear layers")
    hide_names: float = setting(
        0.2,
        "how often the name of a perturbed gene is hidden, so that the model learns what unknown genes do on average",
    )
    made_up_doubles: float = setting(
        0.2,
        "how often two singles are joined to a double with the sum of their effects; only if the screen has doubles",
    )
    perturbation_sum: bool = setting(
        True, "add the vectors of the perturbed genes to every token; off: attention alone, as in scGPT"
    )
    hidden_size: int = setting(32, "width of a new model")
    num_hidden_layers: int = setting(1, "layers of a new model")
    num_attention_heads: int = setting(2, "heads of a new model")
    intermediate_size: int = setting(64, "width of the feed-forward layer of a new model")
    dropout: float = setting(0.0, "dropout rate of a new model")
    batch_size: int = setting(16, "cells per step and device")

    def __post_init__(self) -> None:
        """Check the values that can be checked without the data."""
        for name in ("hide_names", "made_up_doubles", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} from 0 to below 1, found {getattr(self, name)}")
        for name in ("control_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, found {getattr(self, name)}")
        for name in ("epochs", "cells_per_condition", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if self.model else 1e-2

    @property
    def columns(self) -> ScreenColumns:
        """Return the obs columns of the screen."""
        return ScreenColumns(
            condition_key=self.condition_key,
            control=self.control,
            batch_key=self.batch_key,
            context_key=self.context_key,
            total_key=self.total_key,
        )
