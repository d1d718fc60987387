"""Train a small network with the model's count decoder: a baseline that shows what attention adds.

The encoder is a network with three linear layers that reads all genes of a cell at once. The decoder is `CountHead`,
as in the objective `counts` of the transformer: it predicts the raw counts of all genes, and knows a bias for each
experimental batch that the embedding need not carry. Training takes less than a minute on one core.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.count_decoder_scgpt import CountHead
from scgpt_hf.scoring.fitted_pca import choose_genes, find_genes, load_arrays, save_arrays
from scgpt_hf.scoring.metrics import Labels

Float32Array = npt.NDArray[np.float32]

MLP_FILE = "baselines/count_mlp.safetensors"  # in a run folder

# Source: our own measurements on 21,000 blood cells; other sizes and rates were about as good.
HIDDEN, WIDTH = 128, 256
BATCH_SIZE, MAX_STEPS, MAX_EPOCHS = 64, 2_500, 20
LEARNING_RATE, WARMUP_STEPS, MAX_NORM = 1e-3, 100, 1.0
_BETAS, _WEIGHT_DECAY = (0.9, 0.98), 0.01
_TARGET_SUM = 1_000
_CELLS_PER_BATCH = 1_024  # of inference


class CountMLP(nn.Module):
    """Embed cells from the counts of all their genes.

    Each value is `log1p(1000 · s · c / Σc)`. The sum runs over the genes of the network that the cell's data measured,
    and `s` is the share of all training counts that these genes have: values of a cell do not grow when only a panel
    of genes was measured.

    Attributes:
        genes: ids of the genes that it reads.
        share: share of all training counts that each gene has, float32 (genes,).
    """

    share: Tensor

    def __init__(self, genes: Sequence[str], share: Float32Array) -> None:
        """Make a network with new weights, drawn with torch's global random state.

        Args:
            genes: see `CountMLP`.
            share: see `CountMLP`.
        """
        super().__init__()
        self.genes = list(genes)
        self.register_buffer("share", torch.from_numpy(np.asarray(share, np.float32)))
        self.layers = nn.Sequential(
            nn.Linear(len(self.genes), WIDTH),
            nn.LayerNorm(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, HIDDEN),
        )

    def forward(self, counts: Tensor, measured_share: Tensor) -> Tensor:
        """Return the embedding of cells, (cells, hidden).

        Args:
            counts: raw counts of the network's genes, 0 where not measured, float32 (cells, genes).
            measured_share: share of all training counts that the measured genes have, (cells, 1) or ().
        """
        totals = counts.sum(dim=1, keepdim=True).clamp(min=1)
        embedding: Tensor = self.layers(torch.log1p(counts * (_TARGET_SUM * measured_share / totals)))
        return embedding

    @torch.inference_mode()
    def embed(self, counts: csr_matrix, genes: Sequence[str]) -> Float32Array:
        """Return the embedding of cells, float32 (cells, hidden).

        Args:
            counts: raw counts. Shape (cells, genes).
            genes: id of each column. Shape (genes,).

        Raises:
            ValueError: no gene is known, or an id occurs twice.
        """
        columns = find_genes(genes, self.genes)
        measured = columns >= 0
        known = csr_matrix(counts, dtype=np.float32)[:, columns[measured]]
        share = self.share[torch.from_numpy(measured)].sum()
        parts = []
        for start in range(0, known.shape[0], _CELLS_PER_BATCH):
            part = known[start : start + _CELLS_PER_BATCH]
            dense = np.zeros((part.shape[0], len(self.genes)), np.float32)
            dense[:, measured] = part.toarray()
            parts.append(self(torch.from_numpy(dense), share).numpy())
        return np.concatenate(parts) if parts else np.empty((0, HIDDEN), np.float32)

    def save(self, path: Path) -> None:
        """Write the encoder to a safetensors file, atomically."""
        save_arrays(path, {name: tensor.numpy(force=True) for name, tensor in self.state_dict().items()}, self.genes)

    @classmethod
    def load(cls, path: Path) -> "CountMLP":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: see `load_arrays`.
        """
        with torch.device("meta"):
            names = list(cls([""], np.ones(1, np.float32)).state_dict())
        arrays, genes = load_arrays(path, names)
        with torch.device("meta"):
            network = cls(genes, arrays["share"])
        try:
            network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged or holds something else: {error}; fit it again") from error
        return network


