"""Pretraining with labels, `--supervise_by`: missing and unseen labels, accumulation, exact resume, what is saved."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from scgpt_hf import embed_anndata
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.source import open_source
from scgpt_hf.model.objectives_scgpt import class_cross_entropy
from scgpt_hf.pipeline.stream import stream_cells
from scgpt_hf.publishing.card import model_card
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.run_folder import save_best_model
from scgpt_hf.training.summary import summarize
from tests.support.training import EVERY_4, QUIET, prepare, read_metrics, weights_of

CLS = ("--supervise_by", "cell_type", "--loss_weights", '{"gep": 0.01, "cls": 1.0}', "--class_head_layers", "1")
NO_LABEL = ["unknown", "nan", ""]


@pytest.fixture(scope="module")
def census(small_cells, tmp_path_factory):
    """The cells of `small_census`, of which a third have no label. Only the validation donor_3 has platelets."""
    folder, paths = tmp_path_factory.mktemp("labelled"), []
    for cells in small_cells:
        cells = cells.copy()
        labels = cells.obs["cell_type"].astype(object)
        labels[::3] = np.resize(NO_LABEL, len(labels[::3]))
        labels[(cells.obs["donor_id"] == "donor_3").to_numpy() & (np.arange(len(labels)) % 3 == 1)] = "platelet"
        cells.obs["cell_type"] = labels
        paths.append(folder / f"{cells.obs['dataset_id'].iloc[0]}.h5ad")
        cells.write_h5ad(paths[-1])
    return build_census(paths, folder / "soma")


@pytest.fixture(scope="module")
def trained(census, tmp_path_factory):
    """A finished run of four epochs."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    flags = (*EVERY_4, "--num_train_epochs", "4", "--learning_rate", "1e-2", "--cls_shortcut", "true")
    trainer, data_module, _ = prepare(census, folder, *CLS, *flags)
    trainer.train()
    return trainer, data_module, folder, flags


def test_only_labels_of_training_cells_are_learned_and_other_cells_are_ignored(census, trained):
    trainer, data_module, *_ = trained
    assert data_module.selection.classes == ["B cell", "NK cell", "T cell", "monocyte"]
    assert trainer.model.config.id2label == dict(enumerate(data_module.selection.classes))
    labels = open_source(census).obs(["cell_type"])["cell_type"].astype(str)
    assert (labels.loc[data_module.selection.parts["validation"]] == "platelet").any()
    config = replace(data_module.stream_config, micro_batches=1, with_cell_ids=True)
    for part, n_cells in (("train", 32), ("validation", 16)):
        plan = plan_validation(data_module.selection.parts[part], n_cells)
        for batch in stream_cells(data_module.source, [plan], data_module.processor, config):
            expected = labels.loc[batch["cell_ids"].numpy()].map(data_module.selection.class_ids).fillna(-100)
            assert batch["class_labels"].tolist() == expected.tolist()


def test_the_run_learns_the_labels_of_other_donors(trained):
    trainer, data_module, folder, _ = trained
    lines = [line for line in read_metrics(folder) if "eval_cls" in line]
    assert lines[-1]["eval_cls"] < lines[0]["eval_cls"]
    assert lines[-1]["eval_cls_accuracy"] > 0.5
    # As sums over all labelled cells of validation, not as means of batches.
    trainer.model.eval()
    logits, classes = [], []
    with torch.inference_mode():
        for batch in data_module.validation():
            logits.append(trainer.model(**batch).class_logits)
            classes.append(batch["class_labels"])
    known = torch.cat(classes) >= 0
    expected = class_cross_entropy(torch.cat(logits), torch.cat(classes))
    measured = trainer.validate()
    assert measured["cls"] == pytest.approx(float(expected), rel=1e-5)
    right = torch.cat(logits).argmax(1)[known] == torch.cat(classes)[known]
    assert measured["cls_accuracy"] == pytest.approx(float(right.float().mean()))


