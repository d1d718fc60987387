"""What a user can set when a pretrained model is fine-tuned: on labelled cells, or on several experimental batches."""

from dataclasses import dataclass, field
from typing import Any, Literal

from scgpt_hf.training.settings import TrainingSettings, setting


def required(help: str) -> Any:
    """Return a dataclass field without a default."""
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class FinetuneSettings:
    """What both tasks have in common."""

    model: str = required("folder of a pretrained model, or its repository on the Hub")
    out: str = required("the run folder: best_model, settings, split, metrics, summary; a new one for every run")
    layer: str | None = setting(None, "layer with the raw counts; X of an .h5ad and raw of a SOMA when not given")
    batch_size: int = setting(32, "cells per step and device")
    seed: int = setting(42, "settles the split, the new weights, the order of the cells, ties and dropout")
    use_cpu: bool = setting(False, "stay on the CPU even where there is a GPU")
    disable_tqdm: bool = setting(False, "show no progress bar")


@dataclass(kw_only=True)
class AnnotateSettings(FinetuneSettings):
    """A class head on labelled cells."""

    labels_key: str = required("obs column with the labels to learn, e.g. cell_type")
    ignore_labels: list[str] = setting(["unknown"], "values that are no label; missing values never are")
    min_cells: int = setting(2, "labels of fewer cells are left out, with a count in the summary")
    train: Literal["head", "lora", "full"] = setting(
        "full", "head: the encoder stays as it is; lora: low-rank changes, merged in the end; full: every weight"
    )
    donor_key: str | None = setting(
        None, "obs column whose values are held out whole; donor_id when not given, or cells if there is one donor only"
    )
    validation_fraction: float = setting(0.2, "share of the labelled cells held out, to stop early and to calibrate")
    label_fraction: float = setting(1.0, "share of the training cells of each label whose labels are used")
    class_weights: Literal["balanced", "none"] = setting(
        "balanced", "balanced: every label weighs the same, n / (labels * n_label) per cell; none: every cell does"
    )
    learning_rate: float | None = setting(None, "highest learning rate; 1e-3 for head and lora, 1e-4 for full")
    epochs: int = setting(20, "most epochs")
    patience: int = setting(5, "stop when macro-F1 on held-out cells has not risen for so many epochs")
    lora_rank: int = setting(8, "rank of the changes with --train lora")

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
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
    """Several experimental batches brought together: GEP, GEPC, ECS, DAR and a batch norm for each domain (DSBN).

    Source: the defaults are those of bowang-lab/scGPT:examples/finetune_integration.py, but for zeros: there genes that
    are not expressed are tokens too, with heads that predict whether a gene is.
    """

    batch_key: str = required("obs column of the experimental batch, e.g. assay, dataset_id or donor_id")
    validation_fraction: float = setting(0.1, "share of the cells of each domain held out, to choose the best epoch")
    batch_size: int = setting(64, "cells per step and device; ECS compares the cells of a step")
    learning_rate: float = setting(1e-4, "highest learning rate, a tenth less after each epoch; 1e-3 for few cells")
    epochs: int = setting(30, "epochs")
    mask_ratio: float = setting(0.4, "share of the genes hidden")
    gep_weight: float = setting(1.0, "weight of expression predicted from the other genes (GEP)")
    gepc_weight: float = setting(1.0, "weight of expression predicted from the cell alone (GEPC)")
    ecs_weight: float = setting(10.0, "weight of elastic cell similarity (ECS)")
    ecs_threshold: float = setting(0.8, "similarity at which elastic cell similarity turns")
    dar_weight: float = setting(1.0, "weight of the adversarial guess of the domain (DAR)")
    input_norm: Literal["none", "domain"] = setting(
        "domain", "domain: a batch norm of the embeddings each domain (DSBN)"
    )
    domain_embedding: bool = setting(True, "tell the expression heads the domain, so that cells need not carry it")

    def __post_init__(self) -> None:
        """Check what can be checked without the data."""
        for name in ("validation_fraction", "mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"expected {name} between 0 and 1, found {getattr(self, name)}")


def training_settings(settings: FinetuneSettings, **training: Any) -> TrainingSettings:
    """Return the library's arguments for a fine-tuning run; checkpoints go to a folder that is removed in the end."""
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
