"""Models whose gene tables start at vectors from the data: initial weights, exact resume, and what stays random."""

import shutil

import pytest
import torch

from tests.support.training import EVERY_4, QUIET, prepare, read_metrics

DATA = ("--gene_vectors", "data", "--cls_shortcut", "true", "--shortcut_size", "24")


def tables_of(trainer):
    encoder = trainer.model.scgpt
    return encoder.gene_encoder.embedding.weight.detach().clone(), encoder.shortcut.genes.weight.detach().clone()


def test_both_tables_start_at_the_vectors_and_special_tokens_stay_random(small_census, tmp_path):
    trainer, data_module, _ = prepare(small_census, tmp_path / "data", *DATA)
    random, *_ = prepare(small_census, tmp_path / "random", *DATA[2:])
    n_genes = len(data_module.selection.genes)
    (genes, shortcut), (random_genes, random_shortcut) = tables_of(trainer), tables_of(random)
    assert genes[:n_genes].std() == pytest.approx(1, rel=1e-3)
    assert shortcut[:n_genes].std() == pytest.approx(1 / 20, rel=1e-3)
    ratio = genes[:n_genes] / shortcut[:n_genes, : genes.shape[1]]  # the same vectors, but for the scale
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert torch.equal(genes[n_genes:], random_genes[n_genes:])
    assert torch.equal(shortcut[n_genes:], random_shortcut[n_genes:])
    others = {name: weight for name, weight in random.model.state_dict().items() if "gene" not in name}
    for name, weight in others.items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


def test_resumed_equals_uninterrupted_to_the_bit(small_census, tmp_path):
    trainer, *_ = prepare(small_census, tmp_path / "run", *DATA, *EVERY_4, "--max_steps", "8")
    trainer.train()
    folder = shutil.copytree(tmp_path / "run", tmp_path / "again")
    flags = (*QUIET, "--max_steps", "8", "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(small_census, folder, *DATA, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    losses = [
        [line["loss"] for line in read_metrics(run) if "loss" in line and line["step"] > 4]
        for run in (tmp_path / "run", folder)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
