"""Settings: one parser for flags and YAML, and no silent typo."""

from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

from scgpt_hf.training.settings import Settings, TrainingSettings, parse_settings, settings_yaml
from tests.support import ROOT


def parse(*arguments: str) -> Settings:
    return parse_settings([*arguments, "--use_cpu", "true"], "test")


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "data: {n_hvg: 7, n_bins: 11}\nmodel: {hidden_size: 32}\ntraining: {learning_rate: 3e-4}\n")
    settings = parse(path, "--n_bins", "21")
    assert (settings.data.n_hvg, settings.data.n_bins, settings.data.max_tokens) == (7, 21, 1201)
    assert settings.model.hidden_size == 32
    assert settings.training.learning_rate == 3e-4  # YAML reads 3e-4 as text


def test_saved_settings_mean_the_same_run(tmp_path):
    first = parse(
        "--data", "a.h5ad", "b.h5ad", "--hvg_batch_key", "assay", "--loss_weights", '{"gep": 2}', "--adam_beta2", "0.9"
    )
    again = parse(write(tmp_path, settings_yaml(first)))
    assert again.data == first.data
    assert again.model == first.model
    assert again.training.to_dict() == first.training.to_dict()


def test_none_is_kept_where_the_default_is_something(tmp_path):
    assert parse(write(tmp_path, "data: {hvg_batch_key: null}\n")).data.hvg_batch_key is None


def test_words_that_the_library_knows_are_saved_as_they_were_written(tmp_path):
    words = ["--lr_scheduler_type", "cosine", "--debug", "underflow_overflow", "--report_to", "none"]
    again = parse(write(tmp_path, settings_yaml(parse(*words))))
    assert (again.training.lr_scheduler_type, again.training.debug) == ("cosine", ["underflow_overflow"])


@pytest.mark.filterwarnings("ignore")  # of names that the library will drop
@pytest.mark.parametrize("field", fields(TrainingSettings), ids=lambda field: field.name)
@pytest.mark.parametrize("value", ["nan", "-5", "1e400", "9" * 30])
def test_absurd_numbers_end_in_an_error_or_settings(field, value, capsys):
    """What settings are made of is checked later; here, nothing else than our error and argparse's may come."""
    with suppress(ValueError, OSError, SystemExit):
        parse(f"--{field.name}", value)


def test_credentials_are_not_saved():
    settings = parse("--hub_token", "secret-token-value")
    assert "secret-token-value" not in settings_yaml(settings)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_config_of_the_repository_parses(name):
    assert parse(str(ROOT / "configs" / name)).data.data


def test_the_demo_config_is_what_no_argument_means():
    said, default = parse(str(ROOT / "configs" / "demo.yaml")), parse()
    assert (said.data, said.model) == (default.data, default.model)
    assert said.training.to_dict() == default.training.to_dict()


def test_the_seed_recipe_is_the_paper_of_the_seed():
    seed = parse(str(ROOT / "configs" / "blood_300k.yaml"))
    assert (seed.data.max_cells, seed.data.n_hvg, seed.data.n_bins, seed.data.max_tokens) == (300_000, 1200, 51, 1201)
    assert seed.data.mask_ratios == [0.25, 0.5, 0.75]
    shape = (
        seed.model.num_hidden_layers,
        seed.model.hidden_size,
        seed.model.num_attention_heads,
        seed.model.intermediate_size,
    )
    assert shape == (12, 512, 8, 512)
    assert (seed.training.num_train_epochs, seed.training.learning_rate, seed.training.lr_decay_per_epoch) == (
        6,
        1e-4,
        0.9,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {n_hgv: 7}", "unknown setting 'n_hgv' in section 'data'.*did you mean 'n_hvg'"),
        ("dta: {n_hvg: 7}", "unknown section 'dta'.*did you mean 'data'"),
        ("training: {hidden_size: 7}", "unknown setting 'hidden_size' in section 'training'"),
        ("n_hvg: 7", "expected .* to hold the sections data, model, training"),
        ("data: [1, 2", "cannot read .* as YAML"),
        ("data: " + "[" * 5000, "cannot read .* as YAML"),
        ("data: &all {data: *all}", "it has an alias"),
        ("data: {validation_fraction: 1.5}", "validation_fraction between 0 and 1, found 1.5"),
        ("data: {mask_ratios: [0.5, 1.0]}", "mask_ratios between 0 and 1"),
        ("model: {loss_weights: '{gep'}", "loss_weights as JSON"),
        ("model: {loss_weights: '5'}", "loss_weights as names with numbers, found 5"),
        ("data: {max_cells: 0}", "expected max_cells finite, >= 1"),
        ("training: {num_train_epochs: .inf}", "expected num_train_epochs finite, >= 0 and < 100,000, found inf"),
        ("training: {learning_rate: .nan}", "expected learning_rate finite, >= 0, found nan"),
        ("training: {adam_beta1: 1}", "expected adam_beta1 finite, >= 0 and < 1, found 1"),
        ("training: {save_total_limit: -1}", "expected save_total_limit finite, >= 1"),
        ("training: {cpu_threads: 100000}", "expected cpu_threads finite, >= 0 and < 1,024"),
        ("training: {seed: -1}", "expected seed finite, >= 0"),
        (
            "training: {save_strategy: steps, save_steps: 0, load_best_model_at_end: false}",
            "expected save_steps > 0, found 0",
        ),
        ("training: {hub_strategy: all_checkpoints}", "hub_strategy 'all_checkpoints' would publish optimiser states"),
        ("training: {torch_compile_mode: fastest}", "torch_compile_mode is 'fastest'; choose one of default, reduce-"),
        ("training: {label_smoothing_factor: 0.1}", "label_smoothing_factor is for classes"),
        ("training: {report_to: nowhere}", r"report_to names \['nowhere'\], which is not installed or unknown"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(write(tmp_path, text))


def test_bad_values_and_flags_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(write(tmp_path, "data: {n_bins: many}"))
    assert "--n_bins" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown setting '--hiden_size'; did you mean 'hidden_size'\?"):
        parse("--hiden_size", "3")
    with pytest.raises(ValueError, match="no settings file"):
        parse("absent.yaml")
