"""Muon as one optimizer with AdamW, which weights decay, and exact resume."""

import copy
import shutil

import pytest
import torch
from torch import nn

from scgpt_hf.training.optimization.optimizers import MuonWithAdamW, matrix_names
from tests.support.training import EVERY_4, QUIET, prepare, weights_of

MUON = ("--optim", "muon", "--weight_decay", "0.01", "--cls_shortcut", "true")


def test_the_parts_update_as_torchs_own_optimizers_do_also_after_loading_a_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    twin = copy.deepcopy(model)
    options = {"learning_rate": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}

    def make(module: nn.Sequential) -> MuonWithAdamW:
        matrices = [weight for weight in module.parameters() if weight.ndim == 2]
        others = [weight for weight in module.parameters() if weight.ndim != 2]
        return MuonWithAdamW(
            [{"params": matrices, "weight_decay": 0.1}], [{"params": others, "weight_decay": 0.0}], **options
        )

    together, matrices = make(model), [twin[0].weight, twin[2].weight]
    alone = (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [weight for weight in twin.parameters() if weight.ndim != 2], 1e-2, (0.9, 0.98), weight_decay=0.0
        ),
    )
    for step in range(4):
        if step == 2:  # as a resumed run does
            state = copy.deepcopy(together.state_dict())
            together = make(model)
            together.load_state_dict(state)
        inputs = torch.randn(5, 4)
        for module, optimizers in ((model, (together,)), (twin, alone)):
            module.zero_grad()
            module(inputs).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for ours, torchs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, torchs)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(small_census, tmp_path):
    trainer, *_ = prepare(small_census, tmp_path / "run", *MUON)
    optimizer = trainer.create_optimizer()
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    muon, decayed, rest = ([names[weight] for weight in group["params"]] for group in optimizer.param_groups)
    linear = ("self_attn.qkv_proj", "self_attn.out_proj", "linear1", "linear2")
    assert muon == [f"scgpt.layers.0.{name}.weight" for name in linear]
    assert {"expression_head.value.0.weight", "scgpt.shortcut.mlp.2.weight"} <= set(decayed)
    tables = {"scgpt.gene_encoder.embedding.weight", "scgpt.shortcut.genes.weight"}
    assert tables | {"scgpt.layers.0.norm1.weight", "scgpt.shortcut.state_weight"} <= set(rest)
    assert len(muon) + len(decayed) + len(rest) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]


def test_weight_decay_applies_to_matrices_only(small_census, tmp_path):
    flags = ("--weight_decay", "0.01", "--loss_weights", '{"counts": 1.0}', "--cls_shortcut", "true")
    trainer, *_ = prepare(small_census, tmp_path / "run", *flags)
    optimizer = trainer.create_optimizer()
    decayed = {id(weight) for group in optimizer.param_groups if group["weight_decay"] for weight in group["params"]}
    names = {name for name, weight in trainer.model.named_parameters() if id(weight) in decayed}
    assert names == matrix_names(trainer.model)
    assert "count_head.out.weight" in names
    assert not [name for name in names if "embedding" in name or "bias" in name or "norm" in name]


def test_a_run_with_muon_learns_and_resumes_exactly(small_census, tmp_path):
    full, *_ = prepare(small_census, tmp_path / "full", *MUON, *EVERY_4, "--learning_rate", "3e-3")
    full.train()
    losses = [line["loss"] for line in full.state.log_history if "gep" in line]
    assert losses[-1] < losses[0]
    folder = shutil.copytree(tmp_path / "full", tmp_path / "run")
    flags = (*MUON, *QUIET, "--learning_rate", "3e-3", "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(small_census, folder, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, full.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="'optim': 'muon'"):  # the state of another optimizer is of no use
        prepare(small_census, folder, *QUIET, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
