"""The gene vocabulary: which id each gene has, and how the genes of a data set are found in it.

The vocabulary is stored as a WordLevel tokenizer (`tokenizer.json`), so that any `AutoTokenizer` loads it. Genes are
named by Ensembl id (ENSG00000141510) or by symbol (TP53). Besides genes there are three special tokens: `<pad>` fills
rows, `<cls>` stands for the cell, and `<eoc>` ("end of cell") occurs in published scGPT vocabularies but is not used.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from .randomness_scgpt import Int64Array

logger = logging.getLogger(__name__)

PAD, CLS, EOC = "<pad>", "<cls>", "<eoc>"
# An Ensembl id with its version, such as ENSG00000141510.17. The version counts corrections of the gene's annotation.
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d+)\.\d+")
# Columns of `var` that hold gene names in data from CELLxGENE, 10x Genomics and scanpy, in order of preference.
_VAR_COLUMNS = ("feature_id", "gene_ids", "feature_name", "gene_symbols", "gene_name", "gene_id")


def build_tokenizer(vocab: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a vocabulary, so that `tokenizer("CD3D CD8A")` returns the ids of these genes.

    There is no unknown token: `convert_tokens_to_ids` returns None for a gene that is not in the vocabulary.

    Args:
        vocab: id of each gene and special token. Special tokens may have any id.

    Raises:
        ValueError: the vocabulary is not valid; see `check_vocab`.
    """
    check_vocab(vocab)
    ids = {token: int(index) for token, index in vocab.items()}
    backend = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
    }
    specials: dict[str, Any] = {"pad_token": PAD, "cls_token": CLS}
    if EOC in vocab:
        # Not as `eos_token`: a cell is a set without an end, and the Trainer would copy an `eos_token` to the config.
        specials["extra_special_tokens"] = [EOC]
    # Through a file: building it in memory would import `tokenizers`, and modules that are uploaded with the weights
    # import numpy, torch and transformers only.
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(backend), encoding="utf-8")
        tokenizer: Any = PreTrainedTokenizerFast
        return cast(PreTrainedTokenizerFast, tokenizer(tokenizer_file=str(path), **specials))


def check_vocab(vocab: Mapping[str, int]) -> None:
    """Check that a vocabulary has `<pad>`, `<cls>` and at least one gene, and that its ids are 0, 1, 2, ….

    Raises:
        ValueError: a token is missing, has no name, or its id is not an integer, is repeated or leaves a gap.
    """
    missing = [token for token in (PAD, CLS) if token not in vocab]
    if missing:
        raise ValueError(f"the vocabulary has no {' and no '.join(missing)}; add each with an unused id")
    wrong = [
        token for token, index in vocab.items() if isinstance(index, bool) or not isinstance(index, int | np.integer)
    ]
    if wrong:
        raise ValueError(f"ids of a vocabulary must be integers; found {vocab[wrong[0]]!r} for {wrong[0]!r}")
    unnamed = [index for token, index in vocab.items() if not isinstance(token, str) or not token.strip()]
    if unnamed:
        raise ValueError(f"every id of a vocabulary needs a name; ids {unnamed[:5]} have none")
    ids = np.sort(np.fromiter(vocab.values(), np.int64, len(vocab)))
    repeated = np.unique(ids[:-1][np.diff(ids) == 0])
    if len(repeated):
        first = [token for token, index in vocab.items() if index == repeated[0]]
        raise ValueError(f"{len(repeated):,} ids of the vocabulary are used twice, e.g. {repeated[0]} for {first[:2]}")
    if ids[0] != 0 or ids[-1] != len(ids) - 1:
        holes = np.setdiff1d(np.arange(max(len(ids), ids[-1] + 1)), ids)[:5].tolist()
        raise ValueError(
            f"ids of the vocabulary must run from 0 to {len(ids) - 1}; found {ids[0]} to {ids[-1]}, missing {holes}"
        )
    if len(vocab) == len({PAD, CLS, EOC} & set(vocab)):
        raise ValueError("the vocabulary contains special tokens only; it needs at least one gene")


def vocab_of_genes(genes: Sequence[str]) -> dict[str, int]:
    """Assign ids to genes in the given order, starting at 0, then to `<pad>`, `<cls>` and `<eoc>`.

    Raises:
        ValueError: a gene is repeated or has the name of a special token.

    Example:
        >>> vocab_of_genes(["CD3D", "CD8A"])
        {'CD3D': 0, 'CD8A': 1, '<pad>': 2, '<cls>': 3, '<eoc>': 4}
    """
    names = [str(gene) for gene in genes]
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        raise ValueError(f"{len(repeated):,} genes of the vocabulary are repeated, e.g. {repeated[:5]}; list each once")
    reserved = sorted({PAD, CLS, EOC} & set(names))
    if reserved:
        raise ValueError(f"{reserved} are special tokens, not genes; leave them out, they are added automatically")
    return {token: index for index, token in enumerate([*names, PAD, CLS, EOC])}


