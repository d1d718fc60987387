"""Settings: each has one owner, YAML files and flags are checked alike, and a saved file means the same run."""

import inspect
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from scgpt_hf import ScGPTConfig, ScGPTProcessor
from scgpt_hf.training.settings import (
    TOKEN_SETTINGS,
    DataSettings,
    ModelSettings,
    Settings,
    TrainingSettings,
    argument_help,
)
from scgpt_hf.training.settings_parsing import CONFIGS, parse_settings, settings_yaml


def parse(*arguments: str) -> Settings:
    return parse_settings([*arguments, "--use_cpu", "true"])


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_model_settings_have_the_defaults_of_the_config():
    config = ScGPTConfig()
    settings = {owned.name: getattr(ModelSettings(), owned.name) for owned in fields(ModelSettings)}
    weights = settings.pop("loss_weights")
    assert {"hidden_size", "dropout", "max_value"} <= settings.keys()
    assert settings == {name: getattr(config, name) for name in settings}
    assert ScGPTConfig(loss_weights=weights).loss_weights == config.loss_weights


def test_token_settings_have_the_defaults_of_the_processor():
    parameters = inspect.signature(ScGPTProcessor.__init__).parameters
    assert set(TOKEN_SETTINGS) == parameters.keys() - {"self", "tokenizer", "symbols", "modalities"}
    assert all(getattr(DataSettings(), name) == parameters[name].default for name in TOKEN_SETTINGS)


@pytest.mark.parametrize("section", [DataSettings, ModelSettings])
def test_every_setting_has_a_help_text(section):
    assert all(owned.metadata["help"] for owned in fields(section))


def test_help_texts_are_the_descriptions_of_arguments():
    class Documented:
        """Do something.

        Args:
            first: one line, 50 % of it.
            second: a longer text that
                goes on.

        Raises:
            ValueError: never.
        """

    assert argument_help(Documented) == {
        "first": "one line, 50 %% of it",
        "second": "a longer text that goes on",
    }


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, "data: {n_hvg: 7, n_bins: 11}\nmodel: {hidden_size: 32}\ntraining: {learning_rate: 3e-4}\n")
    settings = parse(path, "--n_bins", "21")
    assert (settings.data.n_hvg, settings.data.n_bins, settings.data.max_tokens) == (7, 21, 1201)
    assert (settings.model.hidden_size, settings.model.num_hidden_layers) == (32, ScGPTConfig().num_hidden_layers)
    assert settings.training.learning_rate == 3e-4  # YAML 1.1 reads 3e-4 as text


def test_without_a_yaml_file_the_values_of_the_demo_are_the_base():
    demo, default, changed = parse(str(CONFIGS / "demo.yaml")), parse(), parse("--data", "cells.h5ad")
    assert (demo.data, demo.model) == (default.data, default.model)
    assert demo.training.to_dict() == default.training.to_dict()
    assert (changed.data.data, changed.model) == (["cells.h5ad"], demo.model)
    shape = (default.model.hidden_size, default.model.num_hidden_layers, default.model.intermediate_size)
    assert shape == (64, 2, 128)
    assert (default.training.num_train_epochs, default.training.learning_rate) == (12, 2e-3)


def test_the_configs_of_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("configs/human.yaml").model.hidden_size == 512


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_package_parses(path):
    assert parse(str(path)).data.data


def test_saved_settings_mean_the_same_run(tmp_path):
    first = parse(
        "--data", "a.h5ad", "b.h5ad", "--hvg_batch_key", "assay", "--loss_weights", '{"gep": 2}', "--adam_beta2", "0.9"
    )
    again = parse(write(tmp_path, settings_yaml(first)))
    assert again.data == first.data
    assert again.model == first.model
    assert again.training.to_dict() == first.training.to_dict()


def test_null_is_kept_if_the_default_is_another_value(tmp_path):
    assert parse(write(tmp_path, "data: {hvg_batch_key: null}\n")).data.hvg_batch_key is None


def test_words_that_the_library_turns_into_enumerations_are_saved_as_words(tmp_path):
    words = ["--lr_scheduler_type", "cosine", "--debug", "underflow_overflow", "--report_to", "none"]
    again = parse(write(tmp_path, settings_yaml(parse(*words))))
    assert (again.training.lr_scheduler_type, again.training.debug) == ("cosine", ["underflow_overflow"])


def test_a_single_value_stands_for_a_list_of_one(tmp_path):
    settings = parse(write(tmp_path, "data: {data: demo, mask_ratios: 0.5}\n"))
    assert (settings.data.data, settings.data.mask_ratios) == (["demo"], [0.5])


@pytest.mark.filterwarnings("ignore")  # about names that the library will drop
@pytest.mark.parametrize("field", fields(TrainingSettings), ids=lambda field: field.name)
@pytest.mark.parametrize("value", ["nan", "-5", "1e400", "9" * 30])
def test_absurd_numbers_end_in_an_error_or_in_settings(field, value, capsys):
    with suppress(ValueError, OSError, SystemExit):
        parse(f"--{field.name}", value)


def test_credentials_are_not_saved():
    settings = parse("--hub_token", "secret-token-value")
    assert "secret-token-value" not in settings_yaml(settings)


