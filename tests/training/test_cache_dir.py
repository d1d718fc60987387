"""`--cache_dir`: the same batches from the SOMA and from a cache, be it new, partial or complete, also when resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.cache.reader import CacheSource
from scgpt_hf.pipeline.stream import stream_cells
from scgpt_hf.training.data_module import DataModule
from tests.support.training import prepare, weights_of

FLAGS = ("--num_train_epochs", "3", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "30")
FLAGS += ("--eval_strategy", "no", "--load_best_model_at_end", "false", "--batch_key", "assay", "--dropout", "0.1")


@pytest.fixture(scope="module")
def cached(small_census, tmp_path_factory):
    """A run of three epochs that wrote its cache during the first one."""
    folder = tmp_path_factory.mktemp("run")
    trainer, data_module, _ = prepare(small_census, folder / "run", *FLAGS, "--cache_dir", str(folder / "cache"))
    trainer.train()
    return trainer, data_module, folder


def batches_of(data_module: DataModule) -> list[dict[str, torch.Tensor]]:
    """Return all batches of a run, as the trainer requests them."""
    batches = list(data_module.train(0))
    return batches if len(batches) == data_module.schedule.n_steps else batches + list(data_module.train(len(batches)))


def same(some, others) -> bool:
    return len(some) == len(others) and all(
        one.keys() == other.keys()
        and all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
        for one, other in zip(some, others, strict=True)
    )


def test_a_run_from_the_cache_equals_one_from_the_soma_batch_for_batch(cached, small_census, tmp_path):
    _, data_module, _ = cached
    plans, _ = data_module.schedule.plans_from(0)
    from_soma = list(stream_cells(data_module.source, plans, data_module.processor, data_module.stream_config))
    assert same(batches_of(data_module), from_soma)
    _, fresh, _ = prepare(small_census, tmp_path / "run", *FLAGS, "--cache_dir", str(tmp_path / "cache"))
    assert same(batches_of(fresh), from_soma)


def test_later_epochs_are_shuffled_over_all_cells(cached):
    _, data_module, _ = cached
    first, *later = (segment.plan for segment in data_module.schedule.segments)
    assert len(first.chunk_starts) == -(-300 // CHUNK_SIZE)
    assert all(len(plan.chunk_starts) == len(plan.cell_ids) for plan in later)


def test_the_cache_equals_the_one_that_write_cache_writes(cached, tmp_path):
    _, data_module, folder = cached
    write_cache(data_module.source, tmp_path / "cache", cell_ids=CacheSource(folder / "cache").obs().index.to_numpy())
    for path in (tmp_path / "cache").iterdir():
        assert path.read_bytes() == (folder / "cache" / path.name).read_bytes(), path.name
    assert len(list((folder / "cache").iterdir())) == len(list((tmp_path / "cache").iterdir()))


@pytest.mark.parametrize("cache", ["complete", "absent", "partial"])
@pytest.mark.parametrize("step", [3, 12])
def test_a_resumed_run_equals_an_uninterrupted_one_whatever_is_left_of_the_cache(
    cached, small_census, tmp_path, cache, step
):
    uninterrupted, data_module, folder = cached
    assert step != 12 or data_module.schedule.epoch_ends[0] < 12
    run = shutil.copytree(folder / "run", tmp_path / "run")
    if cache == "complete":
        shutil.copytree(folder / "cache", tmp_path / "cache")
    if cache == "partial":
        _, other, _ = prepare(small_census, tmp_path / "other", *FLAGS, "--cache_dir", str(tmp_path / "cache"))
        next(iter(other.train(0)))
    flags = (*FLAGS, "--save_strategy", "no", "--cache_dir", str(tmp_path / "cache"))
    resumed, _, found = prepare(small_census, run, *flags, "--resume_from_checkpoint", str(run / f"checkpoint-{step}"))
    resumed.train(resume_from_checkpoint=found)
    assert resumed.state.global_step == uninterrupted.state.global_step
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name


def test_a_run_with_a_cache_cannot_resume_without_one(cached, small_census, tmp_path):
    run = shutil.copytree(cached[2] / "run", tmp_path / "run")
    with pytest.raises(ValueError, match=r"\{'cached': True\}"):
        prepare(small_census, run, *FLAGS, "--resume_from_checkpoint", "latest")


def test_a_cache_as_data_is_shuffled_over_all_cells_in_every_epoch(cached, tmp_path):
    folder = cached[2] / "cache"
    trainer, data_module, _ = prepare(folder, tmp_path / "run", *FLAGS)
    assert all(
        len(segment.plan.chunk_starts) == len(segment.plan.cell_ids) for segment in data_module.schedule.segments
    )
    trainer.train()
    assert json.loads((tmp_path / "run" / "split.json").read_text())["source"]["kind"] == "cache"
    with pytest.raises(ValueError, match="cache"):
        prepare(folder, tmp_path / "other", *FLAGS, "--cache_dir", str(tmp_path / "cache"))
    assert not (tmp_path / "other").exists()


def test_a_corrupt_shard_raises_with_its_name(cached, small_census, tmp_path):
    folder = Path(shutil.copytree(cached[2] / "cache", tmp_path / "cache"))
    shard = next(folder.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=shard.name):
        prepare(small_census, tmp_path / "run", *FLAGS, "--cache_dir", str(folder))
