"""Valid inputs of every kind, random damage to them, and the check that opening them fails with our errors.

`tests/faults` checks a few seeds of each kind, `benchmarks/fuzz.py` many.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from anndata import AnnData

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.selection.splits import load_split, save_split
from scgpt_hf.cells.source import open_source
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pretrained import load_model
from scgpt_hf.publishing.card import model_card
from scgpt_hf.publishing.publish_run import collect_files
from scgpt_hf.publishing.record import read_metrics
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.fault_tolerance.checkpoints import Manifest, write_checkpoint
from scgpt_hf.training.fault_tolerance.ranks import Ranks
from scgpt_hf.training.run_folder import resolve_checkpoint
from scgpt_hf.training.selection import load_selection
from scgpt_hf.training.settings_parsing import parse_settings, settings_yaml

Rng = np.random.Generator

JUNK: list[Any] = [
    *(None, True, -1, 0, 10**30, 0.5, float("nan"), "", "x" * 300, "3", "../../etc/passwd", "/etc/passwd", "\x00"),
    *([], [[]], [None], ["a", 1], {}, {"a": {"b": [{}]}}, {"__class__": "x"}, [10**9] * 3),
]


def make_inputs(cells: list[AnnData], census: Path, folder: Path) -> Path:
    """Write one valid input of each kind: cells.h5ad, soma, cache, and a run with a model and a checkpoint."""
    cells[0].write_h5ad(folder / "cells.h5ad")
    shutil.copytree(census, folder / "soma")
    run = folder / "run"
    run.mkdir()
    settings = settings_yaml(parse_settings(["--data", "cells.h5ad", "--seed", "1", "--use_cpu", "true"], ""))
    (run / "settings.yaml").write_text(settings)
    with open_source(census) as source:  # type: ignore[attr-defined]
        obs, genes = source.obs(["donor_id"]), source.genes["feature_id"].tolist()
        described = {**source.describe(), "steps": {"seed": 1}, "genes": genes, "domains": []}
    donors = obs["donor_id"].astype(str)
    held_out = donors == sorted(set(donors))[0]
    parts = {"train": obs.index[~held_out].to_numpy(), "validation": obs.index[held_out].to_numpy()}
    save_split(run / "split.json", parts, obs, seed=1, source=described)
    lines = [{"step": step, "epoch": step / 2, "loss": 1.0 / step, "seconds": 1.0} for step in (1, 2)]
    lines.append({"step": 2, "epoch": 1.0, "eval_loss": 0.5, "eval_gep_mse": 0.5, "seconds": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"steps": 2, "best": lines[-1], "train_cells": 3, "composition": {"assay": {"v3": 3}}, "data": described}
    (run / "summary.json").write_text(json.dumps(summary))
    processor = ScGPTProcessor.from_genes(genes)
    config = ScGPTConfig(
        vocab_size=processor.vocab_size,
        pad_token_id=processor.pad_id,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    ScGPTForPreTraining(config).save_pretrained(run / "best_model")
    processor.save_pretrained(run / "best_model")
    with write_checkpoint(run, Manifest(2, 1, [(64, 2)]), Ranks(1, 0, timeout_s=1)) as staging:
        shutil.copytree(run / "best_model", staging, dirs_exist_ok=True)
    with open_source(census) as source:  # type: ignore[attr-defined]
        write_cache(source, folder / "cache")
    return folder


def damage_bytes(path: Path, rng: Rng) -> str:
    """Truncate a file, flip or zero some of its bytes, or empty it; return a description of the damage."""
    content = bytearray(path.read_bytes())
    how = ("cut", "flip", "zero", "empty")[rng.integers(4)]
    start = int(rng.integers(max(len(content), 1)))
    if how == "cut":
        content = content[:start]
    elif how == "flip" and content:
        for place in rng.integers(len(content), size=3):
            content[place] ^= 1 << int(rng.integers(8))
    elif how == "zero":
        content[start : start + 64] = bytes(len(content[start : start + 64]))
    else:
        content = bytearray()
    path.write_bytes(content)
    return f"{how} {path.name} at {start}"


def damage_tree(content: Any, rng: Rng) -> Any:
    """Return JSON content with one value replaced by junk, one key removed, or one key added."""
    junk = JUNK[rng.integers(len(JUNK))]
    inner = (
        list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    )
    if not inner or rng.random() < 0.15:
        return junk
    key = inner[rng.integers(len(inner))]
    changed = content.copy()
    roll = rng.random()
    if roll < 0.6:
        changed[key] = damage_tree(content[key], rng)
    elif roll < 0.8:
        del changed[key]
    elif isinstance(changed, dict):
        changed["unexpected"] = junk
    else:
        changed.append(junk)
    return changed


def damage_json(path: Path, rng: Rng) -> str:
    """Damage a JSON or YAML file as text or in its content."""
    if rng.random() < 0.3:
        return damage_bytes(path, rng)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        place = int(rng.integers(len(lines)))
        lines[place] = json.dumps(damage_tree(json.loads(lines[place]), rng))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(damage_tree(yaml.safe_load(text), rng)))
    else:
        path.write_text(json.dumps(damage_tree(json.loads(text), rng)))
    return f"content of {path.name}: {path.read_text()[:200]}"


def damage_h5ad(path: Path, rng: Rng) -> str:
    """Remove parts of an .h5ad file, or write wrong values into it."""
    if rng.random() < 0.25:
        return damage_bytes(path, rng)
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        kind = ("drop", "junk", "values", "attrs")[rng.integers(4)]
        arrays = [name for name in names if isinstance(file[name], h5py.Dataset)]
        name = (names if kind in ("drop", "attrs") else arrays)[
            rng.integers(len(names if kind in ("drop", "attrs") else arrays))
        ]
        if kind == "drop":
            del file[name]
        elif kind == "attrs":
            for attribute in list(file[name].attrs):
                if rng.random() < 0.5:
                    del file[name].attrs[attribute]
                else:
                    file[name].attrs[attribute] = ("csc_matrix", 3, [1, 2], "dict")[rng.integers(4)]
        elif kind == "junk":
            del file[name]
            file[name] = (np.zeros(3), np.zeros((0, 4)), "text", np.array([-5, 10**12]), np.float32(7))[rng.integers(5)]
        else:
            array = file[name]
            if array.shape and array.dtype.kind in "iuf" and array.size:
                values = array[...]
                wrong = [-1, 2**31 - 1] + ([np.nan, np.inf, 0.5] if array.dtype.kind == "f" else [])
                value = np.array(wrong[rng.integers(len(wrong))]).astype(values.dtype)
                values.ravel()[rng.integers(values.size, size=2)] = value
                array[...] = values
    return f"{kind} {name}"


def read_source(path: Path) -> None:
    """Open a source and read all cells with all obs columns."""
    source = open_source(path)
    try:
        source.describe()
        block = source.read(source.obs(source.obs_columns).index.to_numpy(np.int64), source.obs_columns)
        assert block.counts.indices.max(initial=0) < len(source.genes)
    finally:
        getattr(source, "close", lambda: None)()


def use_model(folder: Path) -> None:
    """Load a model and its processor, and embed two cells."""
    model, processor = load_model(folder, device="cpu")
    counts = np.ones((2, len(processor.genes)), np.float32)
    model(**processor(counts, processor.genes))


def any_file(folder: Path, rng: Rng) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files[rng.integers(len(files))]


def damage_folder(folder: Path, rng: Rng) -> str:
    """Damage or remove a file, or remove a folder, of a SOMA, a cache or a checkpoint."""
    if rng.random() < 0.5:
        return damage_bytes(any_file(folder, rng), rng)
    path = any_file(folder, rng)
    path = path.parent if rng.random() < 0.5 and path.parent != folder else path
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"removed {path.relative_to(folder)}"


def damage_cache(folder: Path, rng: Rng) -> str:
    """Damage a cache, sometimes with a manifest that matches the damaged shard, as in a cache from the internet."""
    manifest = folder / "manifest.json"
    roll = rng.random()
    if roll < 0.3:
        return damage_folder(folder, rng)
    if roll < 0.5:
        return damage_json(manifest, rng)
    content = json.loads(manifest.read_text())
    shard = content["shards"][0]
    done = damage_bytes(folder / shard["file"], rng)
    damaged = (folder / shard["file"]).read_bytes()
    shard |= {"sha256": hashlib.sha256(damaged).hexdigest(), "n_bytes": len(damaged)}
    manifest.write_text(json.dumps(content))
    return f"{done}, with a matching hash"


def damage_model(folder: Path, rng: Rng) -> str:
    """Damage or remove a file of a saved model."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in {".json", ".safetensors"}]
    path = files[rng.integers(len(files))]
    if rng.random() < 0.2:
        path.unlink()
        return f"removed {path.name}"
    return damage_bytes(path, rng) if path.suffix == ".safetensors" else damage_json(path, rng)


