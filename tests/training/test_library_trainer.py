"""The seam to `transformers.Trainer`: its methods have the signatures we rely on, and one class overrides them.

When a new release of transformers fails here, read what changed in the method that the test names, adapt
`LibraryTrainer`, and update the table.
"""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer

from scgpt_hf.training import trainer as pretraining_trainer
from scgpt_hf.training.fault_tolerance import trainer as fault_tolerant_trainer
from scgpt_hf.training.fault_tolerance.trainer import FaultTolerantTrainer
from scgpt_hf.training.finetuning import classifier
from scgpt_hf.training.finetuning.classifier import ClassifierTrainer
from scgpt_hf.training.library_trainer import LibraryTrainer
from scgpt_hf.training.trainer import ScGPTTrainer

# Parameters after `self`, in order, all of them positional or keyword.
OVERRIDDEN = {
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "get_train_dataloader": "",
    "set_initial_training_values": "args dataloader",
    "get_batch_samples": "epoch_iterator num_batches device",
    "_get_num_items_in_batch": "batch_samples device",
    "_prepare_input": "data",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "training_step": "model inputs num_items_in_batch",
    "_get_grad_norm": "model grad_norm",
    "log": "logs start_time",
    "create_optimizer": "model",
    "get_decay_parameter_names": "model",
    "create_scheduler": "num_training_steps optimizer",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "_save_checkpoint": "model trial",
    "_get_output_dir": "trial",
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_push_from_checkpoint": "checkpoint_folder",
}
# We replace these completely and ignore their arguments: it is enough that they exist.
REPLACED = {"create_model_card", "init_hf_repo", "push_to_hub"}
# Private methods that `LibraryTrainer` calls but does not override.
CALLED = {
    "_determine_best_metric": "metrics trial",
    "_prepare_inputs": "inputs",
    "_finish_current_push": "",
}
OUR_TRAINERS = (FaultTolerantTrainer, ScGPTTrainer, ClassifierTrainer)
MODULES = (fault_tolerant_trainer, pretraining_trainer, classifier)


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_library_has_the_signature_we_rely_on(name):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers.Trainer has no method {name} any more"
    _, *parameters = inspect.signature(method).parameters.values()
    expected = {**OVERRIDDEN, **CALLED}[name].split()
    found = [parameter.name for parameter in parameters]
    assert found == expected, f"transformers.Trainer.{name} takes {found}, we rely on {expected}"
    assert {parameter.kind for parameter in parameters} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", sorted(REPLACED))
def test_the_library_has_the_methods_that_we_replace(name):
    assert callable(getattr(Trainer, name, None))


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_each_override_takes_what_the_library_passes(name):
    _, *parameters = inspect.signature(getattr(LibraryTrainer, name)).parameters.values()
    assert [parameter.name for parameter in parameters] == OVERRIDDEN[name].split()


def test_the_tables_list_all_overrides():
    overridden = {name for name, value in vars(LibraryTrainer).items() if inspect.isfunction(value)} & set(dir(Trainer))
    assert overridden - {"__init__"} == OVERRIDDEN.keys() | REPLACED


def test_the_library_calls_what_we_override():
    """A method that the library no longer calls would silently lose its effect."""
    source = inspect.getsource(inspect.getmodule(Trainer))
    entry_points = {"train", "evaluate", "save_model", "push_to_hub", "create_model_card", "log"}
    for name in OVERRIDDEN.keys() | REPLACED:
        assert name in entry_points or f"self.{name}(" in source, f"the library does not call {name} any more"


@pytest.mark.parametrize("trainer", OUR_TRAINERS)
def test_our_trainers_override_only_hooks(trainer):
    ours = {name for name in vars(trainer) if not name.startswith("__")}
    assert not ours & set(dir(Trainer))


@pytest.mark.parametrize("module", MODULES)
def test_our_trainers_call_no_private_method_of_the_library(module):
    tree = ast.parse(Path(module.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")}
    assert not used & set(dir(Trainer)) - {"__init__"}


def test_every_override_says_why():
    for name in OVERRIDDEN:
        assert "        # " in inspect.getsource(vars(LibraryTrainer)[name]), name
