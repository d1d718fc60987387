"""Any number of jobs embeds the same cells into the same Parquet files, even if jobs are killed."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from scgpt_hf.analysis.embed_census import embed_census, hash_encoder, plan_embeddings
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.jobs.records import ShardError
from scgpt_hf.cells.jobs.shard_jobs import write_shards
from scgpt_hf.cells.source import CellSource, open_source
from scgpt_hf.cli.embed import main
from scgpt_hf.inference import embed_cells
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.caches import contents, make_cells
from tests.support.embedding_jobs import SETTINGS, embedded_cells, embedding_model, plan_jobs, write_job
from tests.support.killed_jobs import write_with_killed_jobs
from tests.support.ray_jobs import run_on_ray

FILES = [f"data-{shard:05d}-of-00003.parquet" for shard in range(3)]


@pytest.fixture(scope="module")
def source() -> CellSource:
    return embedded_cells()


@pytest.fixture(scope="module")
def one(source: CellSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one job writes."""
    folder = tmp_path_factory.mktemp("embedded") / "one"
    assert write_shards(plan_embeddings(source, folder, *embedding_model(), **SETTINGS))
    return folder


@pytest.fixture(scope="module")
def expected(source: CellSource) -> np.ndarray:
    model, processor = embedding_model()
    return embed_cells(source, np.arange(5000), model, processor, batch_size=64, empty="nan", progress=False)


