"""Test that a model runs over the batches of the pipeline, and is left as it was."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.inference import inference_config, iterate_outputs
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTModel
from scgpt_hf.pipeline.stream import Batch, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

N_CELLS, GENES = 40, [f"ENSG{number:011}" for number in range(30)]
EMPTY = [3, 8, 9, 10, 11]  # with 4 cells in a batch, all cells of the third one
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def source() -> CellSource:
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, len(GENES))).astype(np.float32)
    counts[:, 0] = 1
    counts[EMPTY] = 0
    obs = pd.DataFrame({"assay": ["v2", "v3"] * (N_CELLS // 2)}, index=[f"cell{number}" for number in range(N_CELLS)])
    return open_source(AnnData(csr_matrix(counts), obs, pd.DataFrame(index=GENES)))


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(GENES, max_tokens=10)  # fewer tokens than most cells have genes


def model_for(processor: ScGPTProcessor, **fields: Any) -> ScGPTModel:
    return ScGPTModel(ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **SIZES, **fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"cell_pooling": "average"}, {"input_norm": "domain", "domains": ["v2", "v3"], "batch_key": "assay"}],
    ids=["packed", "padded", "with domains"],
)
def test_a_model_gets_the_batches_of_a_stream_with_the_same_plan_and_config(
    source: CellSource, processor: ScGPTProcessor, fields: dict[str, Any]
) -> None:
    model, seen = model_for(processor, n_domains=2, **fields), []

    def record(batch: Batch) -> torch.Tensor:
        seen.append(dict(batch))
        return torch.zeros(1)

    cell_ids = np.setdiff1d(np.arange(N_CELLS), [0, 17])
    positions = [
        positions
        for positions, _ in iterate_outputs(
            record, source, cell_ids, model, processor, batch_size=4, empty="nan", progress=False
        )
    ]
    plan = plan_validation(cell_ids, 4, cells_per_window=CHUNK_SIZE)
    expected = list(stream_cells(source, [plan], processor, inference_config(model.config, "nan")))
    assert len(seen) == len(expected) > 5
    for batch, own, other in zip(seen, positions, expected, strict=True):
        assert cell_ids[own].tolist() == other.pop("cell_ids").tolist()
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
    assert cell_ids[np.concatenate(positions)].tolist() == np.setdiff1d(cell_ids, EMPTY).tolist()


def test_cells_without_a_known_gene_raise_by_default(source: CellSource, processor: ScGPTProcessor) -> None:
    batches = iterate_outputs(
        lambda batch: batch["input_ids"], source, np.arange(N_CELLS), model_for(processor), processor, progress=False
    )
    with pytest.raises(ValueError, match=r"5 of the cells 0 to 39 .*first ids: \[3, 8, 9, 10, 11\]"):
        list(batches)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_in_evaluation_mode_while_it_runs_even_if_the_caller_stops_early(
    source: CellSource, processor: ScGPTProcessor, training: bool
) -> None:
    model, modes = model_for(processor).train(training), []

    def record(batch: Batch) -> torch.Tensor:
        modes.append(model.training)
        return torch.zeros(1)

    batches = iterate_outputs(record, source, np.arange(3), model, processor, batch_size=1, progress=False)
    next(batches)
    batches.close()
    assert modes == [False]
    assert model.training is training


def test_no_cells_give_no_batches(source: CellSource, processor: ScGPTProcessor) -> None:
    no_cells = np.empty(0, np.int64)
    assert not list(iterate_outputs(lambda batch: batch["values"], source, no_cells, model_for(processor), processor))