def fit_count_mlp(
    counts: csr_matrix,
    genes: Sequence[str],
    batches: Labels,
    *,
    seed: int = 0,
    steps: int | None = None,
    selected: Sequence[str] | None = None,
) -> CountMLP:
    """Train a `CountMLP` to predict the raw counts of all its genes, zeros included.

    The result depends on the arguments alone; the global random state is left as it was.

    Args:
        counts: raw counts. Shape (cells, genes).
        genes: id of each column. Shape (genes,).
        batches: experimental batch of each cell, usually its data set: the decoder has a bias for each, and genes
            without a count in a batch are taken as not measured there. Shape (cells,).
        seed: determines initial weights and the order of the cells.
        steps: training steps of 64 cells; by default 2,500, or 20 epochs if these are fewer.
        selected: genes to use instead of variable genes.

    Raises:
        ValueError: no gene is expressed, or an id occurs twice.

    Example:
        >>> network = fit_count_mlp(counts, genes, datasets, seed=0)  # doctest: +SKIP
        >>> network.embed(other_counts, other_genes).shape  # doctest: +SKIP
        (3000, 128)

    Source: an encoder as in scVI (Lopez et al. 2018, Nature Methods 15:1053) without its variational part; likelihood
        and decoder are those of the objective `counts`.
    """
    chosen, _ = choose_genes(counts, genes, batches, selected)
    known = csr_matrix(counts, dtype=np.float32)[:, find_genes(genes, chosen)]
    names, domain_of_cell = np.unique(batches, return_inverse=True)
    totals = np.stack([np.asarray(known[domain_of_cell == domain].sum(axis=0))[0] for domain in range(len(names))])
    share = (totals.sum(axis=0) / max(totals.sum(), 1)).astype(np.float32)
    if steps is None:
        steps = min(MAX_STEPS, math.ceil(MAX_EPOCHS * known.shape[0] / BATCH_SIZE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CountMLP(chosen, share)
        decoder = CountHead(_decoder_config(len(chosen), len(names)))
    decoder.set_statistics(torch.from_numpy(totals))
    measured_share = (decoder.measured * network.share).sum(dim=1, keepdim=True)
    with torch.enable_grad():
        _train(network, decoder, known, torch.from_numpy(domain_of_cell), measured_share, seed=seed, steps=steps)
    return network


def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW as it trains a network with the count decoder. Weight decay applies to weights with two axes."""
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=_BETAS)


def _train(
    network: CountMLP,
    decoder: CountHead,
    counts: csr_matrix,
    domain_ids: Tensor,
    measured_share: Tensor,
    *,
    seed: int,
    steps: int,
) -> None:
    """Train the network and its decoder in place; `measured_share` is that of each domain, (domains, 1)."""
    parameters = [*network.parameters(), *decoder.parameters()]
    optimizer = make_optimizer(parameters)
    warmup = min(WARMUP_STEPS, max(steps // 10, 1))
    for step, cells in enumerate(_cells_of_steps(counts.shape[0], seed, steps)):
        factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        part, domains = counts[cells], domain_ids[torch.from_numpy(cells)]
        embedding = network(torch.from_numpy(part.toarray()), measured_share[domains])
        cell_of_entry = torch.from_numpy(np.repeat(np.arange(len(cells)), np.diff(part.indptr)))
        ids, values = torch.from_numpy(part.indices.astype(np.int64)), torch.from_numpy(part.data)
        loss = decoder.loss(embedding, domains, ids, values, cell_of_entry).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()


def _cells_of_steps(n_cells: int, seed: int, steps: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of each step: the cells in a new random order in each epoch, the rest of an epoch left out."""
    size, step, epoch = min(BATCH_SIZE, n_cells), 0, 0
    while step < steps:
        order = np.random.default_rng([seed, epoch]).permutation(n_cells)
        for start in range(0, n_cells - size + 1, size)[: steps - step]:
            yield order[start : start + size]
            step += 1
        epoch += 1


def _decoder_config(n_genes: int, n_domains: int) -> ScGPTConfig:
    """Return the fields that `CountHead` reads; the others have no effect."""
    return ScGPTConfig(
        vocab_size=n_genes, pad_token_id=None, hidden_size=HIDDEN, num_attention_heads=1, n_domains=n_domains
    )
