"""Which weights an optimizer decays, and Muon for the matrices of the encoder's layers.

All other optimizers are those of `transformers.Trainer` (`--optim`). It has no Muon, and it decays embedding tables.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, TrainingArguments

MUON = "muon"
"""Name of the optimizer in `--optim`, beside those of the library."""


def matrix_names(module: nn.Module) -> set[str]:
    """Return the names of the weights of all linear layers in a module: no bias, norm, or embedding table."""
    return {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def make_muon(model: PreTrainedModel, args: TrainingArguments, decayed: set[str]) -> "MuonWithAdamW":
    """Return Muon for the matrices of the encoder's layers and AdamW for all other weights.

    Embeddings, the input, heads, norms and biases are left to AdamW, as Muon's authors recommend.

    Args:
        model: the model, with an encoder as `base_model`.
        args: learning rate, weight decay, and the betas and epsilon of AdamW.
        decayed: names of the weights that decay.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = f"{model.base_model_prefix}.layers."
    of_layers = {name for name in matrix_names(model) & trained.keys() if name.startswith(layers)}
    others = trained.keys() - of_layers
    # `named_parameters` gives the order, because a set has none and a checkpoint stores the state by position.
    matrices, decayed_others, rest = (
        [weight for name, weight in trained.items() if name in names]
        for names in (of_layers, others & decayed, others - decayed)
    )
    return MuonWithAdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}],
        [{"params": decayed_others, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        learning_rate=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


class MuonWithAdamW(Optimizer):
    """Muon for some groups of weights and AdamW for the others, as one optimizer with one state.

    Both use the same learning rate: Muon's update is scaled to the size of AdamW's.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the scale 0.2 · √max(rows, columns) of Liu
        et al. 2025, arXiv:2502.16982; both as in `torch.optim.Muon`.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Create both optimizers.

        Args:
            muon_groups: groups of two-dimensional weights, as for every torch optimizer.
            adamw_groups: groups of the other weights.
            learning_rate: peak learning rate of all groups.
            betas: decay rates of AdamW's moments.
            eps: epsilon of AdamW.
        """
        muon = Muon(muon_groups, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(adamw_groups, lr=learning_rate, betas=betas, eps=eps)
        self._parts = ((muon, len(muon.param_groups)), (adamw, len(adamw.param_groups)))
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights that have a gradient.

        Args:
            closure: computes the loss again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part, n_groups in self._parts:
            # Set before each step, because `load_state_dict` replaces both.
            part.param_groups, part.state = self.param_groups[start : start + n_groups], self.state
            part.step()  # type: ignore[no-untyped-call]
            start += n_groups
        return loss
