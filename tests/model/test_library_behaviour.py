"""The models behave as users of transformers expect, compared with the library's BERT, also in their errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel

Batch = dict[str, torch.Tensor]
AUTO = {
    AutoModel: ScGPTModel,
    AutoModelForPreTraining: ScGPTForPreTraining,
    AutoModelForSequenceClassification: ScGPTForSequenceClassification,
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


@pytest.fixture
def checkpoint(config: Callable[..., ScGPTConfig], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ScGPTForPreTraining(config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def batch(padded: Batch) -> Batch:
    return {name: padded[name] for name in ("input_ids", "values", "attention_mask")}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT of the library with the same size."""
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("auto", AUTO, ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_a_checkpoint_loads_in_the_requested_precision(checkpoint: Path, batch: Batch, auto: Any, keyword: str) -> None:
    half = auto.from_pretrained(checkpoint, **{keyword: torch.bfloat16})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(**batch)[0].dtype == torch.bfloat16
    half.save_pretrained(checkpoint.parent / "half")
    assert auto.from_pretrained(checkpoint.parent / "half", **{keyword: "auto"}).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_does_not_change_results(checkpoint: Path, batch: Batch, device_map: Any) -> None:
    plain = AutoModel.from_pretrained(checkpoint).eval()
    mapped = AutoModel.from_pretrained(checkpoint, device_map=device_map).eval()
    torch.testing.assert_close(mapped(**batch).cell_embedding.cpu(), plain(**batch).cell_embedding)


@pytest.mark.parametrize("auto", AUTO, ids=lambda auto: auto.__name__)
def test_every_attention_gives_the_same_numbers(checkpoint: Path, batch: Batch, auto: Any) -> None:
    found = []
    for attention in (None, "sdpa", "eager"):
        torch.manual_seed(0)  # of the new class head
        model = auto.from_pretrained(checkpoint, attn_implementation=attention).eval()
        assert model.config._attn_implementation == (attention or "scgpt_varlen")
        found.append(model(**batch)[0])
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(**batch)[0], found[-1])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("where", ["call", "config"])
def test_recorded_outputs_equal_those_of_the_library(
    checkpoint: Path, bert: Path, batch: Batch, attention: str, option: str, where: str
) -> None:
    if (attention, option, where) == ("sdpa", "output_attentions", "config"):
        pytest.skip("the library rejects it for both models")
    field, found = option.removeprefix("output_"), []
    for cls, folder in ((BertModel, bert), (ScGPTModel, checkpoint)):
        model = cls.from_pretrained(
            folder, attn_implementation=attention, **({option: True} if where == "config" else {})
        )
        inputs = batch if cls is ScGPTModel else {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model.eval()(**inputs, **({option: True} if where == "call" else {}))
        found.append([states.shape for states in output[field]])
    assert found[0] == found[1]


@pytest.mark.parametrize("auto", AUTO, ids=lambda auto: auto.__name__)
def test_return_dict_false_gives_a_tuple(checkpoint: Path, batch: Batch, auto: Any) -> None:
    model = auto.from_pretrained(checkpoint).eval()
    named, plain = model(**batch), model(**batch, return_dict=False)
    model.config.return_dict = False
    for values in (plain, model(**batch)):
        assert type(values) is tuple
        for value, same in zip(values, named.to_tuple(), strict=True):
            assert torch.equal(value, same)


def test_new_and_unused_weights_are_reported_as_by_the_library(checkpoint: Path, tmp_path: Path) -> None:
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=3, output_loading_info=True
        )
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"class_head"}
    assert {name.split(".")[0] for name in report["unexpected_keys"]} == {"expression_head", "cell_to_gene_head"}
    assert "LOAD REPORT" in log.out
    assert "newly initialized" in log.out
    classifier.save_pretrained(tmp_path / "classifier")
    report = AutoModelForPreTraining.from_pretrained(tmp_path / "classifier", output_loading_info=True)[1]
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"expression_head", "cell_to_gene_head"}
    report = AutoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)[1]
    assert not report["missing_keys"]
    assert {name.split(".")[0] for name in report["unexpected_keys"]} == {"class_head"}


@pytest.mark.parametrize("load", [ScGPTModel.from_pretrained, ScGPTConfig.from_pretrained])
def test_a_checkpoint_of_another_model_raises_with_its_type(bert: Path, load: Any) -> None:
    with pytest.raises(ValueError, match="configuration of a 'bert' model, not of scgpt; load it with AutoModel"):
        load(bert)


def test_an_unknown_saved_setting_raises(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gene_positions": "rotary"}))
    for load in (AutoConfig, AutoModel):
        with pytest.raises(
            ValueError, match="no setting 'gene_positions'; a newer version of scgpt_hf may have saved it"
        ):
            load.from_pretrained(checkpoint)


@pytest.mark.parametrize("setting", [{"norm_scheme": "rms"}, {"dropout": 3}, {"loss_weights": {"gep": 1, "rank": 1}}])
def test_an_unknown_saved_choice_raises_with_the_known_ones(checkpoint: Path, setting: dict[str, Any]) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    for load in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}.*a newer version of scgpt_hf"):
            load.from_pretrained(checkpoint)


def test_weights_of_another_vocabulary_raise(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 25}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(checkpoint)
