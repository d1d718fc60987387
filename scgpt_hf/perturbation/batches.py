"""Make the batches of a perturbation model: a control cell, a flag for each gene, and what is to be predicted.

The tokens of an example are `<cls>` (if the config has it), the known genes of the screen, expressed or not, and then
the perturbed genes that the screen did not measure, with value 0. A perturbed gene is therefore always among the
tokens. All functions are pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.embeddings_scgpt import NOT_PERTURBED, PADDING, PERTURBED
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, pack, pad
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.vocabulary_scgpt import EOC

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """One control cell and one perturbation.

    Attributes:
        values: values of the known genes of the control cell. Shape (known genes,).
        targets: vocabulary ids of the perturbed genes.
        labels: values after the perturbation, if they are known. Shape (known genes,).
        kept: positions of the genes that become tokens; None for all. Perturbed genes always do.
    """

    values: Values
    targets: Int64Array
    labels: Values | None = None
    kept: Int64Array | None = None


def nameless_id(processor: ScGPTProcessor) -> int:
    """Return the vocabulary id of the token that stands for a perturbed gene whose name is hidden.

    It is `<eoc>`, which no cell contains; a vocabulary without it lends `<cls>`.
    """
    return int(processor.tokenizer.get_vocab().get(EOC, processor.cls_id))


def make_batch(
    examples: Sequence[Example], gene_ids: Int64Array, processor: ScGPTProcessor, config: ScGPTConfig
) -> tuple[dict[str, Any], list[Int64Array]]:
    """Return the batch of some examples, and where their genes are in it.

    Args:
        examples: the examples; all or none have labels.
        gene_ids: vocabulary ids of the known genes of the screen. Shape (known genes,).
        processor: holds the vocabulary.
        config: decides about `<cls>` and the layout. Examples of equal length need neither padding nor packing. Of
            others, a model whose results depend on padding gets padded cells, every other one packed cells.

    Returns:
        Keyword arguments of `ScGPTForPerturbation.forward`; and for each example the positions in the flattened
        prediction of the genes in `kept`, in their order.
    """
    rows = [_tokens_of(example, gene_ids, processor, with_cls=config.perturbation_cls) for example in examples]
    lengths = np.array([len(ids) for ids, _, _, _ in rows])
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids, values, flags, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    tokens = Tokens(ids, values, labels, indptr, np.arange(len(examples)))
    first = int(config.perturbation_cls)
    n_kept = [len(gene_ids) if example.kept is None else len(example.kept) for example in examples]
    if (lengths == lengths[0]).all():
        shape = (len(examples), int(lengths[0]))
        named = {"input_ids": ids, "values": values, "labels": labels}
        batch: dict[str, Any] = {name: torch.from_numpy(flat.reshape(shape)) for name, flat in named.items()}
        in_rows, starts = flags.reshape(shape), indptr[:-1]
    elif config.padding_dependent_settings:
        batch = pad(tokens, pad_id=processor.pad_id, pad_value=processor.pad_value)
        in_rows = np.full(tuple(batch["input_ids"].shape), PADDING)
        in_rows[np.arange(in_rows.shape[1]) < lengths[:, None]] = flags
        starts = np.arange(len(examples)) * in_rows.shape[1]
    else:
        batch, in_rows, starts = pack(tokens), flags[None], indptr[:-1]
    batch["perturbation_flags"] = torch.from_numpy(in_rows)
    for unused in ("label_positions", *(() if examples[0].labels is not None else ("labels",))):
        batch.pop(unused, None)
    return batch, [start + first + np.arange(n) for start, n in zip(starts, n_kept, strict=True)]


def _tokens_of(
    example: Example, gene_ids: Int64Array, processor: ScGPTProcessor, *, with_cls: bool
) -> tuple[Int64Array, Values, Int64Array, Values]:
    """Return ids, values, flags and labels of the tokens of an example. Shape (tokens,) each."""
    kept = np.arange(len(gene_ids)) if example.kept is None else example.kept
    ids, values = gene_ids[kept], example.values[kept]
    labels = np.full(len(kept), IGNORE, np.float32) if example.labels is None else example.labels[kept]
    flags = np.where(np.isin(ids, example.targets), PERTURBED, NOT_PERTURBED)
    others = np.setdiff1d(example.targets, ids)
    first = [processor.cls_id] if with_cls else []
    n_first, n_others = len(first), len(others)
    return (
        np.concatenate([first, ids, others]).astype(np.int64),
        np.concatenate([[processor.cls_value] * n_first, values, np.zeros(n_others)]).astype(np.float32),
        np.concatenate([[NOT_PERTURBED] * n_first, flags, [PERTURBED] * n_others]).astype(np.int64),
        np.concatenate([[IGNORE] * n_first, labels, [IGNORE] * n_others]).astype(np.float32),
    )


def keep_genes(words: npt.NDArray[np.uint64], is_target: npt.NDArray[np.bool_], n: int) -> Int64Array:
    """Return the positions of `n` genes, ascending: the perturbed ones, then those with the smallest random words.

    Args:
        words: random word of each gene. Shape (known genes,).
        is_target: whether a gene is perturbed. Shape (known genes,).
        n: number of genes; fewer if there are fewer.
    """
    if n >= len(words):
        return np.arange(len(words))
    ranked = np.where(is_target, np.uint64(0), words)
    chosen: Int64Array = np.sort(np.argsort(ranked, kind="stable")[:n])
    return chosen
