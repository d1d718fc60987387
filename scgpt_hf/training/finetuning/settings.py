"""The settings of fine-tuning, on labelled cells or on several experimental batches."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scgpt_hf.training.settings import TrainingSettings, setting


def required(help: str) -> Any:
    """Return a dataclass field without a default."""
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class FinetuneSettings:
    """The settings that both tasks share."""

    model: str = required("folder of a pretrained model, or its repository on the Hub")
    out: str = required("run folder: best_model, settings, split, metrics, summary; every new run needs a new one")
    layer: str | None = setting(
        None, "layer with the raw counts; by default 'raw' of a SOMA, and of a file the one that has them"
    )
    round_counts: bool = setting(False, "round fractional counts of files instead of stopping")
    batch_size: int = setting(32, "cells per step and device")
    seed: int = setting(42, "random seed of the split, the new weights, the order of the cells, ties and dropout")
    use_cpu: bool = setting(False, "train on the CPU even if there is a GPU")
    disable_tqdm: bool = setting(False, "show no progress bar")


@dataclass(kw_only=True)
class AnnotateSettings(FinetuneSettings):
    """The settings of `finetune_classifier`: a class head on labelled cells."""

    labels_key: str = required("obs column with the labels to learn, e.g. cell_type")
    ignore_labels: list[str] = setting(["unknown"], "values that are not labels; missing values and unknown never are")
    min_cells: int = setting(2, "leave out labels with fewer cells; the summary counts them")
    train: Literal["probe", "lora", "full"] = setting(
        "probe",
        "what to train; probe: a logistic regression on the frozen cell embedding, which takes seconds; lora: also "
        "low-rank updates of the encoder, merged at the end; full: all weights; the result of lora or full is kept "
        "only if it has a higher macro-F1 than the probe on the held-out cells",
    )
    refit: bool = setting(
        True, "fit the probe that is saved to the training and the held-out cells, after the held-out cells were scored"
    )
    leave_out_contradicted: bool = setting(
        True,
        "leave out of the probe the cells whose label at most two of their 15 nearest cells have, as doublets do; none "
        "if these are more than 2 %% of the cells, because the types then overlap; the summary counts them",
    )
    gene_baseline: bool = setting(
        True, "also score logistic regression on variable genes, if there are at most 50,000 training cells"
    )
    donor_key: str | None = setting(
        None,
        "obs column of the donor; whole donors are held out; by default donor_id, or single cells if there is only one "
        "donor",
    )
    validation_fraction: float = setting(0.2, "share of the labelled cells to hold out and score")
    label_fraction: float = setting(1.0, "share of the cells of each label to train on")
    class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: all labels have the same weight, n / (labels * n_label) per cell; none: all cells have"
    )
    learning_rate: float | None = setting(
        None, "peak learning rate of lora and full; by default 1e-3 for lora, 1e-4 for full"
    )
    epochs: int = setting(20, "maximum number of epochs of lora and full")
    patience: int = setting(5, "stop after this number of epochs without a higher macro-F1 on the held-out cells")
    lora_rank: int = setting(8, "rank of the updates with --train lora")

    def __post_init__(self) -> None:
        """Check the values that can be checked without the data."""
        for name in ("validation_fraction", "label_fraction"):
            share = getattr(self, name)
            if not 0 < share <= 1 or (share == 1 and name == "validation_fraction"):
                raise ValueError(f"expected {name} between 0 and 1, found {share}")
        if self.min_cells < 2:
            raise ValueError(f"expected min_cells of at least 2, found {self.min_cells}: one cell cannot be held out")
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.train == "full" else 1e-3


@dataclass(kw_only=True)
class IntegrateSettings(FinetuneSettings):
    """The settings of `finetune_integration`: GEP, GEPC, ECS, DAR and a batch norm for each batch (DSBN).

    Source: defaults of bowang-lab/scGPT:examples/finetune_integration.py, except that genes that are not expressed are
    no tokens here. There they are, with heads that predict whether a gene is expressed.
    """

    batch_key: str = required("obs column of the experimental batch, e.g. assay, dataset_id or donor_id")
    validation_fraction: float = setting(0.1, "share of the cells of each batch held out to choose the best epoch")
    batch_size: int = setting(64, "cells per step and device; ECS compares the cells of a step")
    learning_rate: float = setting(1e-4, "peak learning rate, times 0.9 after each epoch; try 1e-3 for few cells")
    epochs: int = setting(30, "number of epochs")
    mask_ratio: float = setting(0.4, "share of a cell's genes to mask")
    gep_weight: float = setting(1.0, "weight of gene expression prediction from the other genes (GEP)")
    gepc_weight: float = setting(1.0, "weight of gene expression prediction from the cell embedding (GEPC)")
    ecs_weight: float = setting(10.0, "weight of elastic cell similarity (ECS)")
    ecs_threshold: float = setting(0.8, "cells above this similarity are pulled together, others pushed apart (ECS)")
    dar_weight: float = setting(1.0, "weight of the adversarial prediction of the batch (DAR)")
    input_norm: Literal["none", "domain"] = setting(
        "domain", "batch norm of the token embeddings; domain: one for each batch (DSBN)"
    )
    domain_embedding: bool = setting(
        True, "pass the batch to the expression heads; the cell embedding need not contain it then"
    )

    def __post_init__(self) -> None:
        """Check the values that can be checked without the data."""
        for name in ("validation_fraction", "mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, found {getattr(self, name)}")


def training_settings(settings: FinetuneSettings, **training: Any) -> TrainingSettings:
    """Return the trainer's arguments for a fine-tuning run.

    Checkpoints go to a subfolder of the run folder, which is removed at the end.

    Args:
        settings: fine-tuning settings.
        training: arguments that differ from those of a fine-tuning run.
    """
    return TrainingSettings(
        **{
            "output_dir": f"{settings.out}/checkpoints",
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": 2 * settings.batch_size,
            "seed": settings.seed,
            "use_cpu": settings.use_cpu,
            "disable_tqdm": settings.disable_tqdm,
            "save_only_model": True,
            "save_total_limit": 1,
            "report_to": "none",
            **training,
        }
    )
