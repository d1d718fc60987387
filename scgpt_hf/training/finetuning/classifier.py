"""The Trainer of transformers for a class head: our stream in, weighted cross entropy, scores on held-out cells."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import Trainer

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pipeline.stream import Batch

Logits = npt.NDArray[np.float32]


class ClassifierTrainer(Trainer):
    """Trains the class head, and what else of the model has gradients, on a stream of labelled cells."""

    def __init__(
        self,
        *,
        train_stream: Callable[[int], Iterable[Batch]],
        epoch_ends: Sequence[int],
        validation_stream: Callable[[], Iterable[Batch]],
        class_weights: Tensor,
        **trainer_arguments: Any,
    ) -> None:
        """Wire the data_module into the trainer.

        Args:
            train_stream: batches of this rank from number n of the run on, with `labels`, int64 (cells,).
            epoch_ends: the number of batches read when each epoch ends.
            validation_stream: all held-out cells, on every rank, the same every time.
            class_weights: weight of a cell of each class in the loss, float32 (classes,).
            trainer_arguments: of `transformers.Trainer`; at least model and args.
        """
        loss = partial(weighted_cross_entropy, class_weights=class_weights)
        super().__init__(**trainer_arguments, compute_loss_func=loss, eval_dataset=[])
        self.validation_stream = validation_stream
        self.loader = StreamLoader(train_stream, epoch_ends)
        encoder = _encoder(self.model)
        self.frozen = None if any(weight.requires_grad for weight in encoder.parameters()) else encoder

    def get_train_dataloader(self) -> StreamLoader:  # type: ignore[override]
        """Return the loader."""
        return self.loader

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train as `transformers.Trainer.train`, and stop the reading threads whatever happens."""
        try:
            return super().train(*arguments, **keywords)
        finally:
            self.loader.close()

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the loss; an encoder that is not trained has no dropout and keeps the statistics of its norms."""
        if self.frozen is not None:
            self.frozen.eval()
        return super().compute_loss(*arguments, **keywords)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the held-out cells and return the metrics.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        scores = score(*self.held_out_logits())
        if not math.isfinite(scores["loss"]):
            raise FloatingPointError(f"the loss on held-out cells is {scores['loss']}; lower --learning_rate")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.inference_mode()
    def held_out_logits(self, model: torch.nn.Module | None = None) -> tuple[Logits, Int64Array]:
        """Return logits, (cells, classes), and classes, (cells,), of the held-out cells.

        Args:
            model: what to run; by default the one that is trained.
        """
        model = self.accelerator.unwrap_model(self.model) if model is None else model
        training = model.training
        model.eval()
        logits, classes = [], []
        for batch in prefetch(self.validation_stream()):
            classes.append(batch.pop("labels"))
            with self.accelerator.autocast():
                logits.append(model(**self._prepare_inputs(batch)).logits.float())
        model.train(training)
        return torch.cat(logits).cpu().numpy(), torch.cat(classes).numpy()  # type: ignore[arg-type]


def weighted_cross_entropy(
    outputs: Any, classes: Tensor, num_items_in_batch: Tensor | int | None = None, *, class_weights: Tensor
) -> Tensor:
    """Return the cross entropy of each cell times the weight of its class, summed, over the number of cells.

    Divided by cells, not by their weights, so that parts of a batch add up; the weights' mean over cells is 1.

    Args:
        outputs: with `logits`, (cells, classes).
        classes: int64 (cells,).
        num_items_in_batch: cells of the whole batch, of which this is a part.
        class_weights: float32 (classes,).
    """
    nll = F.cross_entropy(outputs.logits.float(), classes, class_weights.to(classes.device), reduction="sum")
    return nll / (len(classes) if num_items_in_batch is None else num_items_in_batch)


def score(logits: Logits, classes: Int64Array) -> dict[str, float]:
    """Return cross entropy, accuracy and macro-F1 (over the classes that occur or are predicted)."""
    predicted = logits.argmax(axis=1)
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(classes))
    return {"loss": float(loss), **agreement(classes, predicted)}


def agreement(classes: Int64Array, predicted: Int64Array) -> dict[str, float]:
    """Return accuracy and macro-F1 of predicted classes, both (cells,); scikit-learn's definitions."""
    macro = f1_score(classes, predicted, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(classes, predicted)), "macro_f1": float(macro)}


def _encoder(model: Any) -> torch.nn.Module:
    return model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model  # type: ignore[no-any-return]
