"""`ScGPTProcessor`: counts and gene names in, what the model reads out; saved beside the weights.

It holds the settings and the gene vocabulary and checks what users pass in. The rules live beside it:
`tokenizing_scgpt`, `binning_scgpt`, `masking_scgpt`, `packing_scgpt`, `vocabulary_scgpt`.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from .binning_scgpt import Ties
from .kernels_scgpt import TIE_CODES
from .masking_scgpt import draw_ratios, mask_tokens
from .packing_scgpt import Tokens, pack, pad
from .randomness_scgpt import Int64Array, SparseCounts, content_ids
from .sampling_scgpt import COMPILED  # noqa: F401  # transformers 5.4 copies from a folder only what is named here
from .tokenizing_scgpt import TokenRule, as_block, check_columns, count_known, csr_of, log_normalize, tokenize_counts
from .vocabulary_scgpt import (
    CLS,
    EOC,
    PAD,
    build_tokenizer,
    check_vocab,
    gene_names_of,
    genes_by_symbol,
    match_genes,
    vocab_of_genes,
)

logger = logging.getLogger(__name__)

InputStyle = Literal["binned", "log1p"]
# Keywords of `from_pretrained` that say which files are meant.
_WHERE = frozenset({"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"})


class ScGPTProcessor(ProcessorMixin):
    """Turns counts into the tokens that a model reads.

    Args:
        tokenizer: genes and special tokens; made by `from_genes` or `from_vocab`.
        n_bins: number of bins with the zero bin.
        max_tokens: most tokens per cell, with `<cls>`.
        cls_value: value carried by `<cls>`: 0 in our recipe, −2 for published scGPT checkpoints.
        pad_value: value at padding.
        mask_value: value where a gene is hidden.
        ties: how `bin_counts` settles ties; `midpoint` is free of randomness.
        input_style: `binned`, or `log1p` of counts normalised to `target_sum` over all genes of the data.
        target_sum: counts per cell after normalising. Bins do not depend on it.
        include_zeros: whether known genes that are not expressed become tokens too, with value 0.
        symbols: other names by which data may call the genes, by ascending id; a name that several genes share is none.

    Raises:
        ValueError: a setting is out of range, or the vocabulary lacks a special token or has holes.

    Source: Cui et al. 2024, Nature Methods 21:1470: 51 bins, 1,200 genes, mask −1 and padding −2.
    """

    # The settings cannot be keyword-only: ProcessorMixin.from_pretrained looks for them among the positional arguments.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        n_bins: int = 51,
        max_tokens: int = 1201,
        cls_value: float = 0.0,
        pad_value: float = -2.0,
        mask_value: float = -1.0,
        ties: Ties = "random",
        input_style: InputStyle = "binned",
        target_sum: float = 1e4,
        include_zeros: bool = False,
        symbols: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.n_bins, self.max_tokens = n_bins, max_tokens
        self.cls_value, self.pad_value, self.mask_value = cls_value, pad_value, mask_value
        self.ties, self.input_style = ties, input_style
        self.target_sum, self.include_zeros = target_sum, include_zeros
        self.symbols = None if symbols is None else list(symbols)
        self._check_settings()
        self._vocab = tokenizer.get_vocab()  # once: with tens of thousands of genes it takes a while
        check_vocab(self._vocab)
        self._gene_of = genes_by_symbol(self.genes, self.symbols) if self.symbols else {}
        self._checked: Int64Array | None = None

    @classmethod
    def from_genes(cls, genes: Sequence[str], **settings: Any) -> "ScGPTProcessor":
        """Return a processor whose vocabulary is these genes in this order, then `<pad>`, `<cls>`, `<eoc>`."""
        return cls.from_vocab(vocab_of_genes(genes), **settings)

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int], **settings: Any) -> "ScGPTProcessor":
        """Return a processor with the ids of a published `vocab.json`; special tokens may sit at any id."""
        return cls(build_tokenizer(vocab), **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "ScGPTProcessor":
        """Return the processor saved in a folder or a repository of the Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's id.
            *args: as the library takes them; better given by name.
            **kwargs: settings to change, and what the library takes: `revision`, `token`, `cache_dir`, ….

        Raises:
            OSError: there is no such folder or repository, or it holds no processor.
            ValueError: the model saved there has another vocabulary, or a setting is unknown or out of range.
        """
        processor: ScGPTProcessor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        try:
            model, _ = PreTrainedConfig.get_config_dict(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in _WHERE & kwargs.keys()}
            )
        except OSError:  # a processor alone
            return processor
        processor._check_model(model, pretrained_model_name_or_path)
        return processor

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the saved settings, and what of the keywords is left; called by `from_pretrained`.

        Raises:
            ValueError: a setting is unknown; left out, as the library would, it could change what the model reads.
        """
        saved, left = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        known = {*signature(cls).parameters, "auto_map", "processor_class"}
        if unknown := sorted(saved.keys() - known):
            raise ValueError(
                f"the processor in {pretrained_model_name_or_path} has settings that ScGPTProcessor does not know: "
                f"{unknown}; it may come from a newer version of scgpt_hf"
            )
        return saved, left

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: `ScGPTConfig.vocab_size`."""
        return len(self._vocab)

    @property
    def pad_id(self) -> int:
        """Vocabulary id of `<pad>`: `ScGPTConfig.pad_token_id`."""
        return self._vocab[PAD]

    @property
    def cls_id(self) -> int:
        """Vocabulary id of `<cls>`."""
        return self._vocab[CLS]

    @property
    def genes(self) -> list[str]:
        """The genes of the vocabulary by ascending id, without special tokens."""
        return sorted(self._vocab.keys() - {PAD, CLS, EOC}, key=self._vocab.__getitem__)

    def genes_named(self, names: Iterable[str]) -> list[str]:
        """Return the gene of the vocabulary that each name stands for as a symbol; a name that is none as it is."""
        return [self._gene_of.get(name, name) for name in map(str, names)]

    def gene_names(self, input_ids: Sequence[int] | npt.NDArray[np.integer]) -> list[str]:
        """Return the gene or special token of each id."""
        names: list[str] = self.tokenizer.convert_ids_to_tokens([int(index) for index in input_ids])
        return names

    def match_genes(self, genes: Sequence[str]) -> Int64Array:
        """Return the vocabulary id of each gene, −1 where unknown; see `vocabulary_scgpt.match_genes`."""
        return match_genes(self._vocab, genes)

    def count_known(self, counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
        """Return how many genes of the vocabulary each cell expresses, (cells,); `tokenize` drops cells with 0."""
        return count_known(as_block(counts), self._check_columns(counts, gene_ids))

    def tokenize(
        self,
        counts: SparseCounts,
        gene_ids: Int64Array,
        *,
        cell_ids: Int64Array | None = None,
        seed: int,
        epoch: int,
        ties: Ties | None = None,
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokenize every cell that expresses a known gene; `Tokens.cell_ids` lists these cells.

        Args:
            counts: raw counts, CSR with sorted columns. Shape (cells, genes).
            gene_ids: from `match_genes`; checked at every call, or once if it is read-only. Shape (genes,).
            cell_ids: what ties, sampling and masks of a cell are keyed by, int64 (cells,). None keys them by the cell's
                own genes and counts (`content_ids`), so a cell gives the same tokens in any file, order or batch.
            seed: seed of ties and sampling.
            epoch: epoch of ties and sampling.
            ties: overrides the processor's `ties` in this call.
            max_tokens: overrides the processor's `max_tokens` in this call.

        Raises:
            ValueError: a value is negative or not finite, shapes disagree, columns are unsorted or map to one id twice,
                or `ties` or `max_tokens` is not a possible setting.
        """
        block, gene_ids = as_block(counts), self._check_columns(counts, gene_ids)
        cell_ids = content_ids(block, gene_ids) if cell_ids is None else np.asarray(cell_ids, np.int64)
        if cell_ids.shape != counts.shape[:1]:
            raise ValueError(
                f"found {cell_ids.shape} cell ids for {counts.shape[0]:,} cells; pass one per cell, or None"
            )
        if self.input_style == "log1p":
            block = log_normalize(block, self.target_sum)
        rule = self._rule(self.ties if ties is None else ties, self.max_tokens if max_tokens is None else max_tokens)
        tokens = tokenize_counts(block, gene_ids, rule, cell_ids=cell_ids, seed=seed, epoch=epoch)
        logger.debug(
            "%d of %d cells express no known gene and were dropped", counts.shape[0] - len(tokens), counts.shape[0]
        )
        return tokens

    def mask(self, tokens: Tokens, *, seed: int, epoch: int, ratios: Sequence[float] = (0.25, 0.5, 0.75)) -> Tokens:
        """Return the tokens with a share of each cell's genes hidden and labelled; the share is one of `ratios`.

        Source: the ratios are those of scGPT's pretraining, Cui et al. 2024.
        """
        drawn = draw_ratios(tokens.cell_ids, ratios, seed=seed, epoch=epoch)
        return mask_tokens(tokens, drawn, seed=seed, epoch=epoch, mask_value=self.mask_value)

    def __call__(
        self,
        counts: Any,
        genes: Sequence[str] | None = None,
        *,
        cell_ids: Int64Array | None = None,
        seed: int = 0,
        epoch: int = 0,
        mask_ratios: Sequence[float] | None = None,
        packed: bool = False,
        drop_empty: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return the batch a model takes: `model(**processor(adata))`.

        Args:
            counts: an AnnData, or raw counts, sparse or dense. Shape (cells, genes).
            genes: names of the columns. None takes them from the AnnData: `var_names` or the column of `var` known
                best.
            cell_ids: see `tokenize`.
            seed: settles ties, sampling and masks.
            epoch: the same.
            mask_ratios: hide genes and give labels, as in pretraining; None hides nothing.
            packed: cells end to end in one row, without padding, instead of one padded row per cell.
            drop_empty: leave out cells that express no known gene, instead of raising.
            return_tensors: "pt" or None, which are the same.

        Returns:
            Tensors as `pad` or `pack` describe them.

        Raises:
            ValueError: as `tokenize` and `match_genes`, or there are no gene names, or cells without a known gene.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(
                f"return_tensors={return_tensors!r}: batches are PyTorch tensors; leave it out, or pass 'pt'"
            )
        if hasattr(counts, "var_names"):
            genes = gene_names_of(counts, self._vocab, self._gene_of) if genes is None else genes
            counts = counts.X
        if genes is None:
            raise ValueError("counts without gene names: pass genes=[...], one name per column, or an AnnData")
        block, gene_ids = csr_of(counts), self.match_genes(self.genes_named(genes))
        tokens = self.tokenize(block, gene_ids, cell_ids=cell_ids, seed=seed, epoch=epoch)
        if len(tokens) < block.shape[0] and not drop_empty:
            empty = np.flatnonzero(self.count_known(block, gene_ids) == 0)
            raise ValueError(
                f"{len(empty):,} of {block.shape[0]:,} cells express no gene of the vocabulary, e.g. rows "
                f"{empty[:5].tolist()}; leave them out, or pass drop_empty=True"
            )
        if mask_ratios is not None:
            tokens = self.mask(tokens, seed=seed, epoch=epoch, ratios=mask_ratios)
        return BatchFeature(pack(tokens) if packed else pad(tokens, pad_id=self.pad_id, pad_value=self.pad_value))

    def _rule(self, ties: Ties, max_tokens: int) -> TokenRule:
        _require_choice("ties", ties, tuple(TIE_CODES))
        _require_integer("max_tokens", max_tokens, 2)
        n_bins = self.n_bins if self.input_style == "binned" else None
        return TokenRule(self.vocab_size, self.cls_id, self.cls_value, max_tokens, n_bins, ties, self.include_zeros)

    def _check_columns(self, counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
        gene_ids = np.asarray(gene_ids, np.int64)
        fixed = gene_ids.base is None and not gene_ids.flags.writeable  # what cannot change is checked once
        if not fixed or gene_ids is not self._checked or gene_ids.shape != counts.shape[1:]:
            check_columns(gene_ids, counts.shape[1], self.vocab_size)
            self._checked = gene_ids if fixed else None
        return gene_ids

    def _check_model(self, config: Mapping[str, Any], where: Any) -> None:
        """Raise unless the vocabulary is that of the model whose config this is; what the config lacks is not asked."""
        own = {"vocab_size": self.vocab_size, "pad_token_id": self.pad_id}
        if wrong := {name: config[name] for name in own if config.get(name) not in (None, own[name])}:
            raise ValueError(
                f"the vocabulary in {where} has {own}, the model there {wrong}; "
                "copy tokenizer.json and config.json again from one folder"
            )

    def _check_settings(self) -> None:
        _require_choice("ties", self.ties, tuple(TIE_CODES))
        _require_choice("input_style", self.input_style, get_args(InputStyle))
        _require_integer("n_bins", self.n_bins, 2)
        _require_integer("max_tokens", self.max_tokens, 2)
        for name in ("cls_value", "pad_value", "mask_value", "target_sum"):
            found = getattr(self, name)
            if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
                raise ValueError(f"{name} must be a finite number, found {found!r}")
        if self.target_sum <= 0:
            raise ValueError(f"target_sum must be > 0 counts per cell, found {self.target_sum!r}")
        if not isinstance(self.include_zeros, bool):
            raise ValueError(f"include_zeros must be true or false, found {self.include_zeros!r}")


def _require_choice(name: str, found: Any, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise ValueError(f"unknown {name} {found!r}; choose one of {', '.join(allowed)}")


def _require_integer(name: str, found: Any, least: int) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name} must be a whole number ≥ {least}, found {found!r}")


ScGPTProcessor.register_for_auto_class("AutoProcessor")  # type: ignore[no-untyped-call]
