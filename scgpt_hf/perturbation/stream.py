"""The training examples of a perturbation model, epoch by epoch.

In each epoch every (condition, context) is seen `cells_per_condition` times. An example is a perturbed cell with its
control. Which cells, pairs, genes, hidden names and made-up doubles an epoch has is a function of (seed, epoch, cell).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.perturbation.batches import Example, Values, keep_genes, make_batch, nameless_id
from scgpt_hf.perturbation.cells import Screen
from scgpt_hf.perturbation.conditions import Condition, parse_condition
from scgpt_hf.perturbation.gene_names import ScreenGenes
from scgpt_hf.perturbation.pairing import draw_cells, pair_controls
from scgpt_hf.perturbation.pseudobulk import delta_of
from scgpt_hf.perturbation.settings import PerturbationSettings
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.randomness_scgpt import HIDDEN_NAMES, MADE_UP, PAIRED_GENES, cell_keys, random_words, to_uniform

Item = tuple[str, str]  # condition and context


@dataclass(frozen=True, eq=False)
class TrainingCells:
    """The cells that a model is trained on.

    Attributes:
        screen: the screen.
        genes: how its genes relate to the vocabulary.
        items: training conditions in their contexts.
        controls: the control cells that the model may see.
        deltas: mean difference that each of them makes, by item. Shape (genes,) each.
        unknown_share: by context, the share of the mean delta that a condition of which nothing is known is expected
            to have; see `unknown_share_of`.
    """

    screen: Screen
    genes: ScreenGenes
    items: list[Item]
    controls: Int64Array
    deltas: dict[Item, Float64Array]
    unknown_share: dict[str, float]

    @classmethod
    def of(cls, screen: Screen, genes: ScreenGenes, conditions: list[str], controls: Int64Array) -> "TrainingCells":
        """Return the cells of some conditions, in all contexts that have them."""
        items = [item for item in screen.items if item[0] in set(conditions)]
        deltas = {item: delta_of(screen.values, screen.batches, screen.rows_of(item), controls) for item in items}
        shares = {
            context: unknown_share_of([deltas[item] for item in items if item[1] == context])
            for context in {item[1] for item in items}
        }
        return cls(screen, genes, items, controls, deltas, shares)


@dataclass(frozen=True, eq=False)
class ExampleStream:
    """Yields the batches of one process.

    Attributes:
        cells: the training cells.
        processor: holds the vocabulary.
        config: config of the model.
        settings: settings of the run.
        rank: number of this process.
        world_size: number of processes; each makes its part of every step.
    """

    cells: TrainingCells
    processor: ScGPTProcessor
    config: ScGPTConfig
    settings: PerturbationSettings
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps of an epoch; the last one is filled with the first cells of the epoch."""
        n_examples = len(self.cells.items) * self.settings.cells_per_condition
        return -(-n_examples // (self.settings.batch_size * self.world_size))

    def batches(self, first: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of this process from step `first` on, up to the end of the run."""
        for step in range(first, self.steps_per_epoch * self.settings.epochs):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == first:
                cells, items = self._plan(epoch)
            size = self.settings.batch_size
            start = (place * self.world_size + self.rank) * size
            chosen = np.arange(start, start + size) % len(cells)
            yield self._batch(cells[chosen], items[chosen], epoch)

    def _plan(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Return the perturbed cells of an epoch in random order, and the position of the item of each."""
        seed, n = self.settings.seed, self.settings.cells_per_condition
        rows = [draw_cells(self.cells.screen.rows_of(item), n, seed=seed, epoch=epoch) for item in self.cells.items]
        order = np.random.default_rng([seed, epoch]).permutation(n * len(rows))
        return np.concatenate(rows)[order], np.repeat(np.arange(len(rows)), n)[order]

    def _batch(self, cells: Int64Array, items: Int64Array, epoch: int) -> dict[str, Any]:
        """Return the batch of some perturbed cells; a cell that occurs twice has the same control twice."""
        screen, seed = self.cells.screen, self.settings.seed
        controls = pair_controls(cells, screen.batches, self.cells.controls, seed=seed, epoch=epoch)
        before = screen.values[controls].toarray()[:, self.cells.genes.columns]
        after = screen.values[cells].toarray()[:, self.cells.genes.columns]
        examples = [self._example(*one, epoch=epoch) for one in zip(cells, items, before, after, strict=True)]
        return make_batch(examples, self.cells.genes.ids, self.processor, self.config)[0]

    def _example(self, cell: np.int64, item: np.int64, before: Values, after: Values, *, epoch: int) -> Example:
        key = np.array([cell])
        seed, genes = self.settings.seed, self.cells.genes
        parts = self._parts(int(item), self._numbers(key, MADE_UP, 2, epoch))
        chances = self._numbers(key, HIDDEN_NAMES, 2, epoch)
        hidden = int(chances[1] * len(parts)) if chances[0] < self.settings.hide_names else None
        if self.settings.target == "cell" and len(parts) == 1:
            labels = after
        else:
            context = self.cells.items[item][1]
            shares = [self.cells.unknown_share[context] if place == hidden else 1.0 for place in range(len(parts))]
            delta = np.sum([share * delta for share, (_, delta) in zip(shares, parts, strict=True)], axis=0)
            labels = (before + delta[genes.columns]).astype(np.float32)
        named = [condition for place, (condition, _) in enumerate(parts) if place != hidden]
        targets = genes.target_ids(tuple(sorted({gene for condition in named for gene in condition})))
        if hidden is not None:
            targets = np.append(targets, nameless_id(self.processor))
        n_others = len(np.setdiff1d(targets, genes.ids))
        words = random_words(cell_keys(key, seed=seed, epoch=epoch, purpose=PAIRED_GENES), genes.ids)
        kept = keep_genes(words, np.isin(genes.ids, targets), max(self.settings.max_tokens - n_others, 1))
        return Example(before, targets, labels, kept)

    def _parts(self, item: int, chances: npt.NDArray[np.float64]) -> list[tuple[Condition, Float64Array]]:
        """Return the condition of an example with its delta; sometimes two singles, which make up a double."""
        name, context = self.cells.items[item]
        condition = parse_condition(name)
        parts = [(condition, self.cells.deltas[name, context])]
        if len(condition) != 1 or chances[0] >= self.settings.made_up_doubles or not self._has_doubles:
            return parts
        singles = [
            (other, delta)
            for (one, where), delta in self.cells.deltas.items()
            if where == context and one != name and len(other := parse_condition(one)) == 1
        ]
        return [*parts, singles[int(chances[1] * len(singles))]] if singles else parts

    @property
    def _has_doubles(self) -> bool:
        return any(len(parse_condition(name)) > 1 for name, _ in self.cells.screen.items)

    def _numbers(self, key: Int64Array, purpose: int, n: int, epoch: int) -> npt.NDArray[np.float64]:
        keys = cell_keys(key, seed=self.settings.seed, epoch=epoch, purpose=purpose)
        return to_uniform(random_words(keys, np.arange(n)))


def unknown_share_of(deltas: Sequence[Float64Array]) -> float:
    """Return the share s of the mean of the other deltas that predicts each delta best, from 0 to 1.

    s = Σ_i δ_i · m_i / Σ_i |m_i|², where m_i is the mean of the deltas other than δ_i. If perturbations have nothing in
    common, s is near 0, and no change is a better guess than the mean; if all do the same, it is 1.

    Args:
        deltas: deltas of the training conditions. Shape (genes,) each.
    """
    if len(deltas) < 2:
        return 1.0
    all_of_them = np.stack(deltas)
    others = (all_of_them.sum(axis=0) - all_of_them) / (len(deltas) - 1)
    size = float(np.square(others).sum())
    return float(np.clip((all_of_them * others).sum() / size, 0.0, 1.0)) if size else 1.0
