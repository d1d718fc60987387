"""Embed a whole Census: one Parquet file for each shard of its cells, written by any number of jobs.

`inference.py` computes the vectors. `cells/jobs/shard_jobs.py` divides the cells into shards, records what is finished
and completes the folder; `cells/jobs/cluster.py` does the same on Ray.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from scgpt_hf.analysis.embed import describe_embedding
from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array
from scgpt_hf.cells.cache.format import encode_column, obs_type
from scgpt_hf.cells.jobs.records import ShardError, ShardRecord, ShardsIdentity, hash_cells
from scgpt_hf.cells.jobs.shard_jobs import CELLS_PER_SHARD, ShardJobs, divide_cells, write_shards
from scgpt_hf.cells.obs import require_columns
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.inference import EmbedSettings, Float32Array, embed_batches
from scgpt_hf.packaged_models import DEFAULT_MODEL
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

CELL_ID, EMBEDDING = "soma_joinid", "embedding"  # columns of the files; those of obs are between them
_FORMAT = 1
_CELLS_PER_WINDOW = 8 * CHUNK_SIZE  # read together, so that the threads of a remote source have enough to do
# Entries of the config and of the processor that do not change a vector.
_NOT_HASHED = ("transformers_version", "architectures", "auto_map", "_name_or_path")


@dataclass(frozen=True)
class EmbeddingIdentity(ShardsIdentity):
    """Everything that determines the embeddings in a folder.

    Attributes:
        embedding: hash of the encoder and the processor, version of this package, and the settings.
    """

    embedding: dict[str, Any]


@dataclass(frozen=True, eq=False)
class EmbeddingJobs(ShardJobs):
    """The plan of a folder of embeddings; see `ShardJobs` for the other members.

    Attributes:
        model: the model.
        processor: its processor.
        gene_match: the genes of the source in the vocabulary.
        device: where the model runs; None takes a GPU if the worker has one.
    """

    model: PreTrainedModel
    processor: ScGPTProcessor
    gene_match: GeneMatch
    device: str | None

    MANIFEST, RECORDS, SUFFIX, ACTION = "_embeddings.json", ".embedding_jobs", "parquet", "embedding"

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the files."""
        columns, dtype = self.identity.obs_columns, np.dtype(self._settings["dtype"])
        obs = self.source.read(self.cell_ids[:1], columns).obs  # one cell shows the types of all
        vector = pa.list_(pa.from_numpy_dtype(dtype), self.model.config.hidden_size)
        kept = [(name, obs_type(obs[name])) for name in columns]
        return pa.schema([(CELL_ID, pa.int64()), *kept, (EMBEDDING, vector)])

    def write(
        self,
        shards: Iterable[int],
        *,
        rewrite: bool = False,
        on_progress: Callable[[int], object] = lambda n_cells: None,
    ) -> None:
        """Embed the cells of shards; see `ShardJobs.write`."""
        for shard in shards:
            if self.verify(shard, rewrite):
                on_progress(len(self.cells(shard)))
            else:
                table = self._embed(self.cells(shard), on_progress)
                self.save(shard, partial(_write_parquet, table, self.identity.obs_columns))

    def complete(self, records: list[ShardRecord]) -> None:
        """Write the manifest, with the report that `embed_anndata` writes to `uns`."""
        settings: Any = {"normalize": self._settings["normalize"]}
        report = describe_embedding(self.source, self.gene_match, self.model, self.processor, settings)
        content = {
            "format": _FORMAT,
            **asdict(self.identity),
            "report": report,
            "shards": [asdict(record) for record in records],
        }
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(self.folder / self.MANIFEST, text, temporary_folder=self.records)

    def records_in_manifest(self) -> tuple[ShardsIdentity, list[ShardRecord]]:
        """Load the manifest.

        Raises:
            ShardError: it is malformed.
        """
        path = self.folder / self.MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = [ShardRecord(**shard) for shard in content.pop("shards")]
            del content["format"], content["report"]
            return EmbeddingIdentity(**content), shards
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ShardError(f"{path} is malformed ({error}); embed the cells again, into another folder") from error

    @property
    def _settings(self) -> dict[str, Any]:
        identity = self.identity
        assert isinstance(identity, EmbeddingIdentity)
        return identity.embedding

    @cached_property
    def _ready_model(self) -> PreTrainedModel:
        """The model on its device, once in each process."""
        self.model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return self.model

    def _embed(self, cell_ids: Int64Array, on_progress: Callable[[int], object]) -> pa.Table:
        """Return the cells of a shard with their vectors; NaN for cells that express no known gene."""
        source = _ObsKeeper(self.source, self.identity.obs_columns)
        vectors = np.full((len(cell_ids), self.model.config.hidden_size), np.nan, np.float32)
        batches = embed_batches(
            source,
            cell_ids,
            self._ready_model,
            self.processor,
            gene_match=self.gene_match,
            cells_per_window=_CELLS_PER_WINDOW,
            progress=False,
            **{name: self._settings[name] for name in ("normalize", "batch_size", "empty")},
        )
        for positions, rows in batches:
            vectors[positions] = rows
            on_progress(len(positions))
        on_progress(int(np.isnan(vectors[:, 0]).sum()))
        return _make_table(cell_ids, source.kept(), vectors, self.schema)