def test_the_files_hold_every_cell_with_its_obs_and_vector(one, expected):
    assert sorted(contents(one)) == ["_embeddings.json", *FILES]
    table = pd.read_parquet(one)
    assert list(table) == ["soma_joinid", "donor_id", "embedding"]
    assert table["soma_joinid"].tolist() == list(range(5000))
    assert table["donor_id"].tolist() == [str(cell // 1000) for cell in range(5000)]
    vectors = np.stack(table["embedding"])
    assert vectors.dtype == np.float32
    n_empty = int(np.isnan(expected[:, 0]).sum())
    assert 0 < n_empty < 500
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_datasets_opens_the_files_with_vectors_of_fixed_length(one, expected, tmp_path):
    files = str(one / "*.parquet")
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(dataset) == 5000
    assert dataset.features["embedding"].length == 8
    assert dataset.features["embedding"].feature.dtype == "float32"
    np.testing.assert_allclose(dataset.with_format("numpy")[4321]["embedding"], expected[4321], atol=2e-6)


def test_the_manifest_records_the_model_the_settings_and_the_genes(one):
    manifest = json.loads((one / "_embeddings.json").read_text())
    assert manifest["embedding"]["encoder"] == hash_encoder(*embedding_model())
    assert manifest["embedding"]["batch_size"] == 200
    assert manifest["report"]["genes"]["by_id"] == 10
    assert [shard["n_cells"] for shard in manifest["shards"]] == [2048, 2048, 904]


@pytest.mark.parametrize("n_jobs", [2, 5])
def test_any_number_of_jobs_in_any_order_writes_the_same_bytes(source, one, tmp_path, n_jobs):
    jobs = plan_embeddings(source, tmp_path / "many", *embedding_model(), **SETTINGS)
    done = [write_shards(jobs, (job, n_jobs), progress=False) for job in reversed(range(n_jobs))]
    assert done[-1]
    assert contents(tmp_path / "many") == contents(one)


def test_jobs_that_are_killed_while_they_write_flush_and_rename_write_the_same_bytes(one, tmp_path):
    assert write_with_killed_jobs(write_job, tmp_path / "many", seed=0, last_event=30) >= 3
    assert contents(tmp_path / "many") == contents(one)


def test_finished_files_are_not_written_again_and_missing_ones_are_named(source, one, tmp_path):
    jobs = plan_embeddings(source, tmp_path / "out", *embedding_model(), **SETTINGS)
    assert not write_shards(jobs, (1, 3), progress=False)
    with pytest.raises(ShardError, match=f"lacks 2 of 3 files: {FILES[0]}, {FILES[2]}"):
        jobs.require_finished()
    written = (tmp_path / "out" / FILES[1]).stat().st_mtime_ns
    assert write_shards(jobs, progress=False)
    assert (tmp_path / "out" / FILES[1]).stat().st_mtime_ns == written
    assert contents(tmp_path / "out") == contents(one)


def test_a_corrupt_file_raises_and_is_written_again_if_requested(source, one, tmp_path):
    jobs = plan_embeddings(source, tmp_path / "out", *embedding_model(), **SETTINGS)
    write_shards(jobs, progress=False)
    content = bytearray((one / FILES[1]).read_bytes())
    content[100] ^= 4
    (tmp_path / "out" / FILES[1]).write_bytes(content)
    with pytest.raises(ShardError, match=f"{FILES[1]} is corrupt"):
        write_shards(jobs, progress=False)
    assert write_shards(jobs, rewrite=True, progress=False)
    assert contents(tmp_path / "out") == contents(one)


@pytest.mark.parametrize(
    ("seed", "changes", "message"),
    [
        (1, {}, "encoder"),
        (0, {"dtype": "float16"}, "float16"),
        (0, {"normalize": False}, "normalize"),
        (0, {"columns": []}, "obs_columns"),
        (0, {"cells_per_shard": 4096}, "cells_per_shard: expected 4096, found 2048"),
    ],
)
def test_embeddings_of_another_model_or_with_other_settings_raise_and_are_left_alone(
    source, one, seed, changes, message
):
    before = contents(one)
    with pytest.raises(ShardError, match=f"holds different data.*{message}"):
        write_shards(plan_embeddings(source, one, *embedding_model(seed), **SETTINGS | changes))
    assert contents(one) == before


def test_embeddings_of_other_cells_raise(one):
    filtered = open_source(make_cells(n_cells=5000), obs_filter="donor_id == '1'")
    with pytest.raises(ShardError, match=r"obs_filter: .*donor_id == '1'"):
        write_shards(plan_embeddings(filtered, one, *embedding_model(), **SETTINGS))


def test_float16_halves_the_vectors_and_rounds_them(source, expected, tmp_path):
    jobs = plan_embeddings(source, tmp_path / "out", *embedding_model(), **SETTINGS | {"dtype": "float16"})
    assert write_shards(jobs, progress=False)
    vectors = np.stack(pd.read_parquet(tmp_path / "out")["embedding"])
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected, rtol=5e-4, atol=1e-4)


def test_a_census_and_a_cache_of_it_give_the_same_vectors(small_census, small_cells, tmp_path):
    model, processor = embedding_model()
    write_cache(open_source(small_census), tmp_path / "cache")
    tables = []
    for address, name in ((small_census, "of_census"), (tmp_path / "cache", "of_cache")):
        columns = ["cell_type", "dataset_id"]
        assert embed_census(address, tmp_path / name, model, processor, columns=columns, empty="nan", progress=False)
        tables.append(pd.read_parquet(tmp_path / name))
    obs = pd.concat([part.obs for part in small_cells], ignore_index=True)
    primary = obs[obs["is_primary_data"]]
    assert tables[0]["soma_joinid"].tolist() == primary.index.tolist()
    assert tables[0]["cell_type"].tolist() == primary["cell_type"].tolist()
    pd.testing.assert_frame_equal(*(table.explode("embedding") for table in tables))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["organ"]}, "organ"),
        ({"dtype": "float64"}, "float64"),
        ({"cells_per_shard": 1000}, "2,048.*1,000"),
        ({"empty": "raise"}, "express no gene"),
    ],
)
def test_settings_that_cannot_be_used_raise(source, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_shards(plan_embeddings(source, tmp_path / "out", *embedding_model(), **SETTINGS | changes))


def test_the_hash_of_an_encoder_depends_on_weights_config_and_vocabulary_and_not_on_its_place(tmp_path):
    model, processor = embedding_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert hash_encoder(*load_model(tmp_path)) == hash_encoder(model, processor)
    others = [
        (embedding_model(1)[0], processor),
        (model, ScGPTProcessor.from_genes(processor.genes[::-1], max_tokens=8)),
        (model, ScGPTProcessor.from_genes(processor.genes, max_tokens=9)),
    ]
    assert len({hash_encoder(*pair) for pair in [(model, processor), *others]}) == 4


def test_the_command_embeds_a_census_in_jobs_and_names_what_is_missing(small_census, tmp_path, capsys):
    model, processor = embedding_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = [str(small_census), "--model", str(tmp_path / "model"), "--out", str(out), "--columns", "cell_type"]
    command += ["--empty", "nan"]
    with pytest.raises(SystemExit, match=r"lacks 1 of 1 files: data-00000-of-00001\.parquet"):
        main([*command, "--finish"])
    main([*command, "--shard", "1/2"])
    assert "this job is finished" in capsys.readouterr().out
    main([*command, "--shard", "0/2"])
    assert f"{out} is complete: 270 cells" in capsys.readouterr().out
    assert list(pd.read_parquet(out)) == ["soma_joinid", "cell_type", "embedding"]


@pytest.mark.parametrize(
    ("data", "option", "message"),
    [
        ("cells.h5ad", ["--ray"], "--ray does not apply to cells.h5ad, which is a file"),
        ("census://latest/mouse", ["--overwrite"], "--overwrite does not apply to census://latest/mouse, which is no"),
    ],
)
def test_the_command_refuses_options_that_do_not_apply(data, option, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([data, "--out", "out", *option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_cluster_whose_workers_are_killed_in_the_middle_of_a_shard_writes_the_same_files(one, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'scgpt_hf[cluster]'")
    assert "complete True" in run_on_ray(plan_jobs, tmp_path / "many", [2, 7, 9])
    assert (tmp_path / "events").read_text() == "", "workers were killed less often than planned"
    assert contents(tmp_path / "many") == contents(one)
