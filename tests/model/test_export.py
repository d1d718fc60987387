"""`torch.export` of the padded backbone: any number of cells and tokens, saved, loaded, the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from scgpt_hf import ScGPTConfig, ScGPTModel


def cells_of(n_cells: int, n_tokens: int) -> dict[str, torch.Tensor]:
    """Cells of which the last is shorter."""
    mask = torch.ones(n_cells, n_tokens, dtype=torch.bool)
    mask[-1, n_tokens // 2 + 1 :] = False
    values = torch.randint(51, (n_cells, n_tokens)).float()
    return {"input_ids": torch.randint(17, (n_cells, n_tokens)), "values": values, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["scgpt_varlen", "eager"])
def test_the_exported_encoder_takes_any_number_of_cells_and_tokens(
    config: Callable[..., ScGPTConfig], tmp_path: Path, attention: str
) -> None:
    torch.manual_seed(0)
    model = ScGPTModel._from_config(config(), attn_implementation=attention).eval()
    any_size = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = dict.fromkeys(("input_ids", "values", "attention_mask"), any_size)
    with torch.no_grad():
        exported = torch.export.export(model, (), cells_of(3, 7), dynamic_shapes=shapes)
        torch.export.save(exported, tmp_path / "encoder.pt2")
        loaded = torch.export.load(tmp_path / "encoder.pt2").module()
        for n_cells, n_tokens in ((3, 7), (1, 2), (9, 40)):
            cells = cells_of(n_cells, n_tokens)
            torch.testing.assert_close(loaded(**cells).cell_embedding, model(**cells).cell_embedding)