CASES: dict[str, tuple[str, Callable[[Path, Rng], str], Callable[[Path], object]]] = {
    "h5ad": ("cells.h5ad", damage_h5ad, read_source),
    "soma": ("soma", damage_folder, read_source),
    "cache": ("cache", damage_cache, read_source),
    "checkpoint": ("run/checkpoint-2", damage_folder, lambda path: resolve_checkpoint(path.parent, "latest")),
    "settings": ("run/settings.yaml", damage_json, lambda path: parse_settings([str(path)], "")),
    "split": ("run/split.json", damage_json, lambda path: (load_split(path), load_selection(path))),
    "metrics": ("run/metrics.jsonl", damage_json, lambda path: (read_metrics(path), model_card(path.parent))),
    "summary": ("run/summary.json", damage_json, lambda path: model_card(path.parent)),
    "card": ("run/settings.yaml", damage_json, lambda path: model_card(path.parent)),
    "publishing": ("run/best_model", damage_model, lambda path: collect_files(path.parent, "my-lab/name")),
    "model": ("run/best_model", damage_model, use_model),
}


def digest(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(name: str, inputs: Path, folder: Path, seed: int) -> str:
    """Damage a copy of an input, open it and return a description of the outcome.

    Raises:
        AssertionError: opening it neither succeeded nor raised our error, or it changed files.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    place, damage, use = CASES[name]
    copy = folder / "inputs"
    if "run" in place:
        shutil.copytree(inputs / "run", copy / "run")
    elif (inputs / place).is_dir():
        shutil.copytree(inputs / place, copy / place)
    else:
        copy.mkdir(parents=True)
        shutil.copy(inputs / place, copy / place)
    damaged = damage(copy / place, rng)
    before = digest(folder)
    try:
        use(copy / place)
        outcome = "accepted"
    except (ValueError, OSError) as error:
        outcome = f"{type(error).__name__}: {error}"
        names = {Path(place).name, *(path.name for path in copy.rglob("*"))}
        if name != "settings" and not any(one in str(error) for one in names):
            raise AssertionError(f"{name} {seed}: {damaged}: the error names no file: {error}") from error
    except SystemExit as error:  # argparse prints the flag to stderr
        outcome = f"exit {error.code}"
        assert name == "settings", f"{name} {seed}: {damaged}"
    except BaseException as error:
        raise AssertionError(f"{name} {seed}: {damaged}: {type(error).__name__}: {error}") from error
    assert digest(folder) == before, f"{name} {seed}: {damaged}: changed the disk"
    return f"{damaged} -> {outcome}"
