"""The tests that transformers has for all of its models, applied to ours. `scripts/conformance.py` runs this file.

It needs the package `transformers_tests`, which the script downloads, so the default run of pytest does not collect it.
`ADAPTED` lists the tests that this file overrides, with the reason.
"""

import copy
import tempfile
from typing import Any
from unittest import TestCase

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging
from transformers_tests import test_modeling_common

from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel

ADAPTED = {
    "test_load_with_mismatched_shapes": "the original test calls the encoder without values, which ours needs",
    "test_sdpa_can_dispatch_non_composite_models": "the default is scgpt_varlen, so sdpa is requested by name",
    "test_eager_matches_sdpa_inference": "sets only the epsilon that exists; ScGPTConfig rejects other settings",
}
PAD, CLS, VOCABULARY, DOMAINS = 0, 1, 63, 5  # <pad> is first, because some tests shorten the vocabulary

# The tests use these lists to find out which models have a loss, which classify, and which are an encoder only.
modeling_auto.MODEL_MAPPING_NAMES["scgpt"] = "ScGPTModel"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["scgpt"] = "ScGPTForSequenceClassification"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["scgpt"] = "ScGPTForPreTraining"


def set_layer_norm_eps(config: PreTrainedConfig) -> None:
    """Set a large epsilon so that small variances do not amplify differences, as the library's function does."""
    config.layer_norm_eps = 1.0


test_modeling_common.set_config_for_less_flaky_test = set_layer_norm_eps


class ScGPTModelTester:
    """A tiny model and a batch, with the attribute names that the library's tests use."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.batch_size, self.seq_length = 13, 7
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.is_training = True

    def get_config(self) -> ScGPTConfig:
        return ScGPTConfig(
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ScGPTConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(2, VOCABULARY, shape)
        input_ids[:, 0] = CLS
        values = torch.randint(1, 51, shape).float()
        batch = {"input_ids": input_ids, "values": values, "attention_mask": torch.ones(shape, dtype=torch.bool)}
        config = self.get_config()
        if config.n_domains:
            batch["domain_ids"] = torch.randint(config.n_domains, (self.batch_size,))
        return config, batch


class ScGPTModelTest(test_modeling_common.ModelTesterMixin, TestCase):
    """The model with the settings of the paper."""

    all_model_classes = (ScGPTModel, ScGPTForPreTraining, ScGPTForSequenceClassification)
    additional_model_inputs = ("values",)
    # The library skips this test for old models, which it detects by the year in the file header. Ours has none.
    test_can_init_all_missing_weights_before_2023 = True
    settings: dict[str, Any] = {}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = ScGPTModelTester(**self.settings)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is ScGPTForPreTraining:
            inputs["labels"] = torch.ones_like(inputs["values"])
        if return_labels and model_class is ScGPTForSequenceClassification:
            inputs["labels"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64)
        return inputs

    def test_sdpa_can_dispatch_non_composite_models(self) -> None:
        for model_class in self.all_model_classes:
            for requested, expected in ((None, "scgpt_varlen"), ("sdpa", "sdpa"), ("eager", "eager")):
                config = self.model_tester.get_config()
                model = model_class._from_config(config, attn_implementation=requested)
                assert model.config._attn_implementation == expected

    def test_load_with_mismatched_shapes(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        with tempfile.TemporaryDirectory() as folder:
            ScGPTForSequenceClassification(config).save_pretrained(folder)
            config.vocab_size = 10
            for load, changed in (
                (AutoModelForSequenceClassification, {"num_labels": 42}),
                (AutoModel, {"config": config}),
            ):
                with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                    load.from_pretrained(folder, **changed)
                with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
                    model = load.from_pretrained(folder, ignore_mismatched_sizes=True, **changed)
                assert "Reinit due to size mismatch" in log.out
                assert model(**(inputs | {"input_ids": inputs["input_ids"] % 10}))[0].isfinite().all()


class ScGPTEveryOptionTest(ScGPTModelTest):
    """The model with every head, domain-specific norms, the category value encoder and pre-norm."""

    additional_model_inputs = ("values", "domain_ids")
    settings = {  # noqa: RUF012
        "norm_scheme": "pre",
        "value_encoder": "category",
        "explicit_zero_prob": True,
        "input_norm": "domain",
        "n_domains": DOMAINS,
        "domain_embedding": True,
        "domain_head": True,
    }
