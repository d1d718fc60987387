"""Write losses.json: the first 20 losses of a tiny model on 96 synthetic cells.

Run this script only if a change must alter the losses, and give the reason in the CHANGELOG:

    python tests/golden/make_losses.py
"""

import json
from itertools import islice
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix

from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.source import open_source
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

GOLDEN = Path(__file__).with_name("losses.json")


def first_losses(n_steps: int = 20) -> list[float]:
    """Train for a few steps, from counts to the optimizer, and return the losses."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, (4, 60))
    counts = rng.poisson(rates[rng.integers(4, size=96)]).astype(np.float32)
    genes = [f"ENSG{index:011d}" for index in range(60)]
    obs = pd.DataFrame(index=[str(cell) for cell in range(96)])
    source = open_source(anndata.AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes)))
    processor = ScGPTProcessor.from_genes(genes, n_bins=11, max_tokens=25)
    plans = [plan_epoch(np.arange(96), seed=1, epoch=epoch, batch_size=16) for epoch in range(-(-n_steps // 6))]
    torch.manual_seed(0)
    config = ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, n_bins=11,
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, dropout=0.0,
    )  # fmt: skip
    model = ScGPTForPreTraining(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    stream = stream_cells(source, plans, processor, StreamConfig(1, (0.25, 0.5, 0.75)))
    for batch in islice(stream, n_steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(first_losses(), indent=1) + "\n")
