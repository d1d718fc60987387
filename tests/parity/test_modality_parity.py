"""A converted multi-omic model of scGPT's code gives its outputs and losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scgpt_hf.conversion.checkpoint import convert_scgpt, save_converted
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.model.objectives_scgpt import IGNORE
from scgpt_hf.pretrained import load_model
from tests.support.parity import assert_matches


@pytest.fixture(scope="module")
def case(fixtures: Path) -> Path:
    return fixtures / "multiomic_mod_types"


def modalities_of_case(case: Path) -> list[str]:
    ids = json.loads((case / "case.json").read_text())["constructor"]["vocab_mod"]
    return sorted(ids, key=ids.__getitem__)


def test_outputs_and_losses_are_those_of_the_original(case: Path) -> None:
    model, _, report = convert_scgpt(case, modalities=modalities_of_case(case))
    assert not report.left_out
    assert isinstance(model, ScGPTForPreTraining)
    model.config.loss_weights |= {"ecs": 10.0}
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    real = ~inputs["padding_mask"]
    output = model(
        input_ids=inputs["gene_ids"],
        values=inputs["values"],
        attention_mask=real,
        domain_ids=inputs["batch_labels"],
        modality_ids=inputs["mod_types"],
        labels=inputs["target_values"].masked_fill(~inputs["masked_positions"], IGNORE),
    )
    assert_matches(output.gep[real], expected["mlm_output"][real])
    assert_matches(output.gepc[real], expected["mvc_output"][real])
    assert_matches(output.cell_embedding, expected["cell_emb"])
    for name in ("gep", "gepc", "ecs"):
        torch.testing.assert_close(output.losses[name], expected[f"loss_{name}"], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, expected["loss_total"], atol=2e-3, rtol=1e-4)


def test_genes_have_their_modality_after_saving_and_loading(case: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((case / "vocab.json").read_text())
    genes = [gene for gene in vocabulary if not gene.startswith("<")]
    names = modalities_of_case(case)
    model, processor, report = convert_scgpt(
        case, modalities=names, gene_modalities=dict.fromkeys(genes[:5], "Protein")
    )
    loaded, _ = load_model(save_converted(model, processor, report, tmp_path / "converted"))
    found = loaded.modality_table.of_token
    assert {names[index] for index in found[[vocabulary[gene] for gene in genes[:5]]].tolist()} == {"Protein"}
    assert {names[index] for index in found[[vocabulary[gene] for gene in genes[5:]]].tolist()} == {names[0]}
    assert names[found[vocabulary["<cls>"]]] == "<cls>"
    assert names[found[vocabulary["<pad>"]]] == "<pad>"


def test_without_names_the_heads_are_left_out_and_wrong_names_raise(case: Path) -> None:
    _, _, report = convert_scgpt(case)
    assert any("pass modalities=[...]" in reason for reason in report.left_out.values())
    with pytest.raises(ValueError, match=r"has 5 modalities \(rows of mod_encoder\), found 2 names"):
        convert_scgpt(case, modalities=["RNA", "<pad>"])
    with pytest.raises(ValueError, match="expected a list"):
        convert_scgpt(case, modalities="RNA")
    with pytest.raises(ValueError, match="'Antibody'"):
        convert_scgpt(case, modalities=modalities_of_case(case), gene_modalities={"GENE": "Antibody"} | _any_gene(case))


def _any_gene(case: Path) -> dict[str, str]:
    gene = next(gene for gene in json.loads((case / "vocab.json").read_text()) if not gene.startswith("<"))
    return {gene: "Antibody"}
