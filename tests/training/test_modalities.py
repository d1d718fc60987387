"""CITE-seq data: pretraining on genes and proteins, embedding, and proteins predicted from RNA alone."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.embed import embed_anndata
from scgpt_hf.analysis.expression import predict_expression
from scgpt_hf.cells.modalities import join_modalities
from scgpt_hf.inference import evaluation_mode
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.packing_scgpt import pack
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.targets_scgpt import leave_out_masked
from tests.support.training import QUIET, assert_resumes_exactly, prepare

N_GENES, PROTEINS = 60, ["CD3", "CD4", "CD14", "CD19"]
FLAGS = ("--max_tokens", "40", "--gene_selection", "hvg", "--n_hvg", "40", "--mask_ratios", "0.5")


@pytest.fixture(scope="module")
def joined() -> AnnData:
    """160 cells of two types, whose proteins follow from the type."""
    rng = np.random.default_rng(0)
    is_b = rng.random(160) < 0.5
    rates = np.where(is_b[:, None], rng.gamma(1.0, 2.0, N_GENES), rng.gamma(1.0, 2.0, N_GENES))
    var = pd.DataFrame(
        {"feature_name": [f"GENE{n}" for n in range(N_GENES)]}, index=[f"ENSG{n:011}" for n in range(N_GENES)]
    )
    obs = pd.DataFrame(
        {"donor_id": [f"d{n % 5}" for n in range(160)], "cell_type": np.where(is_b, "B", "T")},
        index=[f"cell{n}" for n in range(160)],
    )
    adata = AnnData(csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=var)
    adata.obsm["protein_counts"] = rng.poisson(np.where(is_b[:, None], [2, 3, 9, 400], [300, 90, 9, 4]))
    adata.uns["protein_names"] = PROTEINS
    return join_modalities(adata)


@pytest.fixture(scope="module")
def file(joined: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("citeseq") / "joined.h5ad"
    joined.write_h5ad(path)
    return path


def test_a_run_resumes_exactly_and_its_model_knows_the_modality_of_each_token(file: Path, tmp_path: Path) -> None:
    trainer = assert_resumes_exactly(file, tmp_path, *FLAGS, "--modality_embedding", "both")
    processor, model = trainer.processing_class, trainer.model
    assert processor.genes[-4:] == [f"protein:{name}" for name in PROTEINS]
    assert processor.modalities == ["RNA"] * 40 + ["protein"] * 4
    assert model.config.modalities == ["RNA", "protein", "<pad>", "<cls>"]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", model_class=ScGPTForPreTraining)
    assert torch.equal(
        loaded.scgpt.modality_table.of_token, torch.from_numpy(processor.modality_ids(model.config.modalities))
    )


def test_proteins_are_predicted_from_rna_alone_and_cells_are_embedded(
    joined: AnnData, file: Path, tmp_path: Path
) -> None:
    flags = ("--num_train_epochs", "50", "--learning_rate", "1e-2", "--hidden_size", "32", "--dropout", "0")
    trainer, *_ = prepare(file, tmp_path / "run", *FLAGS, *flags, *QUIET)
    trainer.train()
    model, processor = trainer.model, trainer.processing_class
    rna = joined[:, joined.var["modality"] == "RNA"].copy()
    genes = ["protein:CD3", "protein:CD19"]
    predicted = predict_expression(rna, model, processor, genes=genes, progress=False)
    is_b = (joined.obs["cell_type"] == "B").to_numpy()
    cd3, cd19 = predicted.layers["gep"].T
    assert cd3[~is_b].mean() > cd3[is_b].mean() + 20
    assert cd19[is_b].mean() > cd19[~is_b].mean() + 20
    assert np.isnan(predicted.layers["gep_counts"]).all()  # no protein is measured that would say what a bin is
    again = predict_expression(joined, model, processor, genes=genes, progress=False)
    counts = joined[:, [f"protein:{name}" for name in PROTEINS]].X.toarray()
    assert (again.layers["gep_counts"] <= counts.max(axis=1, keepdims=True)).all()
    assert (again.layers["gep_counts"] >= counts.min(axis=1, keepdims=True) - 1).all()
    embed_anndata(rna, model, processor, progress=False)
    assert rna.obsm["X_scgpt"].shape == (160, 32)


def tiny_model(where: str, **settings: object) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = ["RNA", "protein", "<pad>", "<cls>"]
    options = {"vocab_size": 9, "pad_token_id": 6, "modalities": names, "modality_embedding": where, "dropout": 0.0}
    model = ScGPTForPreTraining(ScGPTConfig(**sizes, **options, **settings))  # type: ignore[arg-type]
    model.scgpt.modality_table.of_token.copy_(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 2]))
    return model


@pytest.mark.parametrize(
    ("where", "changes_state"), [("decoder", False), ("input", True), ("both", True), ("none", False)]
)
def test_modalities_enter_where_the_setting_says(where: str, changes_state: bool) -> None:
    model = tiny_model(where).eval()
    batch = {"input_ids": torch.tensor([[7, 1, 4]]), "values": torch.tensor([[0.0, 3.0, 5.0]])}
    with evaluation_mode(model), torch.no_grad():
        first = model(**batch)
        other = model(**batch, modality_ids=torch.tensor([[3, 0, 0]]))  # the protein as if it were a gene
    assert torch.equal(first.last_hidden_state, other.last_hidden_state) != changes_state
    assert torch.equal(first.gep[:, 2], other.gep[:, 2]) == (where == "none")
    assert torch.equal(first.gepc[:, 2], other.gepc[:, 2]) == (where == "none")


def test_genes_that_are_left_out_have_their_modality_too() -> None:
    processor = ScGPTProcessor.from_genes(
        [f"G{n}" for n in range(4)] + ["protein:A", "protein:B"], modalities=["RNA"] * 4 + ["protein"] * 2
    )
    tokens = processor.tokenize(csr_matrix(np.array([[1, 2, 3, 4, 5, 9.0]])), np.arange(6), seed=0, epoch=0)
    masked = processor.mask(tokens, seed=0, epoch=0, ratios=[0.99])
    visible, left_out = leave_out_masked(masked)
    model = tiny_model("decoder", leave_out_masked=True, loss_weights={"gepc": 1.0}).eval()
    kept = tiny_model("decoder", loss_weights={"gepc": 1.0}).eval()
    found = model(**pack(visible), **left_out.as_batch()).gepc
    # The same query and cell embedding as in a model that reads the visible genes only.
    encoded = kept.scgpt(**pack(visible))
    genes = kept.scgpt.gene_encoder(torch.from_numpy(left_out.ids))
    of_genes = kept.modality_encoder(kept.scgpt.modality_table(torch.from_numpy(left_out.ids)))
    of_cls = kept.modality_encoder(torch.full((len(genes),), 3))
    cells = torch.cat([encoded.cell_embedding.expand(len(genes), -1), of_cls], dim=1)
    torch.testing.assert_close(found, kept.cell_to_gene_head(cells, torch.cat([genes, of_genes], dim=1))[0])


def test_a_processor_of_other_modalities_is_refused(tmp_path: Path) -> None:
    model = tiny_model("decoder")
    with pytest.raises(ValueError, match="processor has no modalities; load both from one folder"):
        load_model(model, ScGPTProcessor.from_genes([f"G{n}" for n in range(6)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ["RNA", "protein"]}, "with '<pad>' and '<cls>'"),
        ({"modalities": ["RNA", "RNA", "<pad>", "<cls>"]}, "different names"),
        (
            {"modalities": ["RNA", "<pad>", "<cls>"], "gepc_query": "concat"},
            "gepc_query='concat' does not support modality",
        ),
        ({"modalities": ["RNA", "<pad>", "<cls>"], "modality_embedding": "encoder"}, "modality_embedding"),
    ],
)
def test_wrong_settings_raise(settings: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ScGPTConfig(vocab_size=9, pad_token_id=6, hidden_size=16, num_attention_heads=2, **settings)  # type: ignore[arg-type]
