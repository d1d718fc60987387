"""`torch.export` and ONNX exports of padded models accept any number of cells and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel

MODELS = (ScGPTModel, ScGPTForPreTraining, ScGPTForSequenceClassification)
SHAPES = ((3, 7), (1, 2), (9, 40))
ANY_SIZE = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "values", "attention_mask")}


# A model as `ScGPTForPreTraining` trains it with the objective "counts".
WITH_COUNTS = {
    "loss_weights": {"gep": 1.0, "counts": 1.0},
    "cls_shortcut": True,
    "shortcut_size": 8,
    "count_head_size": 8,
    "n_domains": 3,
}


def random_batch(n_cells: int, n_tokens: int) -> dict[str, torch.Tensor]:
    """Return random padded cells; the last one is shorter."""
    mask = torch.ones(n_cells, n_tokens, dtype=torch.bool)
    mask[-1, n_tokens // 2 + 1 :] = False
    values = torch.randint(51, (n_cells, n_tokens)).float()
    return {"input_ids": torch.randint(17, (n_cells, n_tokens)), "values": values, "attention_mask": mask}


@pytest.mark.parametrize("settings", [{}, WITH_COUNTS], ids=["", "counts"])
@pytest.mark.parametrize("attention", ["scgpt_varlen", "eager"])
@pytest.mark.parametrize("model_class", MODELS)
def test_an_exported_model_accepts_any_number_of_cells_and_tokens(
    config: Callable[..., ScGPTConfig], tmp_path: Path, model_class: Any, attention: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = model_class._from_config(config(**settings), attn_implementation=attention).eval()
    with torch.no_grad():
        exported = torch.export.export(model, (), random_batch(3, 7), dynamic_shapes=ANY_SIZE)
        torch.export.save(exported, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for shape in SHAPES:
            cells = random_batch(*shape)
            torch.testing.assert_close(loaded(**cells).to_tuple(), model(**cells).to_tuple())


@pytest.mark.filterwarnings("ignore")  # raised by the exporter
@pytest.mark.parametrize("settings", [{}, WITH_COUNTS], ids=["", "counts"])
@pytest.mark.parametrize("model_class", MODELS)
def test_a_model_in_onnx_gives_the_same_numbers(
    config: Callable[..., ScGPTConfig], tmp_path: Path, model_class: Any, settings: dict[str, Any]
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = model_class._from_config(config(**settings)).eval()
    with torch.no_grad():
        program = torch.onnx.export(model, (), kwargs=random_batch(3, 7), dynamic_shapes=ANY_SIZE, dynamo=True)
        program.save(tmp_path / "model.onnx")
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        for shape in SHAPES:
            cells = random_batch(*shape)
            found = session.run(None, {name: tensor.numpy() for name, tensor in cells.items()})
            for values, expected in zip(found, model(**cells).to_tuple(), strict=True):
                torch.testing.assert_close(torch.from_numpy(values), expected, atol=1e-4, rtol=1e-4)
