"""Pretraining with the objective "views": its loss, negatives, packed and padded batches, and exact resume."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.model.objectives_scgpt import contrast_views
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.memory_source import make_cells
from tests.support.training import EVERY_4, QUIET, prepare, read_metrics, weights_of

VIEWS = ("--loss_weights", '{"gep": 0.01, "views": 1.0}', "--cls_shortcut", "true", "--max_tokens", "40")


@pytest.fixture(scope="module")
def trained(small_census, tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("views") / "run"
    trainer, data_module, _ = prepare(small_census, folder, *VIEWS, *EVERY_4, "--learning_rate", "3e-3")
    trainer.train()
    return trainer, data_module, folder


def test_the_loss_follows_its_formula_and_only_cells_of_one_domain_are_negatives():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 5).unbind()
    first.requires_grad_()
    domains = torch.tensor([0, 0, 1, 1, 1, 2])
    losses = contrast_views(first, second, 0.2, domains)
    for cell in range(6):
        others = [other for other in range(6) if domains[other] == domains[cell]]
        there = [F.cosine_similarity(first[cell], second[other], dim=0) / 0.2 for other in others]
        back = [F.cosine_similarity(second[cell], first[other], dim=0) / 0.2 for other in others]
        at = others.index(cell)
        expected = -(torch.stack(there).log_softmax(0)[at] + torch.stack(back).log_softmax(0)[at]) / 2
        assert losses[cell].item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses[5] == 0  # it has no negatives
    losses.sum().backward()
    assert torch.isfinite(first.grad).all()
    assert torch.equal(contrast_views(first, second, 0.2), contrast_views(first, second, 0.2, torch.zeros(6)))


def views_model(padded: bool, bucketed: bool = False, **config):
    """Return the output of a small model for packed or padded batches of the same cells, and the batch."""
    source = make_cells([20, 20], n_genes=60)
    source.table["dataset_id"] = ["a"] * 20 + ["b"] * 20
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist(), max_tokens=31)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = ScGPTForPreTraining(
        ScGPTConfig(
            vocab_size=processor.vocab_size,
            pad_token_id=processor.pad_id,
            n_domains=2,
            batch_key="dataset_id",
            dropout=0.0,
            loss_weights={"gep": 0.5, "views": 1.0},
            **sizes,
            **config,
        )
    )
    stream = StreamConfig(
        seed=0,
        mask_ratios=(0.5,),
        view_keep=(0.5,),
        padded=padded,
        bucketed=bucketed,
        categories={"domain_ids": ("dataset_id", {"a": 0, "b": 1})},
    )
    (batch,) = stream_cells(source, [plan_validation(source.cell_ids, 40)], processor, stream)
    return model, batch


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_packed_padded_and_bucketed_batches_give_the_same_loss_and_gradients():
    results = []
    for case in ("packed", "padded", "bucketed", "checkpointing"):
        model, batch = views_model(case == "padded", case == "bucketed")
        if case == "checkpointing":
            model.gradient_checkpointing_enable()
        output = model.train()(**batch)
        output.loss.backward()
        results.append((output.losses, {name: weight.grad for name, weight in model.named_parameters()}))
    losses, gradients = results[0]
    assert losses["views"] > 0
    for other_losses, other_gradients in results[1:]:
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(other_losses[name].item(), rel=1e-5), name
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_with_the_objective_needs_the_second_views():
    model, batch = views_model(padded=False)
    with pytest.raises(ValueError, match=r"view_input_ids are missing.*view_keep"):
        model(**{key: value for key, value in batch.items() if not key.startswith("view_")})


def test_a_batch_has_the_same_first_view_with_and_without_second_views(small_census, tmp_path):
    plain = next(iter(prepare(small_census, tmp_path / "plain", "--max_tokens", "40")[1].train(0)))
    both = next(iter(prepare(small_census, tmp_path / "views", *VIEWS)[1].train(0)))
    for key, value in plain.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(both[key])), key
    assert both["num_cells_in_batch"] == len(both["domain_ids"]) == 32
    assert len(both["view_cu_seq_lens_q"]) == 33
    assert not any(key.startswith("view_") for key in plain)


def test_the_run_learns_to_find_the_second_view(trained):
    trainer, _, folder = trained
    lines = [line for line in read_metrics(folder) if "views" in line]
    assert np.mean([line["views"] for line in lines[-3:]]) < np.mean([line["views"] for line in lines[:3]])
    assert (
        trainer.validate()["views"] == [line for line in read_metrics(folder) if "eval_views" in line][-1]["eval_views"]
    )


def test_resumed_equals_uninterrupted(small_census, trained, tmp_path):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*QUIET, "--learning_rate", "3e-3", "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(small_census, folder, *VIEWS, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="'view_keep'"):
        prepare(small_census, folder, *VIEWS, *flags, "--view_keep", "0.5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--view_keep", "0"), "view_keep above 0"),
        (("--view_keep", "0.5", "1.5"), "view_keep above 0"),
        (("--view_temperature", "0"), "view_temperature is 0"),
    ],
)
def test_settings_out_of_range_raise(small_census, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(small_census, tmp_path / "run", *VIEWS, *flags)
