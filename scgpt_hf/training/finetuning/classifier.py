"""Train a class head on a stream of labelled cells, and score it on held-out cells."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.training.library_trainer import LibraryTrainer

Logits = npt.NDArray[np.float32]


class ClassifierTrainer(LibraryTrainer):
    """Trains the class head, and all other weights of the model that require gradients, on labelled cells."""

    def __init__(
        self,
        *,
        train_stream: Callable[[int], Iterable[Batch]],
        epoch_ends: Sequence[int],
        validation_stream: Callable[[], Iterable[Batch]],
        class_weights: Tensor,
        **trainer_arguments: Any,
    ) -> None:
        """Create the trainer.

        Args:
            train_stream: returns the batches of this process from batch number n of the run on, with `labels`, int64
                (cells,).
            epoch_ends: number of batches read when each epoch ends.
            validation_stream: returns all held-out cells, on every process, the same ones at each call.
            class_weights: weight of the cells of each class in the loss, float32 (classes,).
            trainer_arguments: arguments of `transformers.Trainer`; at least model and args.
        """
        loss = partial(weighted_cross_entropy, class_weights=class_weights)
        super().__init__(**trainer_arguments, compute_loss_func=loss)
        self.validation_stream = validation_stream
        self.loader = StreamLoader(train_stream, epoch_ends)

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Stop the reading threads at the end of `train`, also after an error."""
        with closing(self.loader):
            yield

    def validation_metrics(self) -> dict[str, float]:
        """Return the scores on the held-out cells; see `score`.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        scores = score(*self.held_out_logits())
        if not math.isfinite(scores["loss"]):
            raise FloatingPointError(f"the loss on held-out cells is {scores['loss']}; lower --learning_rate")
        return scores

    @torch.inference_mode()
    def held_out_logits(self) -> tuple[Logits, Int64Array]:
        """Return the logits of the held-out cells, (cells, classes), and their classes, (cells,)."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        logits, classes = [], []
        for batch in prefetch(self.validation_stream()):
            classes.append(batch.pop("labels"))
            with self.accelerator.autocast():
                logits.append(model(**self.to_model_inputs(batch)).logits.float())
        model.train(was_training)
        return torch.cat(logits).cpu().numpy(), torch.cat(classes).numpy()  # type: ignore[arg-type]


def weighted_cross_entropy(
    outputs: Any, classes: Tensor, num_items_in_batch: Tensor | int | None = None, *, class_weights: Tensor
) -> Tensor:
    """Return the sum over cells of cross entropy times class weight, divided by the number of cells.

    torch divides by the sum of the weights instead. Divided by the number of cells, the losses of the parts of a batch
    add up to the loss of the batch, as gradient accumulation needs. Weights should have a mean of 1 over the cells.

    Args:
        outputs: model outputs with `logits`, shape (cells, classes).
        classes: class of each cell, int64 (cells,).
        num_items_in_batch: number of cells of the full batch, of which this may be a part; None if it is not.
        class_weights: weight of each class, float32 (classes,).
    """
    nll = F.cross_entropy(outputs.logits.float(), classes, class_weights.to(classes.device), reduction="sum")
    return nll / (len(classes) if num_items_in_batch is None else num_items_in_batch)


def score(logits: Logits, classes: Int64Array) -> dict[str, float]:
    """Return cross entropy, accuracy and macro-F1 of logits, (cells, classes), given the true classes, (cells,)."""
    predicted = logits.argmax(axis=1)
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(classes))
    return {"loss": float(loss), **agreement(classes, predicted)}


def agreement(classes: Int64Array, predicted: Int64Array) -> dict[str, float]:
    """Return accuracy and macro-F1 of predicted classes.

    Args:
        classes: true class of each cell. Shape (cells,).
        predicted: predicted class of each cell. Shape (cells,).

    Source: scikit-learn's `accuracy_score` and `f1_score`; macro-F1 is the mean over classes that occur in either.
    """
    return {"accuracy": float(accuracy_score(classes, predicted)), "macro_f1": _macro_f1(classes, predicted)}


def macro_f1_gain(
    classes: Int64Array, before: Int64Array, after: Int64Array, seed: int, *, n_samples: int = 200
) -> tuple[float, float]:
    """Return how much macro-F1 rises from one prediction to another, and the standard error of the rise.

    Args:
        classes: true class of each cell. Shape (cells,).
        before: predicted class of each cell. Shape (cells,).
        after: the other prediction. Shape (cells,).
        seed: determines the samples.
        n_samples: number of bootstrap samples of the cells.

    Source: Efron 1979, Annals of Statistics 7:1, for the bootstrap.
    """
    rng = np.random.default_rng(seed)

    def gain(cells: Int64Array) -> float:
        return _macro_f1(classes[cells], after[cells]) - _macro_f1(classes[cells], before[cells])

    samples = [gain(rng.integers(0, len(classes), len(classes))) for _ in range(n_samples)]
    return gain(np.arange(len(classes))), float(np.std(samples))


def _macro_f1(classes: Int64Array, predicted: Int64Array) -> float:
    return float(f1_score(classes, predicted, average="macro", zero_division=0))
