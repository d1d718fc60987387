"""What a model reads while training: fewer tokens than in use, masked genes left out, values that are no bins."""

import numpy as np
import pytest
import torch

from scgpt_hf.pipeline.stream import lengths_of
from scgpt_hf.pretraining import pretrain
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import QUIET, TINY, assert_resumes_exactly, prepare, weights_of

COUNTS_ONLY = ("--loss_weights", '{"counts": 1.0}', "--cls_shortcut", "true")
LEFT_OUT = ("--leave_out_masked", "true", "--mask_ratios", "0.9", "--loss_weights", '{"gepc": 0.01, "counts": 1.0}')


def lengths(batches) -> list[int]:
    return [length for batch in batches for length in lengths_of(batch).tolist()]


def test_training_samples_fewer_tokens_than_validation(small_census, tmp_path):
    _, data, _ = prepare(small_census, tmp_path / "run", "--train_tokens", "20", "--max_tokens", "60", *COUNTS_ONLY)
    batches = list(data.train(0))
    assert max(lengths(batches)) == 20
    assert max(lengths(data.validation())) == max(lengths(data.unmasked())) == 60
    # The targets of the count decoder are complete: they have more genes than the tokens.
    assert min(np.bincount(batches[0]["count_cells"])) > 20
    # The first epoch and the second one sample other genes of the same cells.
    genes = [set(batch["input_ids"].flatten().tolist()) for batch in batches]
    first, second = genes[: len(genes) // 2], genes[len(genes) // 2 :]
    assert first != second


def test_train_tokens_of_max_tokens_change_nothing(small_census, tmp_path):
    streams = [
        list(prepare(small_census, tmp_path / name, "--max_tokens", "40", *flags)[1].train(0))
        for name, flags in {"default": (), "same": ("--train_tokens", "40")}.items()
    ]
    for one, other in zip(*streams, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_more_train_tokens_than_max_tokens_are_refused(small_census, tmp_path):
    with pytest.raises(ValueError, match=r"train_tokens <= max_tokens, found 2,000 > 1,201"):
        prepare(small_census, tmp_path / "run", "--train_tokens", "2000")


def test_a_run_with_sampled_tokens_resumes_exactly_and_keeps_their_number(small_census, tmp_path):
    assert_resumes_exactly(small_census, tmp_path, "--train_tokens", "20", *COUNTS_ONLY)
    flags = (*COUNTS_ONLY, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"started with \{'train_tokens': 20\}, found \{'train_tokens': 30\}"):
        prepare(small_census, tmp_path / "run", "--train_tokens", "30", *flags)


def test_the_encoder_reads_visible_genes_only_if_masked_ones_are_left_out(small_census, tmp_path):
    _, data, _ = prepare(small_census, tmp_path / "out", *LEFT_OUT)
    _, kept, _ = prepare(small_census, tmp_path / "in", *LEFT_OUT, "--leave_out_masked", "false")
    for batch, full in zip(data.train(0), kept.train(0), strict=True):
        visible = full["labels"] == IGNORE
        assert torch.equal(batch["input_ids"], full["input_ids"][visible][None])
        assert torch.equal(batch["values"], full["values"][visible][None])
        assert torch.equal(batch["label_ids"], full["input_ids"][~visible])
        assert torch.equal(batch["labels"], full["labels"][~visible])
        n_genes = lengths_of(full) - 1
        n_masked = torch.bincount(batch["label_cells"], minlength=len(n_genes))
        assert torch.equal(n_masked, (0.9 * n_genes.double()).floor().long())
        assert torch.equal(lengths_of(batch), 1 + n_genes - n_masked)


def test_runs_with_left_out_genes_measure_the_same_baselines(small_census, tmp_path):
    out, *_ = prepare(small_census, tmp_path / "out", *LEFT_OUT)
    kept, *_ = prepare(small_census, tmp_path / "in", *LEFT_OUT, "--leave_out_masked", "false")
    assert out.baselines == kept.baselines
    assert out.validate()["gepc_mse"] > out.baselines.tie_floor_mse


def test_a_run_with_left_out_genes_learns_resumes_exactly_and_keeps_the_setting(small_census, tmp_path):
    resumed = assert_resumes_exactly(small_census, tmp_path, *LEFT_OUT)
    lines = [line for line in resumed.state.log_history if "counts" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    other = (*LEFT_OUT, "--leave_out_masked", "false", "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match=r"started with \{'leave_out_masked': True\}"):
        prepare(small_census, tmp_path / "run", *other)


def test_one_batch_of_32_equals_four_of_8_accumulated(small_census, tmp_path):
    weights = []
    for name, sizes in {"one": ("32", "1"), "four": ("8", "4")}.items():
        flags = ("--per_device_train_batch_size", sizes[0], "--gradient_accumulation_steps", sizes[1], "--dropout", "0")
        trainer, *_ = prepare(small_census, tmp_path / name, *LEFT_OUT, *flags, *QUIET)
        trainer.train()
        weights.append(weights_of(trainer))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=2e-3, atol=2e-4, msg=name)


def test_gep_of_left_out_genes_is_refused_before_data_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"leave_out_masked=True gives masked genes no hidden state.*without gep"):
        prepare(tmp_path / "no such data", tmp_path / "run", "--leave_out_masked", "true")


LOG1P = ("--input_style", "log1p")


def test_baselines_of_log1p_values_have_no_tie_floor_and_heads_start_at_their_mean(small_census, tmp_path):
    trainer, data, _ = prepare(small_census, tmp_path / "run", *LOG1P)
    values = torch.cat([batch["values"][batch["values"] > 0] for batch in data.unmasked()])
    assert trainer.model.expression_head.value[-1].bias.item() == pytest.approx(values.mean().item(), rel=0.02)
    assert trainer.baselines.tie_floor_mse == 0
    assert trainer.baselines.gene_mean_mse < trainer.baselines.constant_mse
    assert trainer.baselines.constant_mse == pytest.approx(values.var().item(), rel=0.2)


def test_a_run_with_log1p_values_resumes_exactly(small_census, tmp_path):
    assert_resumes_exactly(small_census, tmp_path, *LOG1P)


def test_a_run_with_log1p_values_names_its_unit(small_census, tmp_path):
    flags = [*TINY, *LOG1P, "--data", str(small_census), "--output_dir", str(tmp_path / "complete")]
    reports = []
    pretrain(parse_settings([*flags, "--num_train_epochs", "1"]), report=reports.append)
    card = (tmp_path / "complete" / "README.md").read_text()
    assert "mean squared error in log1p values" in reports[0]
    assert "Expression values are log(1 + normalised count)" in card
    assert "GEP MSE, log1p values squared" in card
    assert "tie floor" not in card + reports[0]


def test_a_table_of_bins_refuses_log1p_values_before_data_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"'category' has a row for each bin.*'log1p' makes no bins"):
        prepare(tmp_path / "no such data", tmp_path / "run", *LOG1P, "--value_encoder", "category")
