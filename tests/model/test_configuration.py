"""The configuration: saving and loading, rejected settings, and the estimate of FLOPs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import scgpt_hf
from scgpt_hf.model.configuration_scgpt import AUTO_MAP, PRESETS, ScGPTConfig, training_flops_per_token


def test_defaults_are_those_of_the_paper() -> None:
    config = ScGPTConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (12, 512, 8)
    assert (config.intermediate_size, config.dropout) == (512, 0.2)
    assert config.loss_weights == {"gep": 1.0, "gepc": 1.0}


def test_a_saved_configuration_loads_unchanged(tmp_path: Path) -> None:
    assert scgpt_hf.ScGPTConfig is ScGPTConfig
    config = ScGPTConfig(
        norm_scheme="pre", n_domains=3, domain_head=True, num_labels=5, loss_weights={"gep": 0.5, "dar": 2, "gepc": 0}
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.auto_map == AUTO_MAP


def test_loading_accepts_keywords_of_the_library(tmp_path: Path) -> None:
    ScGPTConfig(architectures=["ScGPTModel"], torch_dtype="float32").save_pretrained(tmp_path)
    loaded = ScGPTConfig.from_pretrained(tmp_path, dtype="bfloat16", num_labels=7, attn_implementation="eager")
    assert (loaded.num_labels, loaded._attn_implementation) == (7, "eager")
    assert ScGPTConfig.from_dict({**loaded.to_dict(), "_written_by": "a tool"}).num_labels == 7


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    assert ScGPTConfig(**PRESETS[name]).hidden_size == PRESETS[name]["hidden_size"]


def test_settings_add_their_objectives() -> None:
    assert ScGPTConfig(explicit_zero_prob=True).has_objective("gepc_zero")
    assert ScGPTConfig(domain_head=True, n_domains=2).has_objective("dar")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hiden_layers": 3}, "did you mean 'num_hidden_layers'"),
        ({"zzz": 3}, "newer version"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"dropout": 1.0}, r"rate in \[0, 1\)"),
        ({"dropout": "much"}, "dropout"),
        ({"norm_scheme": "middle"}, "norm_scheme"),
        ({"loss_weights": {"gpe": 1.0}}, "gpe"),
        ({"loss_weights": {"gep": -1.0}}, "negative"),
        ({"loss_weights": {"gep": float("inf")}}, "not finite"),
        ({"ecs_threshold": float("nan")}, "ecs_threshold is nan"),
        ({"cce_temperature": 0.0}, "cce_temperature is 0.0"),
        ({"explicit_zero_prob": True, "loss_weights": {"gep": 1.0}}, "gep_zero"),
        ({"loss_weights": {"gep": 1.0, "gep_zero": 1.0}}, "explicit_zero_prob=False"),
        ({"domain_head": True, "n_domains": 2, "loss_weights": {"gep": 1.0}}, "'dar'"),
        ({"domain_embedding": True}, "n_domains"),
        ({"input_norm": "domain"}, "n_domains"),
        ({"gepc_query": "sum", "domain_embedding": True, "n_domains": 2}, "domain_embedding"),
        ({"gepc_query": "concat", "explicit_zero_prob": True}, "explicit_zero_prob"),
    ],
)
def test_invalid_settings_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        ScGPTConfig(**settings)


@pytest.mark.parametrize(("mean_tokens", "measured"), [(120, 128e6), (450, 153e6), (1201, 208e6)])
def test_training_flops_equal_those_measured_for_the_seed_model(mean_tokens: int, measured: float) -> None:
    assert training_flops_per_token(ScGPTConfig(), mean_tokens) == pytest.approx(measured, rel=0.02)


def test_an_old_transformers_raises_with_its_version() -> None:
    file = sys.modules[ScGPTConfig.__module__].__file__
    without_strict = "from transformers import configuration_utils as module; del module.strict"
    code = f"{without_strict}; import runpy; runpy.run_path({file!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: models of scgpt need transformers 5.6 or newer, found 5." in done.stderr.splitlines()[-1]