def test_cells_without_a_label_have_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    class_cross_entropy(logits, torch.tensor([0, -100, 2, -100])).backward()
    assert (logits.grad[[1, 3]] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()
    unlabelled = class_cross_entropy(logits, torch.full((4,), -100))
    assert unlabelled.item() == 0


def test_one_batch_of_32_equals_four_of_8_accumulated(census, tmp_path):
    losses, weights = [], []
    for name, sizes in {"one": ("32", "1"), "four": ("8", "4")}.items():
        flags = ("--per_device_train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1])
        sgd = ("--dropout", "0", "--optim", "sgd", "--learning_rate", "1e-3")
        trainer, *_ = prepare(census, tmp_path / name, *CLS, *QUIET, *flags, *sgd)
        trainer.train()
        losses.append([line["cls"] for line in read_metrics(tmp_path / name) if "cls" in line])
        weights.append(weights_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_equals_uninterrupted(census, trained, tmp_path):
    uninterrupted, data_module, run, flags = trained
    folder = shutil.copytree(run, tmp_path / "run")
    resume = ("--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, again, checkpoint = prepare(census, folder, *CLS, *flags, *QUIET, *resume)
    assert again.selection.classes == data_module.selection.classes
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="'supervise_by': 'cell_type'"):
        prepare(census, folder, *flags, "--supervise_by", "donor_id", *CLS[2:], *resume)


def test_a_cache_holds_the_labels(census, tmp_path):
    trainer, data_module, _ = prepare(census, tmp_path / "run", *CLS, *QUIET, "--cache_dir", str(tmp_path / "cache"))
    trainer.train()
    first_epoch = data_module.schedule.epoch_ends[0]
    found = torch.cat([batch["class_labels"] for batch in data_module.train(first_epoch)])  # from the cache
    labels = open_source(census).obs(["cell_type"]).loc[data_module.selection.parts["train"], "cell_type"].astype(str)
    for index, label in enumerate(data_module.selection.classes):
        # The last cells of an epoch that do not fill a step are left out.
        assert 0 <= (labels == label).sum() - (found == index).sum() < 32
    assert (found == -100).any()


def test_card_report_and_config_say_that_the_run_was_supervised(trained, small_cells):
    trainer, data_module, folder, _ = trained
    save_best_model(trainer, folder)
    supervision = summarize(trainer, data_module)["supervision"]
    assert supervision["column"] == "cell_type"
    assert supervision["labelled_train"] == pytest.approx(2 / 3, abs=0.1)
    assert supervision["labelled_validation"] < supervision["labelled_train"]  # platelets cannot be learned
    (folder / "summary.json").rename(folder / "kept.json")
    in_progress = str(model_card(folder))
    (folder / "kept.json").rename(folder / "summary.json")
    assert "This model was trained with labels" in in_progress
    assert "not recorded" not in in_progress
    card = str(model_card(folder))
    assert "| Supervised by (obs column) | `cell_type` |" in card
    assert f"{supervision['labelled_train']:.1%} of the training cells" in card
    assert "This model was trained with labels" in card
    assert "Supervised by" in write_report(folder).read_text()
    config = json.loads((folder / "best_model" / "config.json").read_text())
    assert sorted(config["label2id"]) == supervision["classes"]
    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "best_model")
    assert torch.equal(classifier.class_head.out.weight, trainer.model.class_head.out.weight)
    cells = small_cells[0].copy()
    embed_anndata(cells, str(folder / "best_model"), progress=False)
    assert np.isfinite(cells.obsm["X_scgpt"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--supervise_by", "cell_type"), "weight of the objective 'cls' is 0"),
        (("--loss_weights", '{"gep": 1, "cls": 1}'), "supervise_by is None"),
        ((*CLS[2:], "--supervise_by", "celltype"), "celltype"),
        ((*CLS[2:], "--supervise_by", "tissue_general"), "labels \\['blood'\\]; expected two or more"),
    ],
)
def test_settings_that_do_not_fit_raise(small_census, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(small_census, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