class _ObsKeeper:
    """A source that keeps obs columns of the cells that are read from it; see `CellSource` for the members."""

    def __init__(self, source: CellSource, columns: Sequence[str]) -> None:
        self.genes, self.obs_columns, self.chunk_size = source.genes, source.obs_columns, source.chunk_size
        self.obs, self.presence, self.describe = source.obs, source.presence, source.describe
        self._source, self._columns = source, list(columns)
        self._parts: list[pd.DataFrame] = []

    @property
    def cells_at_once(self) -> int:
        """Number of cells that the source reads at the same time."""
        return self._source.cells_at_once

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return the cells, and keep their obs."""
        block = self._source.read(cell_ids, list(dict.fromkeys([*columns, *self._columns])))
        self._parts.append(block.obs[self._columns])
        return block.with_obs(columns)

    def kept(self) -> list[pd.DataFrame]:
        """Return the obs of all windows that were read, by ascending cell id; each has shape (cells, columns)."""
        return sorted((part.sort_index() for part in self._parts), key=lambda part: int(part.index[0]))


def _make_table(
    cell_ids: Int64Array, obs: Sequence[pd.DataFrame], vectors: Float32Array, schema: pa.Schema
) -> pa.Table:
    """Return the table of a shard."""
    # A window may lack categories that another one has, so each is encoded by itself.
    columns = [
        pa.chunked_array([encode_column(part[field.name], field.type) for part in obs], field.type)
        for field in list(schema)[1:-1]
    ]
    kind = schema.field(EMBEDDING).type
    flat = pa.array(vectors.astype(kind.value_type.to_pandas_dtype(), copy=False).ravel())
    vector = pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.table([pa.array(cell_ids), *columns, vector], schema=schema)


def _write_parquet(table: pa.Table, obs_columns: Sequence[str], file: Any) -> None:
    """Write a table to an empty file. Only obs has values that repeat."""
    pq.write_table(table.combine_chunks(), file, use_dictionary=list(obs_columns))


def hash_encoder(model: PreTrainedModel, processor: ScGPTProcessor) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over all that turns counts into an embedding.

    These are the weights of the encoder, its config, the vocabulary and the settings of the processor. The name and
    the place of the model are not hashed.
    """
    parts = (model.config.to_dict(), processor.to_dict())
    settings = [{name: value for name, value in part.items() if name not in _NOT_HASHED} for part in parts]
    settings.append({"genes": list(processor.genes)})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.base_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def plan_embeddings(
    source: CellSource,
    folder: str | Path,
    model: PreTrainedModel | str | Path = DEFAULT_MODEL,
    processor: ScGPTProcessor | None = None,
    *,
    device: str | None = None,
    columns: Sequence[str] = (),
    dtype: Literal["float32", "float16"] = "float32",
    cells_per_shard: int = CELLS_PER_SHARD,
    **settings: Unpack[EmbedSettings],
) -> EmbeddingJobs:
    """Divide cells into the shards of a folder of embeddings, without writing anything.

    Args:
        source: the source of the cells.
        folder: see `embed_census`.
        model: see `embed_census`.
        processor: see `embed_census`.
        device: where the model runs; by default a GPU if there is one, or where a loaded model is.
        columns: see `embed_census`.
        dtype: see `embed_census`.
        cells_per_shard: see `embed_census`.
        settings: see `EmbedSettings`.

    Raises:
        OSError, ValueError: see `embed_census`.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"expected dtype 'float32' or 'float16', found {dtype!r}")
    if taken := sorted({CELL_ID, EMBEDDING} & set(columns)):
        raise ValueError(f"{taken} are other columns of the files; rename these obs columns, or omit them")
    require_columns(columns, source.obs_columns)
    if isinstance(model, PreTrainedModel):
        device = device or str(model.device)
    model, processor = load_model(model, processor, device="cpu")  # workers move it to their own device
    genes = match_source_genes(source.genes, processor)
    cell_ids = source.obs().index.to_numpy(np.int64)
    bounds = divide_cells(cell_ids, cells_per_shard)
    chosen = {
        "encoder": hash_encoder(model, processor),
        "scgpt_hf": version("scgpt_hf"),
        "dtype": dtype,
        "normalize": settings.get("normalize", True),
        "batch_size": settings.get("batch_size", 64),
        "empty": settings.get("empty", "raise"),
    }
    identity = EmbeddingIdentity(
        source.describe(), len(cell_ids), hash_cells(cell_ids), list(columns), cells_per_shard, chosen
    )
    return EmbeddingJobs(source, Path(folder), cell_ids, identity, bounds, model, processor, genes, device)


def embed_census(
    address: Address,
    out: str | Path,
    model: PreTrainedModel | str | Path = DEFAULT_MODEL,
    processor: ScGPTProcessor | None = None,
    *,
    obs_filter: str | None = None,
    layer: str | None = None,
    primary_only: bool = True,
    columns: Sequence[str] = (),
    dtype: Literal["float32", "float16"] = "float32",
    job: tuple[int, int] = (0, 1),
    cells_per_shard: int = CELLS_PER_SHARD,
    rewrite: bool = False,
    **settings: Unpack[EmbedSettings],
) -> bool:
    """Embed the cells of a Census, a local SOMA or a cache and write the vectors to a folder of Parquet files.

    Memory holds one file. You can call it again after an interruption, or from many jobs at the same time, also on
    several machines that share the folder: files that exist are verified, not written again.

    The columns are `soma_joinid` (int64, ascending; a row number, if the data are no SOMA), those of `columns`,
    and `embedding` (a list of fixed length; NaN for empty cells with `empty="nan"`). `pandas.read_parquet(out)` and
    `datasets.load_dataset("parquet", data_files=f"{out}/*.parquet")` open them. `_embeddings.json`, which completes the
    folder, records the model, the settings and the hash of each file.

    The cells of a file and its batches do not depend on the number of jobs. So the bytes are the same for any number of
    them, if the machines have the same kind of processor; other ones may round differently.

    Args:
        address: the cells, see `open_source`.
        out: the folder; created if it does not exist.
        model: see `embed_anndata`.
        processor: see `embed_anndata`.
        obs_filter: see `open_source`.
        layer: see `open_source`.
        primary_only: see `open_source`.
        columns: obs columns to write beside the vectors.
        dtype: type of the numbers of the vectors. float16 has a relative error of up to 5e-4 and takes half the space.
        job: (i, n) writes every n-th file, starting with file i.
        cells_per_shard: least number of cells of a file.
        rewrite: write corrupt files again instead of raising.
        settings: see `EmbedSettings`.

    Returns:
        Whether the folder is complete.

    Raises:
        FileExistsError: the folder holds other files.
        OSError: the cells cannot be read, or a file cannot be written.
        ShardError: the folder holds embeddings of other cells, by another model or with other settings; or a file is
            corrupt.
        ValueError: see `open_source` and `embed_anndata`; or there is no such job.

    Example:
        >>> embed_census("census://2025-11-08/homo_sapiens", "embedded", columns=["cell_type"])  # doctest: +SKIP
        True
        >>> embed_census("cells.h5ad", "embedded", "runs/demo/best_model", progress=False)
        True
        >>> list(pd.read_parquet("embedded"))
        ['soma_joinid', 'embedding']
    """
    source = open_source(address, obs_filter=obs_filter, layer=layer, primary_only=primary_only)
    jobs = plan_embeddings(
        source, out, model, processor, columns=columns, dtype=dtype, cells_per_shard=cells_per_shard, **settings
    )
    return write_shards(jobs, job, rewrite=rewrite, progress=settings.get("progress", True))
