"""Test how a model is loaded together with its processor, and which pairs are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTModel
from scgpt_hf.pretrained import load_model, load_pretrained, validate_shard_names
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

GENES = [f"ENSG{number:011}" for number in range(12)]


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(GENES)


@pytest.fixture(scope="module")
def checkpoint(processor: ScGPTProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pretraining model, whose heads are expression_head and cell_to_gene_head."""
    folder = tmp_path_factory.mktemp("run") / "best_model"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    torch.manual_seed(0)
    ScGPTForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_loaded_with_its_processor(checkpoint: Path, processor: ScGPTProcessor) -> None:
    model, saved = load_model(checkpoint, device="cpu")
    assert isinstance(model, ScGPTModel)
    assert not model.training
    assert saved.genes == processor.genes


def test_a_pair_that_is_loaded_already_is_returned_as_it_is(checkpoint: Path, processor: ScGPTProcessor) -> None:
    model = ScGPTModel.from_pretrained(checkpoint)
    found = load_model(model, processor)
    assert found[0] is model
    assert found[1] is processor


def test_a_processor_that_is_passed_replaces_the_saved_one(checkpoint: Path) -> None:
    short = ScGPTProcessor.from_genes(GENES, max_tokens=5)
    assert load_model(checkpoint, short, device="cpu")[1] is short


def test_heads_that_were_trained_are_accepted(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, None, AutoModelForPreTraining, heads=("expression_head",), device="cpu")
    assert isinstance(model, ScGPTForPreTraining)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_class": AutoModelForSequenceClassification, "heads": ("class_head",)}, "no trained class_head"),
        ({"heads": ("expression_head", "cell_to_gene_head")}, "ScGPTModel has no expression_head"),
        ({"processor": ScGPTProcessor.from_genes(GENES[:5])}, r"15 genes .* 8"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_raises_an_error(
    checkpoint: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint, device="cpu", **arguments)


def test_a_model_with_a_table_of_bins_needs_as_many_bins_as_the_processor(processor: ScGPTProcessor) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, value_encoder="category", n_bins=11, **sizes
    )
    with pytest.raises(ValueError, match=r"11 bins.* 51"):
        load_model(ScGPTModel(config), processor)
    assert load_model(ScGPTModel(config), ScGPTProcessor.from_genes(GENES, n_bins=11))


def test_parts_that_a_checkpoint_lacks_are_listed(checkpoint: Path) -> None:
    loaded = load_pretrained(checkpoint, AutoModelForSequenceClassification, num_labels=3)
    assert loaded.new_parts == ["class_head"]
    assert load_pretrained(checkpoint, ScGPTForPreTraining).new_parts == []


def test_an_index_must_not_list_files_outside_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    validate_shard_names(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"\.\./other\.safetensors"):
        validate_shard_names(tmp_path)
