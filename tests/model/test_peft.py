"""LoRA with `peft` on the encoder's linear layers trains, saves, loads and merges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTForSequenceClassification

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# The value encoder has a linear1 and a linear2 too; the numbers select the encoder's layers.
LINEAR_LAYERS = r".*\.layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|linear1|linear2)"
LAYERS = {f"layers.{layer}.{name}" for layer in (0, 1) for name in ("linear1", "linear2")}
LAYERS |= {f"layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("qkv_proj", "out_proj")}


def train(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    """Take 20 steps and return their losses."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("model_class", "task"), [(ScGPTForSequenceClassification, "SEQ_CLS"), (ScGPTForPreTraining, None)]
)
def test_lora_trains_saves_loads_and_merges(
    config: Callable[..., ScGPTConfig], padded: dict[str, torch.Tensor], tmp_path: Path, model_class: Any, task: str
) -> None:
    torch.manual_seed(0)
    base = model_class(config())
    base.save_pretrained(tmp_path / "base")
    inputs = {name: padded[name] for name in ("input_ids", "values", "attention_mask")}
    is_classifier = model_class is ScGPTForSequenceClassification
    labels = padded["class_labels"] if is_classifier else padded["labels"]
    settings = {"task_type": task, "modules_to_save": ["class_head"]} if is_classifier else {}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=LINEAR_LAYERS, **settings))

    changed = {
        name.split(".lora_A")[0].split("scgpt.")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    assert changed == LAYERS
    losses = train(adapted, {**inputs, "labels": labels})
    assert losses[-1] < 0.95 * losses[0]
    expected = adapted.eval()(**inputs)[0]
    adapted.save_pretrained(tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} == {".safetensors", ".json", ".md"}

    loaded = peft.PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**inputs)[0], expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is model_class
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, model_class.from_pretrained(tmp_path / "merged").eval()):
        torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-4)
