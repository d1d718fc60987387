"""Genes and proteins of the same cells become one table of counts, from every form in which they are distributed."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.modalities import join_modalities, modalities_of

GENES = [f"ENSG{number:011}" for number in range(20)]
PROTEINS = ["CD3", "CD4", "CD8a"]
CELLS = [f"cell{number}" for number in range(6)]
RNA_COUNTS = np.random.default_rng(0).poisson(1.0, (6, 20)).astype(np.float32)
PROTEIN_COUNTS = np.random.default_rng(1).poisson(30.0, (6, 3))


def rna() -> AnnData:
    var = pd.DataFrame({"feature_name": [f"GENE{n}" for n in range(20)]}, index=GENES)
    obs = pd.DataFrame({"donor_id": list("aabbcc")}, index=CELLS)
    return AnnData(csr_matrix(RNA_COUNTS), obs=obs, var=var)


def proteins(order: list[int] | None = None) -> AnnData:
    order = order or list(range(6))
    obs = pd.DataFrame(index=[CELLS[cell] for cell in order])
    return AnnData(PROTEIN_COUNTS[order].astype(np.float32), obs=obs, var=pd.DataFrame(index=PROTEINS))


def with_obsm(**uns: Any) -> AnnData:
    adata = rna()
    adata.obsm["protein_counts"] = PROTEIN_COUNTS
    adata.uns |= {"protein_names": np.array(PROTEINS, object)} | uns
    return adata


def with_frame() -> AnnData:
    adata = rna()
    adata.obsm["protein_counts"] = pd.DataFrame(PROTEIN_COUNTS, index=CELLS, columns=PROTEINS)
    return adata


def from_cell_ranger() -> AnnData:
    joined = anndata.concat([proteins(), rna()], axis=1)  # antibodies first
    joined.obs = rna().obs
    joined.var["feature_types"] = ["Antibody Capture"] * 3 + ["Gene Expression"] * 20
    return joined


def mudata() -> Any:
    library = pytest.importorskip("mudata")
    library.set_options(pull_on_update=False)  # the default of the next release; the old one warns
    return library.MuData({"rna": rna(), "prot": proteins([3, 1, 0, 2, 5, 4])})


FORMS: dict[str, Any] = {
    "array in obsm": lambda: join_modalities(with_obsm()),
    "DataFrame in obsm": lambda: join_modalities(with_frame()),
    "two AnnData": lambda: join_modalities(rna(), proteins()),
    "two AnnData in another order": lambda: join_modalities(rna(), proteins([5, 3, 1, 0, 2, 4])),
    "Cell Ranger": lambda: join_modalities(from_cell_ranger()),
    "MuData": lambda: join_modalities(mudata()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_table(form: str) -> None:
    joined = FORMS[form]()
    np.testing.assert_array_equal(joined.X.toarray(), np.hstack([RNA_COUNTS, PROTEIN_COUNTS]))
    assert list(joined.var_names) == [*GENES, *(f"protein:{name}" for name in PROTEINS)]
    assert list(joined.var["modality"]) == ["RNA"] * 20 + ["protein"] * 3
    assert list(joined.obs_names) == CELLS
    assert list(joined.obs["donor_id"]) == list("aabbcc")
    assert modalities_of(joined.var_names) == list(joined.var["modality"])
    assert list(AnnDataSource(joined, primary_only=False).genes["feature_id"]) == list(joined.var_names)


def test_the_input_is_not_changed_and_peaks_are_a_modality_too() -> None:
    adata, other = rna(), proteins()
    joined = join_modalities(adata, other, modality="peak")
    assert modalities_of(joined.var_names)[-1] == "peak"
    assert adata.shape == (6, 20)
    np.testing.assert_array_equal(adata.X.toarray(), RNA_COUNTS)
    assert list(other.var_names) == PROTEINS


@given(st.lists(st.text(max_size=12), max_size=8))
def test_only_the_prefixes_of_modalities_name_one(names: list[str]) -> None:
    for name, modality in zip(names, modalities_of(names), strict=True):
        assert modality == ("RNA" if not name.startswith(("protein:", "peak:")) else name.split(":")[0])


def _wrong(values: Any) -> AnnData:
    adata = with_obsm()
    adata.obsm["protein_counts"] = np.asarray(values)
    return adata


WITHOUT_CELL = proteins()[[0, 1, 2, 3, 4]].copy()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: join_modalities(rna()), r"found no protein counts: obsm has \[\] and no 'protein_counts'"),
        (lambda: join_modalities(with_obsm(), obsm_key="adt"), r"obsm has \['protein_counts'\] and no 'adt'"),
        (lambda: join_modalities(with_obsm(protein_names=["CD3"])), "found 1 names for 3 columns"),
        (lambda: join_modalities(with_obsm(protein_names=["CD3", "CD3", "CD4"])), r"more than once: \['CD3'\]"),
        (lambda: join_modalities(_wrong(np.log1p(PROTEIN_COUNTS))), "raw protein counts, found .*CLR"),
        (lambda: join_modalities(_wrong(-PROTEIN_COUNTS)), "raw protein counts, found -"),
        (lambda: join_modalities(_wrong(PROTEIN_COUNTS * np.nan)), "raw protein counts, found nan"),
        (lambda: join_modalities(rna(), WITHOUT_CELL), r"1 of 6 cells have no protein counts, e.g. \['cell5'\]"),
        (lambda: join_modalities(rna(), proteins(), modality="lipid"), "modality is 'lipid'; expected one of"),
    ],
)
def test_bad_input_raises(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_repeated_cells_raise() -> None:
    with pytest.raises(ValueError, match="obs_names of the protein are not unique"):
        join_modalities(rna(), proteins([0, 0, 1, 2, 3, 4, 5]))


def test_an_array_without_names_raises() -> None:
    adata = with_obsm()
    del adata.uns["protein_names"]
    with pytest.raises(ValueError, match=r"has no names; put them into uns\['protein_names'\]"):
        join_modalities(adata)


def test_real_cite_seq_cells_join(shared: Path) -> None:
    adata = anndata.read_h5ad(shared / "data" / "citeseq" / "pbmc_10k_protein_v3.h5ad")
    joined = join_modalities(adata)
    assert joined.shape == (200, 16_727 + 14)
    assert "protein:CD4" in joined.var_names
    assert joined.X[:, -14:].sum() == adata.obsm["protein_counts"].sum()
