"""The lines of a run on the terminal: short, one for each validation, with the baselines."""

import doctest
import io
from contextlib import redirect_stdout

from transformers import PrinterCallback, ProgressCallback

from scgpt_hf.training.validation import progress
from scgpt_hf.training.validation.progress import TerminalProgress, format_log
from tests.support.training import prepare


def test_the_examples_run():
    assert doctest.testmod(progress).failed == 0


def test_a_run_prints_one_line_for_each_step_and_validation(small_census, tmp_path):
    trainer, _, _ = prepare(small_census, tmp_path / "run")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(TerminalProgress) == 1
    assert not {ProgressCallback, PrinterCallback} & set(kinds)
    with redirect_stdout(io.StringIO()) as output:
        trainer.train()
    lines = output.getvalue().splitlines()
    assert len(lines) >= 3
    assert max(map(len, lines)) <= 80
    assert not any("{" in line for line in lines)
    validations = [line for line in trainer.state.log_history if "eval_loss" in line]
    text = " ".join(output.getvalue().split())
    assert text.count("validation:") == len(validations)
    for logged in validations:
        assert f"gep_mse {logged['eval_gep_mse']:.4g}" in text
        assert f"(gene mean {logged['eval_gene_mean_mse']:.4g}, constant {logged['eval_constant_mse']:.4g})" in text


def test_baselines_stand_beside_the_errors_that_they_compare_with():
    metrics = {"eval_gep_mse": 199.2, "eval_counts": 36.26, "eval_gene_mean_mse": 152.9, "eval_constant_mse": 203.4}
    assert format_log(17, metrics).splitlines() == [
        "step 17  validation: gep_mse 199.2 (gene mean 152.9, constant 203.4)",
        "    counts 36.26",
    ]


def test_totals_of_the_library_are_not_printed():
    assert format_log(10, {"train_runtime": 3.0, "train_loss": 1.0, "epoch": 2.0}) == ""
