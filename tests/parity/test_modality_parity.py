"""A converted multi-omic model of scGPT's code gives its outputs and losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from scgpt_hf.cli import convert
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
    names = modalities_of_case(case)
    with pytest.raises(ValueError, match="'Antibody'"):
        convert_scgpt(case, modalities=names, gene_modalities=_any_gene(case))
    with pytest.raises(ValueError, match=r"1 genes that are not in vocab\.json, e\.g\. \['NO_GENE'\]"):
        convert_scgpt(case, modalities=names, gene_modalities={"NO_GENE": "RNA"})
    with pytest.raises(ValueError, match="needs modalities"):
        convert_scgpt(case, gene_modalities=_any_gene(case))
    assert "all genes are RNA" in str(convert_scgpt(case, modalities=names)[2])


def test_the_command_converts_a_multi_omic_checkpoint(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = modalities_of_case(case)
    genes = [gene for gene in json.loads((case / "vocab.json").read_text()) if not gene.startswith("<")]
    table = tmp_path / "modalities.json"
    table.write_text(json.dumps(dict.fromkeys(genes[:5], "Protein")))
    options = [str(case), "--out", str(tmp_path / "converted"), "--modalities", *names, "--gene_modalities", str(table)]
    convert.main(options)
    assert "left out" not in capsys.readouterr().out
    model, processor = load_model(tmp_path / "converted", model_class=AutoModelForPreTraining)
    assert isinstance(model, ScGPTForPreTraining)
    expected, _, _ = convert_scgpt(case, modalities=names, gene_modalities=dict.fromkeys(genes[:5], "Protein"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert [
        gene for gene, one in zip(processor.genes, processor.modalities or [], strict=True) if one == "Protein"
    ] == (sorted(genes[:5], key=processor.genes.index))


@pytest.mark.parametrize("content", ["{", '["RNA"]', '{"GENE": 1}'])
def test_a_file_that_is_no_table_of_modalities_ends_the_command(
    case: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "modalities.json"
    table.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(case), "--out", str(tmp_path / "converted"), "--gene_modalities", str(table)])
    assert str(table) in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


def _any_gene(case: Path) -> dict[str, str]:
    gene = next(gene for gene in json.loads((case / "vocab.json").read_text()) if not gene.startswith("<"))
    return {gene: "Antibody"}
