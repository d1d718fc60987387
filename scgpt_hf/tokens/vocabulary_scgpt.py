"""The gene vocabulary: a WordLevel tokenizer that any `AutoTokenizer` loads, and how genes of data are found in it."""

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
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d+)\.\d+")
_VAR_COLUMNS = ("feature_id", "gene_ids", "feature_name", "gene_symbols", "gene_name", "gene_id")


def build_tokenizer(vocab: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a vocabulary: `tokenizer("CD3D CD8A")` answers with their ids.

    There is no unknown token: `convert_tokens_to_ids` answers None for a gene that is not in it, rather than some other
    id.

    Args:
        vocab: id of each gene and special token; the specials may sit at any id.

    Raises:
        ValueError: see `check_vocab`.
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
    if EOC in vocab:  # no `eos_token`: a cell is a set and has no end, and the Trainer would tell the config of one
        specials["extra_special_tokens"] = [EOC]
    with TemporaryDirectory() as folder:  # through a file, so that this room needs nothing beside transformers
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(backend), encoding="utf-8")
        tokenizer: Any = PreTrainedTokenizerFast
        return cast(PreTrainedTokenizerFast, tokenizer(tokenizer_file=str(path), **specials))


def check_vocab(vocab: Mapping[str, int]) -> None:
    """Raise unless the vocabulary has `<pad>`, `<cls>` and at least one gene, and its ids are 0, 1, 2, … each once.

    Raises:
        ValueError: saying which token or id is wrong.
    """
    missing = [token for token in (PAD, CLS) if token not in vocab]
    if missing:
        raise ValueError(f"the vocabulary lacks {' and '.join(missing)}; add them with ids of their own")
    wrong = [
        token for token, index in vocab.items() if isinstance(index, bool) or not isinstance(index, int | np.integer)
    ]
    if wrong:
        raise ValueError(f"ids of a vocabulary are whole numbers; found {vocab[wrong[0]]!r} for {wrong[0]!r}")
    unnamed = [index for token, index in vocab.items() if not isinstance(token, str) or not token.strip()]
    if unnamed:
        raise ValueError(f"a vocabulary names every id; ids {unnamed[:5]} have an empty name or none")
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
        raise ValueError("the vocabulary holds special tokens only; it needs at least one gene")


def vocab_of_genes(genes: Sequence[str]) -> dict[str, int]:
    """Return ids [0, genes − 1] in the order given, then `<pad>`, `<cls>`, `<eoc>`.

    Raises:
        ValueError: a gene is repeated or is named like a special token.
    """
    names = [str(gene) for gene in genes]
    _require_unique(names, "genes of the vocabulary")
    reserved = sorted({PAD, CLS, EOC} & set(names))
    if reserved:
        raise ValueError(f"{reserved} are special tokens, not genes; leave them out, they are added by themselves")
    return {token: index for index, token in enumerate([*names, PAD, CLS, EOC])}


def match_genes(vocab: Mapping[str, int], genes: Sequence[str]) -> Int64Array:
    """Return the vocabulary id of each gene, −1 where unknown; an Ensembl version (`ENSG….5`) is ignored.

    The log says how many are known. It is normal that a vocabulary of 1,200 genes knows few of the 60,000 of a data
    set, and that a panel of 400 genes covers little of a vocabulary of 60,000; so only data that fail both ways are
    refused: fewer than a tenth of their genes are in the vocabulary *and* they hold fewer than a tenth of the
    vocabulary's genes, as happens with names of another kind or species. With fewer than half both ways, as of a panel
    that was chosen for something else, the log warns: the model sees little of each cell.

    Args:
        vocab: id of each token.
        genes: names of the columns of the data, as the vocabulary names them. Shape (genes,).

    Raises:
        ValueError: names are repeated, two names are versions of one gene, or too few are known.
    """
    names = [str(gene) for gene in genes]
    _require_unique(names, "gene names of the data")
    targets = {token: index for token, index in vocab.items() if token not in (PAD, CLS, EOC)}
    bare = {name: hit[1] for name in names if name not in targets and (hit := _VERSIONED.fullmatch(name))}
    ids = np.fromiter((targets.get(bare.get(name, name), -1) for name in names), np.int64, len(names))
    found = [bare.get(name, name) for name, index in zip(names, ids, strict=True) if index >= 0]
    _require_unique(found, "genes after dropping versions")
    n_known = len(found)
    share = max(n_known / max(len(names), 1), n_known / len(targets))
    if share < 0.1:
        unknown = [name for name, index in zip(names, ids, strict=True) if index < 0]
        raise ValueError(
            f"only {n_known:,} of the {len(names):,} genes of the data are among the vocabulary's {len(targets):,}; "
            f"the data have {unknown[:5]}, the vocabulary {list(targets)[:5]}; pass names of one kind (Ensembl ids "
            "or symbols; of an AnnData also in var['feature_id'] and var['feature_name']) and species"
        )
    logger.log(
        logging.WARNING if share < 0.5 else logging.INFO,
        "%d of %d genes of the data are known, %d of the vocabulary's %d are present; %d version suffixes ignored",
        n_known, len(names), n_known, len(targets), sum(name in targets for name in bare.values()),
    )  # fmt: skip
    return ids


def genes_by_symbol(genes: Sequence[str], symbols: Sequence[str]) -> dict[str, str]:
    """Return the gene that each symbol stands for, but for symbols of several genes, or that name a gene themselves.

    Args:
        genes: of the vocabulary, by ascending id.
        symbols: of these genes, or none at all.

    Raises:
        ValueError: there are symbols, and not one text for each gene.
    """
    if symbols and (len(symbols) != len(genes) or not all(isinstance(symbol, str) for symbol in symbols)):
        raise ValueError(f"expected a symbol for each of the {len(genes):,} genes, found {len(symbols):,} symbols")
    n_genes = Counter(symbols)
    named = {symbol: gene for symbol, gene in zip(symbols, genes, strict=False) if n_genes[symbol] == 1}
    return {symbol: named[symbol] for symbol in named.keys() - set(genes)}


def gene_names_of(adata: Any, vocab: Mapping[str, int], symbols: Collection[str] = ()) -> list[str]:
    """Return the names of an AnnData's genes from `var_names` or the column of `var` that the vocabulary knows best.

    Of columns that it knows equally well, the one with most symbols.
    """
    columns = [column for column in _VAR_COLUMNS if column in adata.var.columns]
    choices = {"var_names": adata.var_names} | {f"var[{column!r}]": adata.var[column] for column in columns}
    found = {where: [str(name) for name in names] for where, names in choices.items()}

    def n_known(where: str) -> tuple[int, int]:
        names = set(found[where])
        bare = {_VERSIONED.sub(r"\1", name) for name in names}
        return len(bare & vocab.keys() | names & vocab.keys()), len(names.intersection(symbols))

    best = max(found, key=n_known)  # the first of equals, so var_names if nothing is better
    logger.info("gene names are taken from %s", best)
    return found[best]


def _require_unique(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        raise ValueError(
            f"{len(repeated):,} {what} are repeated, e.g. {list(dict.fromkeys(repeated))[:5]}; keep one of each, for "
            "example by adata[:, ~adata.var_names.duplicated()], or use names without repeats (Ensembl ids)"
        )
