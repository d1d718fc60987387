"""Make a run folder with stand-ins for weights and code, and run scripts inside a test process."""

import io
import json
import logging
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

AUTO_MAP = {"AutoConfig": "configuration_scgpt.ScGPTConfig", "AutoModel": "modeling_scgpt.ScGPTModel"}
SECRET = "hf_secret"
FILES_OF_A_MODEL = {
    "config.json": json.dumps({"model_type": "scgpt", "auto_map": AUTO_MAP}),
    "configuration_scgpt.py": "# config",
    "model.safetensors": "weights" * 100,
    "modeling_scgpt.py": "# model",
    "processing_scgpt.py": "# processor",
    "processor_config.json": json.dumps(
        {"auto_map": {"AutoProcessor": "processing_scgpt.ScGPTProcessor"}, "cls_value": 0.0}
    ),
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
}
RECORD = {"metrics.jsonl", "loss.png", "umap.png", "settings.yaml", "split.json", "README.md"}


def make_run(folder: Path) -> Path:
    """Write a complete run, including files that must not be published, and return its folder."""
    for name, content in FILES_OF_A_MODEL.items():
        for parent in (folder / "best_model", folder / "checkpoint-10"):
            parent.mkdir(parents=True, exist_ok=True)
            (parent / name).write_text(content)
    never_published = (
        "best_model/training_args.bin",
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/trainer_state.json",
        "checkpoint-10/manifest.json",
        "checkpoint-10/losses_0.json",
        "notes.txt",
    )
    for name in never_published:
        (folder / name).write_text(SECRET)
    data = {"data": [str(folder.parent / "cells.h5ad")], "cls_value": 0.0}
    training = {"output_dir": str(folder), "learning_rate": 1e-4, "hub_token": SECRET}
    (folder / "settings.yaml").write_text(yaml.safe_dump({"data": data, "training": training}))
    source = {"kind": "h5ad", "paths": [str(folder.parent / "cells.h5ad")], "census_version": None}
    parts = {"train": {"donors": ["a", "b"]}, "validation": {"donors": ["c"]}}
    (folder / "split.json").write_text(json.dumps({"source": source, "parts": parts}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "eval_loss": 2.0, "eval_gep_mse": 90.5}\n')
    (folder / "summary.json").write_text(json.dumps({"train_cells": 600, "data": source}))
    for name in ("loss.png", "umap.png"):
        (folder / name).write_bytes(b"\x89PNG")
    return folder


class Finished(NamedTuple):
    """The exit code and the output of a script."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: Path, arguments: list[str], token: str) -> Finished:
    """Run a script in this process, which saves the seconds of its imports.

    Args:
        script: to run.
        arguments: of the command line.
        token: value of HF_TOKEN.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setenv("HF_TOKEN", token)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(logging.getLogger(), "handlers", [])  # handlers of an earlier run write to its stderr
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as exit_:
            stderr.write(str(exit_))
            return Finished(1, stdout.getvalue(), stderr.getvalue())
    return Finished(0, stdout.getvalue(), stderr.getvalue())
