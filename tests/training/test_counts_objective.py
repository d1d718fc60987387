"""Pretraining with the objective "counts": its losses, accumulation, exact resume, and what it leaves behind."""

import re
import shutil

import numpy as np
import pytest
import scipy.sparse
import torch
from torch._subclasses.fake_tensor import FakeTensor

import scgpt_hf
from scgpt_hf import embed_anndata
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.source import open_source
from scgpt_hf.model import count_decoder_scgpt
from scgpt_hf.model.count_decoder_scgpt import CountHead
from scgpt_hf.pretraining import describe_pretraining
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import EVERY_4, QUIET, TINY, prepare, read_metrics, weights_of

COUNTS = ("--loss_weights", '{"gep": 0.01, "counts": 1.0}', "--cls_shortcut", "true")


@pytest.fixture(scope="module")
def trained(small_census, tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("counts") / "run"
    trainer, data_module, _ = prepare(small_census, folder, *COUNTS, *EVERY_4)
    trainer.train()
    return trainer, data_module, folder


def test_the_loss_falls_below_that_of_the_frequencies_of_each_batch(trained):
    trainer, *_ = trained
    learned, out = trainer.validate()["counts"], trainer.model.count_head.out.weight
    kept = out.detach().clone()
    with torch.no_grad():
        out.zero_()  # leaves the biases, which do not depend on the cell
        frequencies = trainer.validate()["counts"]
        out.copy_(kept)
    assert learned < frequencies


def test_the_decoder_starts_at_the_frequencies_of_the_training_cells(small_census, tmp_path):
    trainer, data_module, _ = prepare(small_census, tmp_path / "run", *COUNTS)
    head, selection = trainer.model.count_head, data_module.selection
    assert selection.domains == ["first", "second"]  # dataset_id, by default
    source = open_source(small_census)
    block = source.read(selection.parts["train"], ["dataset_id"])
    columns = source.genes.reset_index().set_index("feature_id")["index"][selection.genes].to_numpy()
    for index, dataset in enumerate(selection.domains):
        totals = np.asarray(block.counts[(block.obs["dataset_id"] == dataset).to_numpy()].sum(axis=0)).ravel()[columns]
        shares = head.bias[index, : len(columns)].exp().detach().numpy()
        np.testing.assert_allclose(shares[totals > 0], (totals / totals.sum())[totals > 0], rtol=1e-4)
    assert not head.measured[:, len(columns) :].any()  # special tokens have no counts


@pytest.fixture(scope="module")
def cells_with_silent_genes(small_cells, tmp_path_factory):
    """Files in which no cell of the first data set expresses ten of its genes, and the Census of these files."""
    folder = tmp_path_factory.mktemp("silent")
    paths = []
    for part in (small_cells[0].copy(), small_cells[1]):
        if not paths:
            part.X = part.X @ scipy.sparse.diags((np.arange(part.n_vars) // 10 != 10).astype(np.float32))
        paths.append(folder / f"{part.obs['dataset_id'].iloc[0]}.h5ad")
        part.write_h5ad(paths[-1])
    return paths, build_census(paths, folder / "soma")


@pytest.mark.parametrize("kind", ["census", "files", "cache", "while caching"])
@pytest.mark.parametrize("batch_key", ["dataset_id", "donor_id"])
def test_genes_that_the_data_sets_of_a_batch_did_not_measure_are_excluded(
    cells_with_silent_genes, small_cells, tmp_path, kind, batch_key
):
    paths, census = cells_with_silent_genes
    data, flags = paths if kind == "files" else census, ["--batch_key", batch_key]
    if kind == "cache":
        data = tmp_path / "cache"
        write_cache(open_source(census), data)
    elif kind == "while caching":
        flags += ["--cache_dir", str(tmp_path / "cache")]
    trainer, data_module, _ = prepare(data, tmp_path / "run", *COUNTS, *flags)
    selection, head = data_module.selection, trainer.model.count_head
    obs = data_module.source.obs(sorted({"dataset_id", batch_key})).loc[selection.parts["train"]].astype(str)
    genes_of = {part.obs["dataset_id"].iloc[0]: set(part.var_names) for part in small_cells}
    for index, batch in enumerate(selection.domains):
        data_sets = obs.loc[obs[batch_key] == batch, "dataset_id"].unique()
        # A batch without training cells has the genes of all.
        measured = set.union(
            *(genes_of[name] for name in (data_sets if len(data_sets) else obs["dataset_id"].unique()))
        )
        expected = [gene in measured for gene in selection.genes]
        assert head.measured[index].tolist() == expected + [False] * (head.out.out_features - len(expected))
    silent = [selection.genes.index(gene) for gene in small_cells[0].var_names[100:110]]
    of_first = obs.groupby(batch_key).filter(lambda cells: (cells["dataset_id"] == "first").all())
    first = selection.domains.index(of_first[batch_key].iloc[0])
    assert head.measured[first, silent].all()
    assert ((head.bias[first, silent] < -10) & (head.bias[first, silent] > -20)).all()  # rare, not impossible


def test_without_presence_a_gene_is_measured_where_it_has_counts(small_census, tmp_path, monkeypatch):
    monkeypatch.setattr(CensusSource, "presence", lambda source, cell_ids: None)
    trainer, data_module, _ = prepare(small_census, tmp_path / "run", *COUNTS)
    selection, measured = data_module.selection, trainer.model.count_head.measured
    block = data_module.source.read(selection.parts["train"], ["dataset_id"])
    columns = data_module.source.genes.reset_index().set_index("feature_id")["index"][selection.genes].to_numpy()
    for index, dataset in enumerate(selection.domains):
        totals = block.counts[(block.obs["dataset_id"].astype(str) == dataset).to_numpy()].sum(axis=0)
        assert measured[index, : len(columns)].tolist() == (np.asarray(totals).ravel()[columns] > 0).tolist()


def test_one_batch_of_32_equals_four_of_8_accumulated(small_census, tmp_path):
    losses, weights = [], []
    for name, sizes in {"one": ("32", "1"), "four": ("8", "4")}.items():
        flags = ("--per_device_train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1], "--dropout", "0")
        trainer, *_ = prepare(small_census, tmp_path / name, *COUNTS, *QUIET, *flags)
        trainer.train()
        losses.append([line["counts"] for line in read_metrics(tmp_path / name) if "counts" in line])
        weights.append(weights_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("max_logits", [2**22, 500])  # all genes at once, or in chunks
def test_bf16_and_gradient_checkpointing_give_the_same_losses(small_census, tmp_path, monkeypatch, max_logits):
    monkeypatch.setattr(count_decoder_scgpt, "MAX_LOGITS", max_logits)
    losses = {}
    arms = {"fp32": (), "checkpointed": (), "bf16": ("--precision", "bf16")}
    for name, flags in arms.items():
        trainer, *_ = prepare(
            small_census, tmp_path / name, *COUNTS, *QUIET, "--max_steps", "5", "--dropout", "0", *flags
        )
        if name == "checkpointed":
            trainer.model.gradient_checkpointing_enable()
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == (name == "checkpointed")
        losses[name] = [line["counts"] for line in read_metrics(tmp_path / name) if "counts" in line]
    assert len(losses["fp32"]) == 5
    assert losses["checkpointed"] == pytest.approx(losses["fp32"], rel=1e-6)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] != losses["fp32"]


def test_a_dry_run_measures_the_decoder_and_reports_its_size(small_census, tmp_path, monkeypatch):
    calls, loss = [], CountHead.loss
    monkeypatch.setattr(CountHead, "loss", lambda *arguments: calls.append(type(arguments[1])) or loss(*arguments))
    flops = []
    only_gep = ("--loss_weights", '{"gep": 0.01}')
    for flags in (COUNTS, (*only_gep, *COUNTS[2:]), only_gep):
        settings = parse_settings(
            [*TINY, "--data", str(small_census), "--output_dir", str(tmp_path / "run"), "--dry_run", "true", *flags],
            "test",
        )
        words = describe_pretraining(settings)
        flops.append(float(re.search(r"([\d.e-]+) PFLOP in total", words)[1]))
        if flags == COUNTS:
            n_genes = int(re.search(r"genes  (\d+) of", words)[1]) + 3  # special tokens
            n_weights = 256 * (16 + 1) + 2 * 256 + 256 * n_genes + 2 * n_genes
            assert f"of which {n_weights:,} of the count decoder, with {2 * n_genes:,} biases of 2 batches x" in words
            # Time and memory are those of steps with the decoder; the prediction traces it on tensors without data.
            assert calls.count(torch.Tensor) == 6
            assert FakeTensor in calls
        else:
            assert "count decoder" not in words
    n_steps, n_cells = (int(text) for text in re.search(r"steps  (\d+) of (\d+) cells", words).groups())
    decoder, shortcut = (n_steps * n_cells * 6 * 256 * width / 1e15 for width in (16 + n_genes, 256 + 16))
    assert flops[0] - flops[1] == pytest.approx(decoder, rel=0.02)
    assert flops[1] - flops[2] == pytest.approx(shortcut, rel=0.02)


def test_resumed_equals_uninterrupted(small_census, trained, tmp_path):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*QUIET, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(small_census, folder, *COUNTS, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    losses = [
        {line["step"]: (line["loss"], line["gep"], line["counts"]) for line in read_metrics(of) if "grad_norm" in line}
        for of in (run, folder)
    ]
    assert losses[0] == losses[1]
    assert set(losses[0]) >= set(range(1, 9))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, uninterrupted.model.state_dict()[name]), name


def test_a_new_batch_needs_nothing_at_inference(trained, small_cells):
    trainer, data_module, _ = trained
    embeddings = []
    for dataset_id in ("first", "of a later study", None):
        cells = small_cells[0].copy()
        cells.obs["dataset_id"] = dataset_id
        if dataset_id is None:
            cells.obs = cells.obs.drop(columns="dataset_id")
        embed_anndata(cells, trainer.model.eval(), data_module.processor, progress=False)
        embeddings.append(cells.obsm["X_scgpt"])
    assert np.isfinite(embeddings[0]).all()
    assert np.array_equal(embeddings[0], embeddings[1])
    assert np.array_equal(embeddings[0], embeddings[2])


def test_data_without_a_column_of_data_sets_are_one_batch(tmp_path):
    data = scgpt_hf.demo_cells()
    assert "dataset_id" not in data.obs
    data.write_h5ad(tmp_path / "cells.h5ad")
    trainer, data_module, _ = prepare(tmp_path / "cells.h5ad", tmp_path / "run", *COUNTS, *QUIET, "--max_steps", "2")
    trainer.train()
    assert data_module.selection.domains == []
    assert trainer.model.config.batch_key is None
