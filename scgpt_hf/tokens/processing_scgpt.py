"""`ScGPTProcessor`: turns counts and gene names into the batches that a model reads.

The processor plays the role of a tokenizer. It owns the gene vocabulary and all settings that change tokens, validates
what users pass, and is saved with the weights. The steps are in the neighboring modules: `counts_scgpt` (input),
`vocabulary_scgpt` (genes), `tokenizing_scgpt` and `binning_scgpt` (tokens), `masking_scgpt` (labels), `packing_scgpt`
(batches).
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
from .counts_scgpt import (
    SparseCounts,
    content_ids,
    count_known_genes,
    log_normalize,
    sum_repeated_genes,
    to_csr,
    validate_counts,
)
from .kernels_scgpt import TIE_CODES
from .masking_scgpt import mask_tokens, sample_mask_ratios
from .packing_scgpt import Tokens, pack, pad
from .randomness_scgpt import Int64Array, input_seed, view_seed
from .sampling_scgpt import COMPILED  # noqa: F401  # transformers 5.6 copies only the modules that this file imports
from .thinning_scgpt import thin_counts
from .tokenizing_scgpt import TokenSettings, check_gene_ids, tokenize_counts, tokenize_modalities
from .vocabulary_scgpt import (
    CLS,
    EOC,
    PAD,
    build_tokenizer,
    check_modalities,
    check_vocab,
    choose_gene_names,
    map_symbols,
    match_genes,
    vocab_of_genes,
)

logger = logging.getLogger(__name__)

InputStyle = Literal["binned", "log1p"]
# Keywords of `from_pretrained` that select the files; they are needed a second time, to read the model's config.
_FILE_KEYWORDS = frozenset({"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"})


class ScGPTProcessor(ProcessorMixin):
    """Convert counts to the tokens that a model reads.

    Args:
        tokenizer: tokenizer of genes and special tokens; `from_genes` and `from_vocab` create it.
        n_bins: number of bins, including the zero bin.
        max_tokens: largest number of tokens per cell, including `<cls>`.
        cls_value: value of `<cls>`: 0 in our recipe, −2 for published scGPT checkpoints.
        pad_value: value at padding.
        mask_value: value of a masked gene.
        ties: how a bin is chosen for a count that several bins share; see `binning_scgpt`. Only `random` uses random
            numbers.
        input_style: `binned`, or `log1p` of counts that are normalized to `target_sum` over all genes of the data.
        target_sum: counts per cell after normalizing. Bins do not depend on it.
        include_zeros: whether known genes that are not expressed become tokens with value 0.
        symbols: second name of each gene, by ascending id, under which data may contain it. Ambiguous symbols are
            ignored.
        modalities: modality of each gene, by ascending id, such as "RNA" and "protein"; None if there is only one. Each
            modality is binned and normalized by itself, and `max_tokens` is shared between them.

    Raises:
        ValueError: a setting is out of range, or the vocabulary is not valid.

    Source: Cui et al. 2024, Nature Methods 21:1470: 51 bins, 1,200 genes, mask −1 and padding −2.

    Example:
        >>> processor = ScGPTProcessor.from_genes(["CD3D", "CD8A", "MS4A1"], n_bins=3)
        >>> batch = processor([[2, 0, 7]], genes=["CD3D", "CD8A", "MS4A1"])
        >>> processor.gene_names(batch["input_ids"][0])
        ['<cls>', 'CD3D', 'MS4A1']
        >>> batch["values"]
        tensor([[0., 1., 2.]])
    """

    # Settings are not keyword-only, because ProcessorMixin.from_pretrained reads the names of positional arguments.
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
        modalities: Sequence[str] | None = None,
    ) -> None:
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.n_bins, self.max_tokens = n_bins, max_tokens
        self.cls_value, self.pad_value, self.mask_value = cls_value, pad_value, mask_value
        self.ties, self.input_style = ties, input_style
        self.target_sum, self.include_zeros = target_sum, include_zeros
        self.symbols = None if symbols is None else list(symbols)
        self._check_settings()
        self._vocab = tokenizer.get_vocab()  # kept, because the library builds this dictionary at every call
        check_vocab(self._vocab)
        self.modalities = None if modalities is None else list(modalities)
        self._modality_of_gene: Int64Array | None = None
        if self.modalities is not None:
            check_modalities(self.genes, self.modalities)
            self._modality_of_gene = self.modality_ids(self.modality_names)
        self._gene_of = map_symbols(self.genes, self.symbols) if self.symbols else {}
        # The last read-only `gene_ids` that passed `check_gene_ids`, and its result
        self._checked: tuple[Int64Array | None, npt.NDArray[np.bool_] | None] = None, None

    @classmethod
    def from_genes(cls, genes: Sequence[str], **settings: Any) -> "ScGPTProcessor":
        """Create a processor whose vocabulary is the genes in this order, then `<pad>`, `<cls>` and `<eoc>`.

        Args:
            genes: names of the genes, preferably Ensembl ids.
            **settings: settings of the processor, such as `n_bins`.
        """
        return cls.from_vocab(vocab_of_genes(genes), **settings)

    @classmethod
    def from_vocab(cls, vocab: Mapping[str, int], **settings: Any) -> "ScGPTProcessor":
        """Create a processor with the ids of a published `vocab.json`. Special tokens may have any id.

        Args:
            vocab: id of each gene and special token.
            **settings: settings of the processor, such as `n_bins`.
        """
        return cls(build_tokenizer(vocab), **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "ScGPTProcessor":
        """Load the processor from a folder or from a repository of the Hub.

        Args:
            pretrained_model_name_or_path: path of the folder, or id of the repository.
            *args: positional arguments of `ProcessorMixin.from_pretrained`; prefer keywords.
            **kwargs: settings to override, and keywords of the library such as `revision`, `token` or `cache_dir`.

        Raises:
            OSError: the folder or repository does not exist, or has no processor.
            ValueError: the model saved there has another vocabulary, or a setting is unknown or out of range.
        """
        processor: ScGPTProcessor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        try:
            model, _ = PreTrainedConfig.get_config_dict(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in _FILE_KEYWORDS & kwargs.keys()}
            )
        except OSError:  # a processor saved without a model
            return processor
        processor._check_model(model, pretrained_model_name_or_path)
        return processor

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the saved settings and return them with the unused keywords. `from_pretrained` calls this method.

        Raises:
            ValueError: a saved setting is unknown. The library would ignore it, which could change the tokens.
        """
        saved, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        known = {*signature(cls).parameters, "auto_map", "processor_class"}
        if unknown := sorted(saved.keys() - known):
            raise ValueError(
                f"the processor in {pretrained_model_name_or_path} has unknown settings: {unknown}; "
                "a newer version of scgpt_hf may have saved it"
            )
        return saved, unused

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, including special tokens; the same as `ScGPTConfig.vocab_size`."""
        return len(self._vocab)

    @property
    def pad_id(self) -> int:
        """Vocabulary id of `<pad>`; the same as `ScGPTConfig.pad_token_id`."""
        return self._vocab[PAD]

    @property
    def cls_id(self) -> int:
        """Vocabulary id of `<cls>`."""
        return self._vocab[CLS]

    @property
    def genes(self) -> list[str]:
        """Genes of the vocabulary by ascending id, without special tokens."""
        return sorted(self._vocab.keys() - {PAD, CLS, EOC}, key=self._vocab.__getitem__)

    @property
    def modality_names(self) -> list[str]:
        """Names of the modalities as `ScGPTConfig.modalities` lists them; empty if there is only one."""
        return [*dict.fromkeys(self.modalities), PAD, CLS] if self.modalities else []

    def modality_ids(self, names: Sequence[str]) -> Int64Array:
        """Return the position of each token's modality in `names`, for all vocabulary ids; int64 (vocabulary,).

        Args:
            names: names of the modalities, with `<pad>` and `<cls>` for special tokens.

        Raises:
            ValueError: the processor has no modalities, or `names` lacks one.
        """
        if self.modalities is None or (absent := {*self.modalities, PAD, CLS} - set(names)):
            found = "no modalities" if self.modalities is None else f"modalities {sorted(absent)} besides these"
            raise ValueError(
                f"the model has the modalities {list(names)}, the processor has {found}; load both from one folder"
            )
        ids = np.full(self.vocab_size, names.index(PAD), np.int64)
        ids[self.cls_id] = names.index(CLS)
        ids[[self._vocab[gene] for gene in self.genes]] = [names.index(modality) for modality in self.modalities]
        return ids

    def resolve_symbols(self, names: Iterable[str]) -> list[str]:
        """Replace each name that is a symbol of a gene by the gene's name in the vocabulary; keep other names."""
        return [self._gene_of.get(name, name) for name in map(str, names)]

    def gene_names(self, input_ids: Sequence[int] | npt.NDArray[np.integer]) -> list[str]:
        """Return the name of the gene or special token of each id."""
        names: list[str] = self.tokenizer.convert_ids_to_tokens([int(index) for index in input_ids])
        return names

    def match_genes(self, genes: Sequence[str]) -> Int64Array:
        """Return the vocabulary id of each gene, −1 where unknown; int64 (genes,).

        Args:
            genes: names of the columns of the data. The version of an Ensembl id is ignored. Columns of one gene have
                the same id; `tokenize` sums their counts.

        Raises:
            ValueError: too few genes are known; see `vocabulary_scgpt.match_genes`.
        """
        return match_genes(self._vocab, genes)

    def count_known(self, counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
        """Count the genes of the vocabulary that each cell expresses, int64 (cells,); `tokenize` drops cells with 0."""
        return count_known_genes(*self._prepare(counts, gene_ids))

    def sum_repeated_genes(self, counts: SparseCounts, gene_ids: Int64Array) -> SparseCounts:
        """Return counts in which no cell has a gene of the vocabulary in two columns: their counts are summed.

        `tokenize` and `count_known` do so themselves.

        Args:
            counts: see `tokenize`. Shape (cells, genes).
            gene_ids: see `tokenize`. Shape (genes,).
        """
        return self._prepare(counts, gene_ids)[0]

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
            counts: raw counts: a CSR matrix with sorted columns, or any object with its `data`, `indices`, `indptr`
                and `shape`. Shape (cells, genes).
            gene_ids: ids from `match_genes`, checked at every call, or once if the array is read-only. The counts of
                columns with the same id are summed. Shape (genes,).
            cell_ids: id of each cell, int64 (cells,). Ties, sampling and masks of a cell depend on it. By default the
                id is a hash of the cell's genes and counts (`content_ids`), so a cell gives the same tokens in any
                file, order or batch.
            seed: seed of ties and sampling.
            epoch: epoch of ties and sampling.
            ties: overrides the processor's `ties` in this call.
            max_tokens: overrides the processor's `max_tokens` in this call.

        Raises:
            ValueError: a value is negative or not finite, shapes disagree, columns are unsorted, or `ties` or
                `max_tokens` is out of range.
        """
        counts, gene_ids = self._prepare(counts, gene_ids)
        cell_ids = content_ids(counts, gene_ids) if cell_ids is None else np.asarray(cell_ids, np.int64)
        if cell_ids.shape != counts.shape[:1]:
            raise ValueError(
                f"found {cell_ids.shape} cell ids for {counts.shape[0]:,} cells; pass one per cell, or None"
            )
        settings = self._token_settings(
            self.ties if ties is None else ties, self.max_tokens if max_tokens is None else max_tokens
        )
        keys: Any = {"cell_ids": cell_ids, "seed": seed, "epoch": epoch}
        if self._modality_of_gene is None:
            tokens = tokenize_counts(self._normalize(counts), gene_ids, settings, **keys)
        else:
            tokens = tokenize_modalities(counts, gene_ids, self._modality_of_gene, settings, self._normalize, **keys)
        n_dropped = counts.shape[0] - len(tokens)
        logger.debug("dropped %d of %d cells: they express no gene of the vocabulary", n_dropped, counts.shape[0])
        return tokens

    def thin(
        self,
        counts: SparseCounts,
        gene_ids: Int64Array,
        *,
        cell_ids: Int64Array,
        seed: int,
        epoch: int,
        keep: Sequence[float],
    ) -> SparseCounts:
        """Return counts as if each cell had been sequenced less deeply, to tokenize while training.

        Args:
            counts: see `tokenize`; integers.
            gene_ids: see `tokenize`.
            cell_ids: see `tokenize`.
            seed: seed of the run; `tokenize_view` removes other molecules for it.
            epoch: epoch of the cells.
            keep: shares of the counts to keep, in (0, 1]; one of them is drawn for each cell.

        Returns:
            Counts of the same cells. A cell of which no known gene would be left keeps all counts.
        """
        counts, gene_ids = self._prepare(counts, gene_ids)
        return thin_counts(counts, gene_ids, keep, cell_ids=cell_ids, seed=input_seed(seed), epoch=epoch)

    def tokenize_view(
        self,
        counts: SparseCounts,
        gene_ids: Int64Array,
        *,
        cell_ids: Int64Array,
        seed: int,
        epoch: int,
        keep: Sequence[float],
        max_tokens: int | None = None,
    ) -> Tokens:
        """Tokenize a second view of every cell that expresses a known gene: thinned counts, other ties, other genes.

        Args:
            counts: see `tokenize`; integers.
            gene_ids: see `tokenize`.
            cell_ids: see `tokenize`.
            seed: seed of the run; the view differs from what `tokenize` returns for it.
            epoch: epoch of the view.
            keep: shares of the counts to keep, in (0, 1]; one of them is drawn for each cell.
            max_tokens: see `tokenize`.

        Returns:
            Tokens of the same cells as those of `tokenize`.
        """
        counts, gene_ids = self._prepare(counts, gene_ids)
        thinned = thin_counts(counts, gene_ids, keep, cell_ids=cell_ids, seed=seed, epoch=epoch)
        options: Any = {"seed": view_seed(seed), "epoch": epoch, "max_tokens": max_tokens}
        return self.tokenize(thinned, gene_ids, cell_ids=cell_ids, **options)

    def mask(self, tokens: Tokens, *, seed: int, epoch: int, ratios: Sequence[float] = (0.25, 0.5, 0.75)) -> Tokens:
        """Mask a share of each cell's genes and set their labels.

        Args:
            tokens: tokens that `tokenize` has returned.
            seed: seed of the masks.
            epoch: epoch of the masks.
            ratios: shares in [0, 1]; one of them is drawn for each cell.

        Returns:
            New tokens; the input is not changed.

        Source: the ratios are those of scGPT's pretraining, Cui et al. 2024.
        """
        ratio_of_cell = sample_mask_ratios(tokens.cell_ids, ratios, seed=seed, epoch=epoch)
        return mask_tokens(tokens, ratio_of_cell, seed=seed, epoch=epoch, mask_value=self.mask_value)

    def __call__(
        self,
        counts: Any,
        genes: Sequence[str] | None = None,
        *,
        cell_ids: Int64Array | None = None,
        seed: int = 0,
        epoch: int = 0,
        mask_ratios: Sequence[float] | None = None,
        queries: bool = False,
        packed: bool = False,
        drop_empty: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Create the batch that a model reads: `model(**processor(adata))`.

        Args:
            counts: an AnnData, or raw counts, sparse or dense. Shape (cells, genes).
            genes: names of the columns. By default they are read from the AnnData: from `var_names` or the column of
                `var` with most known names.
            cell_ids: id of each cell; see `tokenize`.
            seed: seed of ties, sampling and masks.
            epoch: epoch of ties, sampling and masks.
            mask_ratios: mask genes and return labels, as in pretraining; see `mask`. By default nothing is masked.
            queries: make masked genes queries, for models with `objective="generative"`; needs `mask_ratios`.
            packed: return all cells in one row without padding, instead of one padded row per cell.
            drop_empty: drop cells that express no known gene, instead of raising.
            return_tensors: "pt" or None; both return PyTorch tensors.

        Returns:
            Tensors as `packing_scgpt.pad` or `packing_scgpt.pack` describe them.

        Raises:
            ValueError: gene names are missing, cells express no known gene, or an error of `tokenize` or `match_genes`.

        Example:
            >>> batch = processor(adata[:8], mask_ratios=[0.5], packed=True)
            >>> loss = AutoModelForPreTraining.from_pretrained(path)(**batch).loss
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(
                f"return_tensors={return_tensors!r}: batches are PyTorch tensors; leave it out, or pass 'pt'"
            )
        if hasattr(counts, "var_names"):
            genes = choose_gene_names(counts, self._vocab, self._gene_of) if genes is None else genes
            counts = counts.X
        if genes is None:
            raise ValueError("gene names are missing: pass genes=[...], one name per column, or an AnnData")
        matrix, gene_ids = to_csr(counts), self.match_genes(self.resolve_symbols(genes))
        tokens = self.tokenize(matrix, gene_ids, cell_ids=cell_ids, seed=seed, epoch=epoch)
        if len(tokens) < matrix.shape[0] and not drop_empty:
            empty = np.flatnonzero(self.count_known(matrix, gene_ids) == 0)
            raise ValueError(
                f"{len(empty):,} of {matrix.shape[0]:,} cells express no gene of the vocabulary, e.g. rows "
                f"{empty[:5].tolist()}; remove them, or pass drop_empty=True"
            )
        if mask_ratios is not None:
            tokens = self.mask(tokens, seed=seed, epoch=epoch, ratios=mask_ratios)
        if packed:
            return BatchFeature(pack(tokens, queries=queries))
        return BatchFeature(pad(tokens, pad_id=self.pad_id, pad_value=self.pad_value, queries=queries))

    def _normalize(self, counts: SparseCounts) -> SparseCounts:
        return log_normalize(counts, self.target_sum) if self.input_style == "log1p" else counts

    def _token_settings(self, ties: Ties, max_tokens: int) -> TokenSettings:
        _require_choice("ties", ties, tuple(TIE_CODES))
        _require_integer("max_tokens", max_tokens, 2)
        n_bins = self.n_bins if self.input_style == "binned" else None
        return TokenSettings(self.vocab_size, self.cls_id, self.cls_value, max_tokens, n_bins, ties, self.include_zeros)

    def _prepare(self, counts: SparseCounts, gene_ids: Int64Array) -> tuple[SparseCounts, Int64Array]:
        """Return validated counts in which no cell has a gene twice, and validated ids."""
        counts, gene_ids = validate_counts(counts), np.asarray(gene_ids, np.int64)
        # Training tokenizes a few hundred cells per call, and checking 60,000 ids would take longer than that. An array
        # that cannot be changed is therefore checked once.
        read_only = gene_ids.base is None and not gene_ids.flags.writeable
        checked, repeated = self._checked
        if not read_only or gene_ids is not checked or gene_ids.shape != counts.shape[1:]:
            repeated = check_gene_ids(gene_ids, counts.shape[1], self.vocab_size)
            self._checked = (gene_ids, repeated) if read_only else (None, None)
        if repeated is not None:
            counts = sum_repeated_genes(counts, gene_ids, repeated)
        return counts, gene_ids

    def _check_model(self, config: Mapping[str, Any], where: Any) -> None:
        """Check that the model has the same vocabulary and bins, as far as its config records them."""
        own = {"vocab_size": self.vocab_size, "pad_token_id": self.pad_id}
        if config.get("value_encoder") == "category":  # its table has one row per bin
            own["n_bins"] = self.n_bins
        if wrong := {name: config[name] for name in own if config.get(name) not in (None, own[name])}:
            raise ValueError(
                f"the processor in {where} has {own}, but the model there has {wrong}; copy tokenizer.json, "
                "processor_config.json and config.json from the same folder"
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
        raise ValueError(f"{name} must be an integer ≥ {least}, found {found!r}")


ScGPTProcessor.register_for_auto_class("AutoProcessor")  # type: ignore[no-untyped-call]
