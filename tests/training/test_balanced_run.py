"""Training on balanced epochs: shares of groups, exact resume, repeats with other masks, a cache, the dry run."""

import shutil
from collections import Counter

import pytest
import torch

from scgpt_hf.cells.source import open_source
from scgpt_hf.pretraining import describe_pretraining
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import EVERY_4, QUIET, TINY, prepare, weights_of

BALANCED = ("--balance_by", "cell_type", "--balance_power", "1")


@pytest.fixture(scope="module")
def census(small_cells, tmp_path_factory):
    """Cells of which every tenth B cell and one NK cell in five are left, and some have no cell type."""
    from scgpt_hf.cells.soma.build import build_census

    folder = tmp_path_factory.mktemp("rare")
    paths = []
    for cells, name in zip(small_cells, ("first", "second"), strict=True):
        cells = cells.copy()
        cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
        rank = cells.obs.groupby("cell_type").cumcount()
        kept = ~((cells.obs["cell_type"] == "B cell") & (rank % 10 > 0))
        kept &= ~((cells.obs["cell_type"] == "NK cell") & (rank % 5 > 0))
        cells = cells[kept].copy()
        cells.obs.loc[(cells.obs["cell_type"] == "monocyte") & (rank[kept] % 4 == 0), "cell_type"] = "unknown"
        paths.append(folder / f"{name}.h5ad")
        cells.write_h5ad(paths[-1])
    return build_census(paths, folder / "soma")


@pytest.fixture(scope="module")
def trained(census, tmp_path_factory):
    folder = tmp_path_factory.mktemp("balanced") / "run"
    trainer, data, _ = prepare(census, folder, *BALANCED, "--per_device_train_batch_size", "8", *EVERY_4)
    trainer.train()
    return trainer, data, folder


def drawn_types(census, data) -> tuple[Counter, Counter]:
    """Number of cells, and of cells visited in the first epoch, of each cell type."""
    cell_type = open_source(census).obs(["cell_type"])["cell_type"].astype(str)
    steps = [data.schedule.cells(step) for step in range(data.schedule.epoch_ends[0])]
    visited = [cell for step in steps for cell in step.tolist()]
    return Counter(cell_type[data.selection.parts["train"]]), Counter(cell_type[visited])


def test_groups_are_visited_equally_often_and_unknown_cells_once(census, trained):
    _, data, _ = trained
    cells, visited = drawn_types(census, data)
    known = {name: n for name, n in cells.items() if name != "unknown"}
    assert min(known.values()) < max(known.values()) / 4
    dropped = data.first_plan.n_dropped
    for name in known:
        assert abs(visited[name] - sum(known.values()) / len(known)) <= 1 + dropped
    assert cells["unknown"] - dropped <= visited["unknown"] <= cells["unknown"]
    # Natural order still validates: each held-out cell once.
    assert trained[0].validate()["cells"] == len(data.selection.parts["validation"])


def test_repeats_of_a_cell_show_other_masks(trained):
    _, data, _ = trained
    steps = data.schedule.epoch_ends[0]
    shown: dict[int, list[tuple]] = {}
    for step, batch in zip(range(steps), data.train(0), strict=False):
        bounds = batch["cu_seq_lens_q"].tolist()
        for cell, start, stop in zip(data.schedule.cells(step).tolist(), bounds, bounds[1:], strict=False):
            tokens = (batch["input_ids"][0, start:stop].tolist(), batch["values"][0, start:stop].tolist())
            shown.setdefault(cell, []).append(tuple(map(tuple, tokens)))
    repeated = {cell: views for cell, views in shown.items() if len(views) > 1}
    assert len(repeated) > 5
    for views in repeated.values():
        assert len({genes for genes, _ in views}) == 1  # the same cell: it has fewer genes than max_tokens
        assert len(set(views)) == len(views)


def test_resumed_equals_uninterrupted_and_keeps_the_groups(census, trained, tmp_path, monkeypatch):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    flags = ("--per_device_train_batch_size", "8", *QUIET, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(census, folder, *BALANCED, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(uninterrupted)[name]), name
    with pytest.raises(ValueError, match=r"started with \{'balance_power': 1.0.*found \{'balance_power': 0.5"):
        prepare(census, folder, "--balance_by", "cell_type", *flags)
    with pytest.raises(ValueError, match=r"started with \{'balance_by': 'cell_type'"):
        prepare(census, folder, *flags)


def test_relabelled_cells_cannot_resume(census, trained, monkeypatch):
    from scgpt_hf.cells.soma.census import CensusSource

    original = CensusSource.obs

    def relabelled(self, columns=()):
        obs = original(self, columns)
        return obs.assign(cell_type=obs["cell_type"].to_numpy()[::-1]) if "cell_type" in columns else obs

    monkeypatch.setattr(CensusSource, "obs", relabelled)
    with pytest.raises(ValueError, match="balanced_cells"):
        prepare(census, trained[2], *BALANCED, "--resume_from_checkpoint", "latest")


def test_one_process_of_8_equals_two_micro_batches_of_4(census, tmp_path):
    weights = []
    for name, sizes in {"one": ("8", "1"), "two": ("4", "2")}.items():
        flags = ("--per_device_train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1], "--dropout", "0")
        trainer, *_ = prepare(census, tmp_path / name, *BALANCED, *flags, "--max_steps", "6", *QUIET)
        trainer.train()
        weights.append(weights_of(trainer))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


def test_a_cache_written_in_a_balanced_epoch_holds_every_cell(census, tmp_path):
    flags = (*BALANCED, "--per_device_train_batch_size", "8", "--cache_dir", str(tmp_path / "cache"), *QUIET)
    trainer, data, _ = prepare(census, tmp_path / "run", *flags)
    trainer.train()
    cached = open_source(tmp_path / "cache").obs().index
    assert sorted(cached) == sorted([*data.selection.parts["train"], *data.selection.parts["validation"]])


def test_the_dry_run_reports_cells_and_draws_of_each_group(census, tmp_path):
    flags = [*TINY, "--data", str(census), "--output_dir", str(tmp_path / "run"), *BALANCED, "--dry_run", "true"]
    text = describe_pretraining(parse_settings(flags))
    (line,) = [line for line in text.splitlines() if line.strip().startswith("balance")]
    assert "B cell" in line
    assert "T cell" in line
    assert "cells without a label, each once" in line
    assert "(" not in line  # four groups are listed completely


def test_settings_of_balancing_are_checked(census, tmp_path):
    with pytest.raises(ValueError, match="no column 'celltype'; name another one with --balance_by"):
        prepare(census, tmp_path / "run", "--balance_by", "celltype")
    with pytest.raises(ValueError, match=r"balance_power from 0 to 1, found 1\.5"):
        prepare(census, tmp_path / "run", "--balance_power", "1.5")
