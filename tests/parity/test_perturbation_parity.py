"""A perturbation model of scGPT's code converts, gives the same numbers, and saves and loads with the Auto classes.

The tensors come from running scGPT's TransformerGenerator; `shared/fixtures/scgpt_parity/README.md` states tolerances.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from transformers import AutoModelForTokenClassification, AutoProcessor

from scgpt_hf.conversion.checkpoint import convert_scgpt, save_converted
from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation
from scgpt_hf.model.objectives_scgpt import elastic_cell_similarity
from scgpt_hf.perturbation.predict import predict_perturbation
from tests.support.parity import assert_matches

Tensors = dict[str, torch.Tensor]
LAYOUTS = [(attention, packed) for attention in ("eager", "sdpa", "scgpt_varlen") for packed in (False, True)]


@pytest.fixture(scope="module")
def folder(fixtures: Path) -> Path:
    return fixtures / "perturbation_generator"


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Tensors:
    return load_file(folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensors:
    return load_file(folder / "outputs.safetensors")


def batch_of(inputs: Tensors, *, packed: bool) -> dict[str, Any]:
    real = ~inputs["padding_mask"]
    tokens = {
        "input_ids": inputs["gene_ids"],
        "values": inputs["values"],
        "perturbation_flags": inputs["pert_flags"],
    }
    if not packed:
        return tokens | {"attention_mask": real}
    lengths = real.sum(1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    layout = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    return {name: tensor[real][None] for name, tensor in tokens.items()} | layout


@pytest.mark.parametrize(("attention", "packed"), [one for one in LAYOUTS if one != ("scgpt_varlen", False)])
def test_every_layout_gives_the_numbers_of_the_original(
    folder: Path, inputs: Tensors, expected: Tensors, attention: str, packed: bool
) -> None:
    model = convert_scgpt(folder)[0]
    model.set_attn_implementation(attention)
    real = ~inputs["padding_mask"]
    with torch.no_grad():
        found = model(**batch_of(inputs, packed=packed))
    at_tokens = (lambda tensor: tensor[0]) if packed else (lambda tensor: tensor[real])
    assert_matches(at_tokens(found.expression), expected["mlm_output"][real])
    assert_matches(at_tokens(found.gepc), expected["mvc_output"][real])
    assert_matches(elastic_cell_similarity(found.cell_embedding, 0.3), expected["loss_ecs"])


def test_every_key_is_used_and_what_was_not_recorded_is_reported(folder: Path) -> None:
    model, processor, report = convert_scgpt(folder)
    assert isinstance(model, ScGPTForPerturbation)
    assert not report.left_out
    assert set(report.converted) == set(torch.load(folder / "best_model.pt", weights_only=True))
    assert report.assumed["input_style"] == processor.input_style == "log1p"
    assert processor.pad_value == json.loads((folder / "case.json").read_text())["constructor"]["pad_value"] == 0
    assert processor.include_zeros
    assert model.config.loss_weights == {"gep": 1.0, "gepc": 1.0}
    assert not model.config.perturbation_cls


def test_a_saved_perturbation_model_loads_with_the_auto_class(
    folder: Path, inputs: Tensors, expected: Tensors, tmp_path: Path
) -> None:
    out = save_converted(*convert_scgpt(folder), tmp_path / "model")
    model = AutoModelForTokenClassification.from_pretrained(out)
    assert type(model) is ScGPTForPerturbation
    real = ~inputs["padding_mask"]
    with torch.no_grad():
        found = model(**batch_of(inputs, packed=False)).expression
    assert_matches(found[real], expected["mlm_output"][real])
    assert AutoProcessor.from_pretrained(out).input_style == "log1p"
    assert "AutoModelForTokenClassification" in (out / "README.md").read_text()


def test_predict_perturbation_runs_a_converted_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = save_converted(*convert_scgpt(folder), tmp_path / "model")
    model = ScGPTForPerturbation.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    genes, rng = processor.genes, np.random.default_rng(0)
    obs = pd.DataFrame({"condition": ["ctrl"] * 6 + [f"{genes[0]}+ctrl"] * 2}, index=[f"cell{i}" for i in range(8)])
    counts = rng.poisson(2.0, (8, len(genes) - 1)).astype(np.float32)  # the last gene is not measured
    adata = AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes[:-1]))
    conditions = [f"{genes[3]}+ctrl", f"{genes[3]}+{genes[-1]}"]
    found = predict_perturbation(adata, conditions, model, processor, progress=False)
    assert found.shape == (12, len(genes) - 1)
    assert np.isfinite(found.X).all()
    again = predict_perturbation(adata, conditions, out, progress=False)
    np.testing.assert_allclose(found.X, again.X, atol=1e-6)
    # The first cell, by the model itself: all genes, without <cls>, and the perturbed gene that is not measured.
    before = np.log1p(counts[0] * processor.target_sum / counts[0].sum())
    ids = torch.tensor([processor.tokenizer.convert_tokens_to_ids(genes)])
    flags = (ids == ids[0, 3]).long()
    flags[0, -1] = 1
    values = torch.tensor(np.append(before, 0.0), dtype=torch.float32)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, values=values, perturbation_flags=flags).expression[0, :-1]
    first = found[(found.obs["control_cell"] == "cell0") & (found.obs["condition"] == found.obs["condition"].iloc[-1])]
    np.testing.assert_allclose(first.X[0], expected.numpy(), atol=2e-5)


def test_a_missing_part_of_the_affine_head_raises(folder: Path, tmp_path: Path) -> None:
    weights = torch.load(folder / "best_model.pt", weights_only=True)
    del weights["decoder.bias_decoder.fc.4.weight"]
    for name in ("args.json", "vocab.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    torch.save(weights, tmp_path / "best_model.pt")
    with pytest.raises(ValueError, match=r"lacks 'decoder\.bias_decoder\.fc\.4\.weight'"):
        convert_scgpt(tmp_path)
