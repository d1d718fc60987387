"""Generate cells from an embedding or a prompt: compare with direct forward passes, and check rounds and errors."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.generate import generate_cells
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

IDS = [f"ENSG{number:011}" for number in range(30)]
SYMBOLS = [f"GENE{number}" for number in range(30)]
ASKED = ["GENE3", IDS[7], "GENE20", IDS[21], IDS[25]]
ASKED_IDS = [3, 7, 20, 21, 25]


def make_processor(**settings: Any) -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(IDS, n_bins=11, max_tokens=20, symbols=SYMBOLS, ties="midpoint", **settings)


def make_model(processor: ScGPTProcessor, **settings: Any) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {"objective": "generative", "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}} | settings
    config = ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, n_bins=11, dropout=0.5, **sizes, **settings
    )
    return ScGPTForPreTraining(config)


def prompt_cells(n_cells: int = 6) -> AnnData:
    counts = np.random.default_rng(0).poisson(0.7, (n_cells, 30)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame({"well": list("ab") * (n_cells // 2)}, index=[f"cell{n}" for n in range(n_cells)])
    return AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame({"feature_name": SYMBOLS}, index=IDS))


PROCESSOR = make_processor()
EMBEDDING = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float32)


@torch.inference_mode()
def direct(model: Any, cell: AnnData, gene: int, vector: Any, fixed: dict[int, float]) -> tuple[float, float]:
    """Ask for one gene of one cell, padded, with the genes of the prompt and the fixed ones; return GEP and GEPC."""
    batch = PROCESSOR(cell, drop_empty=True) if cell is not None else None
    ids, values = ([31], [0.0]) if batch is None else (batch[k][0].tolist() for k in ("input_ids", "values"))
    known = {i: v for i, v in zip(ids, values, strict=True) if i not in ASKED_IDS} | fixed
    encoded = model.eval().scgpt(
        torch.tensor([[*known, gene]]),
        torch.tensor([[*known.values(), 5.0]]),
        queries=torch.tensor([[False] * len(known) + [True]]),
        input_cell_embedding=None if vector is None else torch.from_numpy(vector)[None],
    )
    gep, _ = model.expression_head(encoded.last_hidden_state[0, -1:])
    gepc, _ = model.cell_to_gene_head(encoded.cell_embedding, encoded.gene_embedding[0, -1:])
    return gep.item(), gepc.item()


@pytest.mark.parametrize("source", ["prompt", "embedding", "both"])
def test_one_round_predicts_each_gene_as_if_it_were_the_only_one(source: str) -> None:
    model = make_model(PROCESSOR)
    prompt = prompt_cells() if source != "embedding" else None
    vectors = EMBEDDING if source != "prompt" else None
    options: Any = {"cell_embedding": vectors, "prompt": prompt, "progress": False}
    found = generate_cells(model, ASKED, PROCESSOR, **options, batch_size=4)
    assert model.training
    assert len(found) == 6
    for cell in (0, 5):
        own = None if prompt is None else prompt[cell : cell + 1]
        vector = None if vectors is None else vectors[cell]
        for column, gene in enumerate(ASKED_IDS):
            expected = np.clip(direct(model, own, gene, vector, {})[0], 0, 10)
            assert found.X[cell, column] == pytest.approx(expected, abs=1e-5)
    assert list(found.var_names) == ASKED
    assert found.uns["scgpt_generated"]["unit"] == "bins"
    if prompt is not None:
        assert found.obs.equals(prompt.obs)
    assert (found.layers["round"] == 1).all()


def test_in_several_rounds_the_most_certain_genes_are_fixed_first_and_the_others_see_them() -> None:
    model, prompt = make_model(PROCESSOR), prompt_cells()
    found = generate_cells(model, ASKED, PROCESSOR, prompt=prompt, rounds=3, progress=False)
    for cell in (0, 3):
        fixed: dict[int, float] = {}
        rounds = dict(zip(ASKED_IDS, found.layers["round"][cell], strict=True))
        assert sorted(rounds.values()) == [1, 1, 2, 2, 3]
        for number in (1, 2, 3):
            predicted = {g: direct(model, prompt[cell : cell + 1], g, None, fixed) for g in ASKED_IDS if g not in fixed}
            doubt = {gene: abs(gep - gepc) for gene, (gep, gepc) in predicted.items()}
            chosen = [gene for gene in predicted if rounds[gene] == number]
            others = [doubt[gene] for gene in predicted if rounds[gene] > number]
            assert max(doubt[gene] for gene in chosen) <= min(others, default=np.inf)
            for gene in chosen:
                value = float(np.clip(predicted[gene][0], 0, 10))
                assert found.X[cell, ASKED_IDS.index(gene)] == pytest.approx(value, abs=1e-4)
            fixed |= {gene: float(found.X[cell, ASKED_IDS.index(gene)]) for gene in chosen}


def test_neither_batches_of_cells_nor_of_genes_change_the_result() -> None:
    model = make_model(PROCESSOR)
    everything: Any = {"cell_embedding": EMBEDDING, "progress": False}
    found = generate_cells(model, IDS, PROCESSOR, **everything)  # more genes than max_tokens
    other = make_processor()
    other.max_tokens = 100
    again = generate_cells(model, IDS, other, **everything, batch_size=1)
    np.testing.assert_allclose(found.X, again.X, atol=1e-5)


def test_counts_of_the_requested_genes_are_not_read() -> None:
    model, prompt = make_model(PROCESSOR), prompt_cells()
    changed = prompt.copy()
    matrix = changed.X.toarray()
    matrix[:, ASKED_IDS] = (matrix[:, ASKED_IDS] > 0) * 50  # of expressed genes, so that the other bins stay
    changed.X = csr_matrix(matrix)
    keep = [gene for gene in range(30) if gene not in ASKED_IDS]
    alone = prompt[:, keep].copy()
    one, other = (generate_cells(model, ASKED, PROCESSOR, prompt=cells, progress=False) for cells in (prompt, alone))
    assert one.shape == other.shape
    assert generate_cells(model, ASKED, PROCESSOR, prompt=changed, progress=False).shape == one.shape


def test_doubt_is_that_of_the_zero_head_where_a_model_has_one() -> None:
    settings = {"explicit_zero_prob": True, "loss_weights": {"gep": 1.0, "gep_zero": 1.0}}
    found = generate_cells(
        make_model(PROCESSOR, **settings), ASKED, PROCESSOR, prompt=prompt_cells(), rounds=5, progress=False
    )
    assert (np.sort(found.layers["round"], axis=1) == np.arange(1, 6)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to generate from"),
        ({"cell_embedding": EMBEDDING[:, :3]}, r"shape \(cells, 16\), found \(6, 3\)"),
        ({"cell_embedding": EMBEDDING * np.nan}, "not finite"),
        ({"cell_embedding": EMBEDDING[:2], "prompt": prompt_cells()}, "2 cells, the prompt 6"),
        ({"cell_embedding": EMBEDDING, "genes": ["GENE3", "nonsense"]}, r"does not know 1 of the 2.*'nonsense'"),
        ({"cell_embedding": EMBEDDING, "genes": ["<cls>"]}, "does not know 1 of the 1"),
        ({"cell_embedding": EMBEDDING, "genes": ["GENE3", IDS[3]]}, "each once"),
        ({"cell_embedding": EMBEDDING, "genes": []}, "one or more genes"),
        ({"cell_embedding": EMBEDDING, "rounds": 6}, "rounds from 1 to the number of genes, 5; found 6"),
        ({"cell_embedding": EMBEDDING, "rounds": 0}, "rounds from 1"),
    ],
)
def test_bad_input_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_cells(make_model(PROCESSOR), **{"genes": ASKED, "processor": PROCESSOR, "progress": False} | arguments)


def test_models_that_cannot_generate_are_refused() -> None:
    masked = make_model(PROCESSOR, objective="masked", loss_weights={"gep": 1.0})
    with pytest.raises(ValueError, match=r"objective='masked' and has no queries.*predict_expression"):
        generate_cells(masked, ASKED, PROCESSOR, cell_embedding=EMBEDDING)
    one_head = make_model(PROCESSOR, loss_weights={"gep": 1.0})
    with pytest.raises(ValueError, match=r"this model has neither, so pass rounds=1"):
        generate_cells(one_head, ASKED, PROCESSOR, cell_embedding=EMBEDDING, rounds=2)
    prompt = prompt_cells()
    prompt.X = csr_matrix(np.log1p(prompt.X.toarray()))
    with pytest.raises(ValueError, match="raw counts"):
        generate_cells(one_head, ASKED, PROCESSOR, prompt=prompt)