def test_the_config_of_scgpts_recipe_has_the_values_of_the_paper():
    seed = parse(str(CONFIGS / "blood_300k.yaml"))
    assert (seed.data.max_cells, seed.data.n_hvg, seed.data.n_bins, seed.data.max_tokens) == (300_000, 1200, 51, 1201)
    assert seed.data.mask_ratios == [0.25, 0.5, 0.75]
    model, training = seed.model, seed.training
    assert (model.num_hidden_layers, model.num_attention_heads) == (12, 8)
    assert (model.hidden_size, model.intermediate_size) == (512, 512)
    assert (training.num_train_epochs, training.learning_rate, training.lr_decay_per_epoch) == (6, 1e-4, 0.9)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {n_hgv: 7}", "unknown setting 'n_hgv' in section 'data' of .*settings.yaml; did you mean 'n_hvg'"),
        ("dta: {n_hvg: 7}", "unknown section 'dta' in .*settings.yaml; did you mean 'data'"),
        ("training: {hidden_size: 7}", "unknown setting 'hidden_size' in section 'training'"),
        ("n_hvg: 7", "data, model, training"),
        ("data: [1, 2", "settings.yaml"),
        ("data: " + "[" * 5000, "settings.yaml"),
        ("data: &all {data: *all}", "alias"),
    ],
)
def test_a_file_that_is_not_made_of_sections_and_settings_raises(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        parse(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {n_bins: many}", "expected a whole number for 'n_bins' in section 'data', found 'many'"),
        ("data: {n_bins: 10.5}", "a whole number for 'n_bins'"),
        ("data: {n_bins: true}", "a whole number for 'n_bins'"),
        ("data: {data: {a: 1}}", "a list of values, each text for 'data'"),
        ("data: {mask_ratios: [half]}", "a list of values, each a number for 'mask_ratios'"),
        ("data: {gene_selection: most}", "one of 'hvg', 'all' for 'gene_selection'"),
        ("data: {primary_only: 'yes'}", "true or false for 'primary_only'"),
        ("data: {layer: 3}", "text or null for 'layer'"),
        ("model: {dropout: null}", "a number for 'dropout' in section 'model', found None"),
        ("model: {loss_weights: {gep: much}}", "names with values or text or null for 'loss_weights'"),
        ("training: {eval_strategy: no}", "text for 'eval_strategy'.*found False; put the word in quotes"),
    ],
)
def test_a_value_of_another_type_raises(tmp_path, text, named):
    with pytest.raises(ValueError, match=f"settings.yaml: expected .*{named.removeprefix('expected ')}"):
        parse(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("data: {validation_fraction: 1.5}", "validation_fraction.*1.5"),
        ("data: {mask_ratios: [0.5, 1.0]}", "mask_ratios"),
        ("model: {loss_weights: '{gep'}", "loss_weights as JSON"),
        ("model: {loss_weights: '5'}", "loss_weights.* 5"),
        ("data: {max_cells: 0}", "max_cells"),
        ("training: {num_train_epochs: .inf}", "expected num_train_epochs finite, >= 0 and < 100,000, found inf"),
        ("training: {learning_rate: .nan}", "learning_rate"),
        ("training: {adam_beta1: 1}", "adam_beta1"),
        ("training: {save_total_limit: -1}", "save_total_limit"),
        ("training: {cpu_threads: 100000}", "cpu_threads"),
        ("training: {seed: -1}", "seed"),
        ("training: {save_strategy: steps, save_steps: 0, load_best_model_at_end: false}", "save_steps"),
        ("training: {hub_strategy: all_checkpoints}", "hub_strategy"),
        ("training: {torch_compile_mode: fastest}", "torch_compile_mode"),
        ("training: {label_smoothing_factor: 0.1}", "label_smoothing_factor"),
        ("training: {report_to: nowhere}", "report_to.*nowhere"),
        ("training: {average_tokens_across_devices: false}", "average_tokens_across_devices"),
        ("model: {domain_head: true}", "--batch_key"),
    ],
)
def test_a_value_out_of_range_raises(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        parse(write(tmp_path, text))


def test_wrong_flags_and_absent_files_are_named(capsys):
    with pytest.raises(SystemExit):
        parse("--n_bins", "many")
    assert "--n_bins" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown setting '--hiden_size'; did you mean 'hidden_size'\?"):
        parse("--hiden_size", "3")
    with pytest.raises(ValueError, match=r"absent.yaml; the package has blood_300k.yaml"):
        parse("absent.yaml")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": "half"}'], "half"),
        (["warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": -1}'], "above 0, found -1"),
        (["cosine_with_min_lr"], "min_lr"),
        (["linear", "--lr_scheduler_kwargs", '{"nonsense": 1}'], "nonsense"),
    ],
)
def test_a_learning_rate_schedule_without_its_arguments_raises_before_the_data_are_read(words, named):
    with pytest.raises(ValueError, match=f"lr_scheduler_type '{words[0]}' does not fit .*{named}"):
        parse("--lr_scheduler_type", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["warmup_stable_decay"],
        ["warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 9}'],
        ["polynomial"],
    ],
)
def test_a_complete_learning_rate_schedule_is_accepted(words):
    assert parse("--lr_scheduler_type", *words).training.lr_scheduler_type == words[0]


def test_muon_is_an_optimizer_by_name_and_unknown_names_raise():
    assert parse("--optim", "muon").training.optim == "muon"
    with pytest.raises(ValueError, match=r"optim_args .* has no effect"):
        parse("--optim", "muon", "--optim_args", "momentum=0.8")
    with pytest.raises(ValueError, match="not a valid OptimizerNames"):
        parse("--optim", "moun")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bfloat16 runs on the accelerator")
def test_bfloat16_without_an_accelerator_trains_on_the_cpu() -> None:
    settings = parse_settings(["--precision", "bf16"])
    assert settings.training.bf16
    assert settings.training.device.type == "cpu"
