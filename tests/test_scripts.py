"""Every script as a user starts it: in a separate process, on two processes if it can use them."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.support import ROOT

SMALL = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
    *("--min_gene_counts", "1", "--validation_fraction", "0.3", "--num_train_epochs", "2", "--logging_steps", "4"),
    *("--per_device_train_batch_size", "16", "--disable_tqdm", "true", "--cpu_threads", "1"),
    *("--loss_weights", '{"gep": 1.0, "gepc": 1.0}', "--cls_shortcut", "false", "--shortcut_steps", "0"),
]
SECRETS = {
    "HF_TOKEN": "hf_plantedtoken",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key",
}
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments. `accelerate launch` uses CPUs only if the environment says so."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


def script(name: str) -> str:
    return str(ROOT / "scripts" / f"{name}.py")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_help_is_complete(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script(name), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script(name), run_name="__main__")
    assert not ended.value.code
    assert len(capsys.readouterr().out) > 300


@pytest.fixture(scope="module")
def finished(small_census, tmp_path_factory):
    """A run on two processes, from a local Census to the model card, with credentials in its environment."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    arguments = [script("pretrain"), "--data", str(small_census), "--output_dir", str(folder), *SMALL]
    arguments += ["--hub_token", SECRETS["HF_TOKEN"]]
    done = run(*TWO_PROCESSES, *arguments, ACCELERATE_USE_CPU="true", **SECRETS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout + done.stderr


def test_pretraining_on_two_processes_writes_all_files(finished):
    folder, output = finished
    names = {
        *("best_model", "settings.yaml", "split.json", "metrics.jsonl", "summary.json"),
        *("loss.png", "umap.png", "report.html", "README.md"),
    }
    assert names <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["global_batch_size"] == 32
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "gep" in line]
    assert losses[-1] < losses[0]
    assert output.count("Everything is in") == 1
    assert (folder / "loss.png").read_bytes()[:4] == (folder / "umap.png").read_bytes()[:4] == b"\x89PNG"


def test_two_processes_learn_what_one_does(small_census, tmp_path):
    arguments = ["--data", str(small_census), "--output_dir", str(tmp_path / "one"), *SMALL, "--use_cpu", "true"]
    done = run(
        script("pretrain"), *arguments, "--per_device_train_batch_size", "32", "--dropout", "0", "--max_steps", "4"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = run(
        *TWO_PROCESSES, script("pretrain"), "--data", str(small_census), "--output_dir", str(tmp_path / "two"), *SMALL,
        "--dropout", "0", "--max_steps", "4", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]

    def lines(run: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    for one, other in zip(lines("one"), lines("two"), strict=True):
        for name in ("loss", "gep", "gepc", "eval_loss", "eval_gene_mean_mse", "eval_tie_floor_mse"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_second_run_into_the_folder_is_rejected_and_a_resumed_run_continues(finished, small_census):
    folder, _ = finished
    arguments = [script("pretrain"), "--data", str(small_census), "--output_dir", str(folder), *SMALL]
    arguments += ["--use_cpu", "true"]
    rejected = run(*arguments)
    assert rejected.returncode != 0
    assert "--resume_from_checkpoint latest" in rejected.stderr
    assert "Traceback" not in rejected.stderr

    # One process instead of two, so twice the cells each: the same steps.
    more = ["--resume_from_checkpoint", "latest", "--num_train_epochs", "3", "--per_device_train_batch_size", "32"]
    resumed = run(*arguments, *more)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 3


def test_wrong_settings_end_in_one_line_without_a_traceback(tmp_path, small_census):
    cases = {
        "unknown setting '--n_hgv'; did you mean 'n_hvg'": ["--n_hgv", "3"],
        "do not exist": ["--data", str(tmp_path / "absent.h5ad")],
        "no_such_column": ["--data", str(small_census), "--obs_filter", "no_such_column == 1"],
        "galore_torch": ["--data", str(small_census), "--optim", "galore_adamw"],  # rejected when the optimizer is made
    }
    for message, flags in cases.items():
        done = run(script("pretrain"), "--use_cpu", "true", "--output_dir", str(tmp_path / "run"), *flags)
        assert done.returncode != 0
        assert message in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert not any((tmp_path / "run").rglob("*"))


def test_the_demo_dry_run_writes_nothing(tmp_path):
    done = run(script("pretrain"), "--use_cpu", "true", "--output_dir", str(tmp_path / "runs" / "demo"), "--dry_run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Nothing was written" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_embed_writes_the_vectors_of_every_cell(finished, small_cells, tmp_path):
    import anndata

    folder, _ = finished
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    done = run(
        script("embed"),
        str(tmp_path / "cells.h5ad"),
        "--model",
        str(folder / "best_model"),
        "--out",
        str(tmp_path / "out.h5ad"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scgpt"].shape == (small_cells[0].n_obs, 16)


def test_build_census_writes_a_census_that_pretraining_reads(small_cells, tmp_path):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    done = run(script("build_census"), str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "census"))
    assert done.returncode == 0, done.stderr[-2000:]
    flags = ["--data", str(tmp_path / "census"), "--output_dir", str(tmp_path / "run"), *SMALL, "--use_cpu", "true"]
    dry = run(script("pretrain"), *flags, "--dry_run")
    assert dry.returncode == 0, dry.stderr[-2000:]


def test_jobs_of_an_array_write_a_cache_and_keep_one_of_other_cells(small_census, tmp_path):
    arguments = [
        script("cache_census"),
        str(small_census),
        str(tmp_path / "cache"),
        "--obs_filter",
        "disease == 'normal'",
    ]
    ends = []
    for job in ("--shard=1/2", "--shard=0/2", "--finish"):
        done = run(*arguments, job)
        assert done.returncode == 0, done.stderr[-2000:]
        ends.append(done.stdout)
    assert "is complete; train on it with --data" in ends[-1]
    refused = run(script("cache_census"), str(small_census), str(tmp_path / "cache"))
    assert refused.returncode != 0
    assert "holds different data (cells: expected 270" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_interrupted_cache_reports_how_to_continue(small_census, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scgpt_hf.cli.job_arguments.write_shards", interrupt)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script("cache_census"))["main"]([str(small_census), str(tmp_path / "cache")])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_that_write_a_cache_learn_the_same_as_one_that_reads_it(small_census, tmp_path):
    shared = ["--data", str(small_census), *SMALL, "--cache_dir", str(tmp_path / "cache"), "--dropout", "0"]
    two = run(
        *TWO_PROCESSES, script("pretrain"), *shared, "--output_dir", str(tmp_path / "two"), ACCELERATE_USE_CPU="true"
    )
    assert two.returncode == 0, two.stderr[-3000:]
    more = ["--output_dir", str(tmp_path / "one"), "--use_cpu", "true", "--per_device_train_batch_size", "32"]
    one = run(script("pretrain"), *shared, *more)
    assert one.returncode == 0, one.stderr[-3000:]
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "gep" in line
        ]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not (tmp_path / "cache" / ".jobs").exists()


def test_no_credential_is_in_a_run_folder_or_in_the_output_of_a_run(finished):
    folder, output = finished
    written = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        "output": output.encode()
    }
    assert any("checkpoint-" in path for path in written)
    assert not [(path, name) for path, text in written.items() for name in SECRETS if SECRETS[name].encode() in text]


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    code = "\n".join(blocks)
    done = run("-c", f"{code}\nprint(adata.obsm['X_scgpt'].shape)")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(700, 128)" in done.stdout
