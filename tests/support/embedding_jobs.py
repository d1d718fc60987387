"""A small model, cells and jobs that embed them, also for tests that run in another process."""

from typing import Any

import torch

from scgpt_hf.analysis.embed_census import EmbeddingJobs, plan_embeddings
from scgpt_hf.cells.jobs.shard_jobs import write_shards
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTModel
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.caches import SHARD, make_cells

SETTINGS: dict[str, Any] = {"columns": ["donor_id"], "empty": "nan", "batch_size": 200, "device": "cpu", **SHARD}


def embedding_model(seed: int = 0) -> tuple[ScGPTModel, ScGPTProcessor]:
    """Return a model of ten of the twelve genes of `make_cells`."""
    processor = ScGPTProcessor.from_genes([f"ENSG{gene:011d}" for gene in range(10)], max_tokens=8)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    return ScGPTModel(config).eval(), processor


def embedded_cells() -> CellSource:
    """Return 5,000 cells, which make three shards. Some express no gene of the model."""
    return open_source(make_cells(n_cells=5000))


def plan_jobs(folder: str) -> EmbeddingJobs:
    """Return the plan to embed these cells."""
    return plan_embeddings(embedded_cells(), folder, *embedding_model(), **SETTINGS)


def write_job(folder: str, job: tuple[int, int]) -> None:
    """Write the files of one job."""
    write_shards(plan_jobs(folder), job)