def match_genes(vocab: Mapping[str, int], genes: Sequence[str]) -> Int64Array:
    """Return the vocabulary id of each gene, −1 where unknown. The version of an Ensembl id (`ENSG….5`) is ignored.

    The function logs how many genes are known. A small overlap in one direction is normal: a vocabulary of 1,200 genes
    covers few of the 60,000 genes of a data set, and a panel of 400 genes covers little of a vocabulary of 60,000. So
    two shares are computed, known genes of the data and covered genes of the vocabulary, and the larger one counts.
    Below one tenth the function raises: the names are of another kind or species. Below one half it logs a warning: the
    model reads little of each cell. Columns with one name, or with versions of one id, have the same id: the processor
    sums their counts. This is logged, too.

    Args:
        vocab: id of each token.
        genes: names of the columns of the data, of the kind that the vocabulary uses. Shape (genes,).

    Returns:
        int64 ids, shape (genes,).

    Raises:
        ValueError: too few genes are known.
    """
    names = [str(gene) for gene in genes]
    targets = {token: index for token, index in vocab.items() if token not in (PAD, CLS, EOC)}
    bare = {name: hit[1] for name in names if name not in targets and (hit := _VERSIONED.fullmatch(name))}
    ids = np.fromiter((targets.get(bare.get(name, name), -1) for name in names), np.int64, len(names))
    found = [bare.get(name, name) for name, index in zip(names, ids, strict=True) if index >= 0]
    n_known, n_present = len(found), len(set(found))
    n_suffixes = sum(name in targets for name in bare.values())
    share = max(n_known / max(len(names), 1), n_present / len(targets))
    if share < 0.1:
        unknown = [name for name, index in zip(names, ids, strict=True) if index < 0]
        raise ValueError(
            f"only {n_known:,} of the {len(names):,} genes of the data are in the vocabulary of {len(targets):,}; "
            f"the data have for example {unknown[:5]}, the vocabulary {list(targets)[:5]}; use names of the same kind "
            "and species (Ensembl ids or symbols; an AnnData may have them in var['feature_id'] or "
            "var['feature_name'])"
        )
    logger.log(
        logging.WARNING if share < 0.5 else logging.INFO,
        "%d of %d genes of the data are known, %d of %d genes of the vocabulary present%s",
        n_known, len(names), n_present, len(targets), f"; ignored {n_suffixes} version suffixes" if n_suffixes else "",
    )  # fmt: skip
    if n_known > n_present:
        logger.warning(
            "%d genes of the data have the name of another one, e.g. %s; their counts are summed",
            n_known - n_present, [name for name, n in Counter(found).items() if n > 1][:5],
        )  # fmt: skip
    return ids


def check_modalities(genes: Sequence[str], modalities: Sequence[str]) -> None:
    """Raise ValueError unless there is one modality for each gene, and none is named like a special token."""
    if len(modalities) != len(genes):
        raise ValueError(f"found {len(modalities):,} modalities for {len(genes):,} genes; pass one per gene")
    if special := sorted(set(modalities) & {PAD, CLS, EOC}):
        raise ValueError(f"no gene can have the modality {special[0]!r}, which is for special tokens")


def map_symbols(genes: Sequence[str], symbols: Sequence[str]) -> dict[str, str]:
    """Map symbols to genes of the vocabulary.

    A symbol that several genes share is ambiguous, and a symbol that is also the name of a gene means that gene. Both
    are left out.

    Args:
        genes: genes of the vocabulary by ascending id.
        symbols: the symbol of each of them; may be empty.

    Raises:
        ValueError: `symbols` is not empty and does not have one string per gene.
    """
    if symbols and (len(symbols) != len(genes) or not all(isinstance(symbol, str) for symbol in symbols)):
        raise ValueError(f"expected one symbol (a string) for each of {len(genes):,} genes, found {len(symbols):,}")
    n_genes = Counter(symbols)
    gene_of = {symbol: gene for symbol, gene in zip(symbols, genes, strict=False) if n_genes[symbol] == 1}
    return {symbol: gene_of[symbol] for symbol in gene_of.keys() - set(genes)}


def choose_gene_names(adata: Any, vocab: Mapping[str, int], symbols: Collection[str] = ()) -> list[str]:
    """Return the gene names of an AnnData from `var_names` or from a column of `var`.

    The function takes the one of which most names are in the vocabulary. Among equals it prefers the one with most
    `symbols`, then `var_names`.

    Args:
        adata: an AnnData.
        vocab: id of each token.
        symbols: other names by which the genes of the vocabulary are known.

    Returns:
        One name per column of the AnnData.
    """
    columns = [column for column in _VAR_COLUMNS if column in adata.var.columns]
    choices = {"var_names": adata.var_names} | {f"var[{column!r}]": adata.var[column] for column in columns}
    found = {where: [str(name) for name in names] for where, names in choices.items()}

    def n_known(where: str) -> tuple[int, int]:
        names = set(found[where])
        bare = {_VERSIONED.sub(r"\1", name) for name in names}
        return len(bare & vocab.keys() | names & vocab.keys()), len(names.intersection(symbols))

    best = max(found, key=n_known)  # the first of equals, so `var_names` if no column is better
    logger.info("reading gene names from %s", best)
    return found[best]
