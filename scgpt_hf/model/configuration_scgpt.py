"""The settings that change the function the weights compute, and the weights of the objectives.

How counts become `values` is the processor's business; how weights are trained is `TrainingArguments`'.
The class maps below travel in every `config.json`, so any Auto class loads from any head's checkpoint.
"""

# The library's configuration class is untyped.
# mypy: disable-error-code="no-untyped-call"

import difflib
import math
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

import transformers
from huggingface_hub.errors import StrictDataclassError

try:
    from transformers.configuration_utils import PreTrainedConfig, strict  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"models of scgpt need transformers 5.4 or newer, found {transformers.__version__}; "
        "run `pip install --upgrade transformers`"
    ) from error

AUTO_MAP = {
    "AutoConfig": "configuration_scgpt.ScGPTConfig",
    "AutoModel": "modeling_scgpt.ScGPTModel",
    "AutoModelForPreTraining": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForMaskedLM": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForSequenceClassification": "modeling_scgpt.ScGPTForSequenceClassification",
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 512},
}

# What asks for more is a damaged file, and would take all memory.
_LARGEST = dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"), 10_000_000)
_LARGEST["num_hidden_layers"] = 1_000

OBJECTIVES = ("gep", "gepc", "gep_zero", "gepc_zero", "ecs", "cce", "dar", "cls")

# What the library itself hands to a config, beyond its fields; everything else unknown is a typo or from the future.
_LIBRARY_KEYWORDS = frozenset(
    {
        *("model_type", "auto_map", "torch_dtype", "num_labels", "name_or_path", "output_attentions"),
        *("attn_implementation", "experts_implementation", "per_layer_config", "quantization_config", "use_cache"),
        *("tie_word_embeddings", "tokenizer_class", "processor_class", "custom_pipelines", "gradient_checkpointing"),
        *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "is_decoder", "is_causal"),
        *("tie_last_hidden_states", "finetuning_task", "task_specific_params", "add_cross_attention"),
    }
)


@strict
class ScGPTConfig(PreTrainedConfig):
    """Configuration of the scGPT encoder and its heads.

    Args:
        vocab_size: genes and special tokens, read from the processor when a model is built.
        pad_token_id: vocabulary id of `<pad>`.
        hidden_size: width of the hidden state.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads per layer; divides `hidden_size`.
        intermediate_size: width of the stream_config-forward layer.
        dropout: share dropped of embedded values and of each residual branch, in training.
        attention_dropout: share dropped of attention probabilities, in training. The original uses `dropout` here
            too; the packed CUDA kernel has none, so any other value than 0 takes a slower path.
        layer_norm_eps: epsilon of every LayerNorm.
        norm_scheme: "post" normalises after each residual sum; "pre" before each branch, with a norm at the end;
            "scgpt_pre" is the original's pre-norm, whose residual starts from the normalised input, without that norm.
        value_encoder: "continuous" feeds values through a small network, "category" looks bins up in a table, "scaling"
            multiplies the gene embedding by the value.
        n_bins: bins of the processor, the zero bin included; the category table marks padding with `n_bins`.
        n_value_ids: rows of the category table; by default `n_bins` + 2, for padding and the hidden value.
        max_value: larger values are clamped to it by the continuous value encoder.
        cell_pooling: "cls" takes the hidden state at `<cls>`; "average" and "weighted" (by `values`, then
            L2-normalised) count padding, as the original does, so they need padded input.
        gepc_query: how the GEPC head meets a gene with a cell: "inner_product", "concat" or "sum".
        gepc_detach: whether the GEPC loss leaves the gene embedding untouched.
        explicit_zero_prob: whether expression heads also predict that a gene is expressed at all.
        n_domains: experimental batches known to the model.
        batch_key: obs column that names the experimental batch of a cell.
        domains: values of that column, in the order of their ids; empty where nobody recorded them.
        domain_embedding: whether the expression heads are told the domain.
        domain_head: whether an adversarial discriminator guesses the domain (DAR).
        input_norm: batch norm over embedded input: "none", "batch", or "domain" with statistics per domain; both count
            padding, as the original's do, so they need padded input.
        class_head_layers: linear layers of the class head.
        ecs_threshold: similarity that elastic cell similarity pulls towards or pushes from.
        cce_temperature: temperature of the contrastive objective.
        loss_weights: weight of each objective, by default 1 for GEP, GEPC and what the options above add. A head exists
            where its objective weighs more than 0.

    Raises:
        ValueError: an unknown keyword, a choice or a combination that no model can satisfy.

    Source: defaults as in Cui et al. 2024, Nature Methods 21:1470, and bowang-lab/scGPT:scgpt/model/model.py:22.
    """

    model_type = "scgpt"
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vocab_size: int = 60697
    pad_token_id: int | None = 60694
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 512
    dropout: float | int = 0.2
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    norm_scheme: Literal["post", "pre", "scgpt_pre"] = "post"
    value_encoder: Literal["continuous", "category", "scaling"] = "continuous"
    n_bins: int = 51
    n_value_ids: int | None = None
    max_value: float | int = 512
    cell_pooling: Literal["cls", "average", "weighted"] = "cls"
    gepc_query: Literal["inner_product", "concat", "sum"] = "inner_product"
    gepc_detach: bool = False
    explicit_zero_prob: bool = False
    n_domains: int = 0
    batch_key: str | None = None
    domains: list[str] = field(default_factory=list)
    domain_embedding: bool = False
    domain_head: bool = False
    input_norm: Literal["none", "batch", "domain"] = "none"
    class_head_layers: int = 3
    ecs_threshold: float | int = 0.3
    cce_temperature: float | int = 0.5
    loss_weights: dict[str, float | int] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        self._reject_unknown(kwargs)
        if not self.loss_weights:
            self.loss_weights = dict.fromkeys(("gep", "gepc"), 1.0)
            self.loss_weights |= {"gep_zero": 1.0, "gepc_zero": 1.0} if self.explicit_zero_prob else {}
            self.loss_weights |= {"dar": 1.0} if self.domain_head else {}
        self.auto_map = {**AUTO_MAP, **(kwargs.pop("auto_map", None) or {})}
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of saved settings; called by `from_pretrained`.

        Args:
            config_dict: the settings, as in config.json.
            **kwargs: settings to change, and what the library takes.

        Raises:
            ValueError: a setting is unknown, or its value one that no model of this version can have.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(
                f"the saved configuration cannot be used: {error.__cause__ or error}; a newer version of scgpt_hf may "
                "have written it, or it is damaged"
            ) from error

    def weighs(self, objective: str) -> bool:
        """Return whether `objective` is part of the loss, and therefore its head part of the model."""
        return self.loss_weights.get(objective, 0) > 0

    @property
    def counts_padding(self) -> str:
        """Return the setting that makes results depend on padding, as in the original, or an empty string."""
        defined = {"cell_pooling": "cls", "input_norm": "none"}
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name, plain in defined.items() if getattr(self, name) != plain
        )

    def validate_architecture(self) -> None:
        """Check sizes and shares; called by the library after construction.

        Raises:
            ValueError: a size below 1 or absurd, a share, similarity or temperature that cannot be, or heads that do
                not divide the hidden size.
        """
        for name, largest in _LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {largest:,}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "choose a number of heads that divides it"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1)")
        if not -1 <= self.ecs_threshold <= 1:
            raise ValueError(f"ecs_threshold is {self.ecs_threshold}; expected a cosine similarity, from -1 to 1")
        if not 0 < self.cce_temperature < math.inf:
            raise ValueError(f"cce_temperature is {self.cce_temperature}; expected a finite number above 0")

    def validate_objectives(self) -> None:
        """Check that each objective has the head it needs, and each head an objective.

        Raises:
            ValueError: an unknown objective, a weight that is negative or not finite, or a head and its objective that
                do not go together.
        """
        weights = self.loss_weights
        if unknown := sorted(set(weights) - set(OBJECTIVES)):
            raise ValueError(f"loss_weights names {unknown}; expected names from {list(OBJECTIVES)}")
        if wrong := {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}:
            raise ValueError(f"loss_weights are negative or not finite: {wrong}; leave an objective out or give it 0")
        # A head without an objective would get no gradient, which distributed training refuses.
        zeros = {name for name in ("gep_zero", "gepc_zero") if self.weighs(name)}
        expected = (
            {f"{name}_zero" for name in ("gep", "gepc") if self.weighs(name)} if self.explicit_zero_prob else set()
        )
        if zeros != expected:
            raise ValueError(
                f"explicit_zero_prob={self.explicit_zero_prob} goes with weights for {sorted(expected) or 'neither'}, "
                f"found {sorted(zeros) or 'neither'} of gep_zero and gepc_zero; change the one or the other"
            )
        if self.domain_head != self.weighs("dar"):
            raise ValueError(
                f"domain_head={self.domain_head} does not go with a weight of {weights.get('dar', 0)} for 'dar'; "
                "set both or neither"
            )

    def validate_domains(self) -> None:
        """Check that what needs domains has them, and that the GEPC style can carry what is asked of it.

        Raises:
            ValueError: no domains where they are needed, another number than are named, or a GEPC style without the
                option asked for.
        """
        needs = [name for name in ("domain_embedding", "domain_head") if getattr(self, name)]
        needs += ["input_norm='domain'"] if self.input_norm == "domain" else []
        if needs and self.n_domains < 1:
            raise ValueError(f"{' and '.join(needs)} need n_domains >= 1, found {self.n_domains}")
        if self.domains and len(self.domains) != self.n_domains:
            raise ValueError(f"domains names {len(self.domains)} experimental batches, n_domains is {self.n_domains}")
        options = [name for name in ("explicit_zero_prob", "domain_embedding") if getattr(self, name)]
        if options and self.gepc_query != "inner_product" and self.weighs("gepc"):
            raise ValueError(
                f"gepc_query={self.gepc_query!r} has no {' or '.join(options)}; choose gepc_query='inner_product'"
            )

    def _reject_unknown(self, keywords: dict[str, Any]) -> None:
        """Raise where a keyword is neither ours nor the library's; a misspelt setting must not pass unnoticed."""
        if (model_type := keywords.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(f"this is the configuration of a {model_type!r} model, not of scgpt; load it by AutoModel")
        known = {field.name for field in fields(self)}
        for name in keywords:
            if name not in _LIBRARY_KEYWORDS and not name.startswith("_"):
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "it may come from a newer version of scgpt_hf"
                raise ValueError(f"ScGPTConfig has no setting {name!r}; {hint}")


def training_flops_per_token(config: ScGPTConfig, mean_tokens: float, masked: float = 0.5) -> float:
    """Return the floating-point operations of one forward and backward pass, per token.

    Counts matrix products, 2 operations per multiply-add, the backward pass as two forward passes. Embedding, norms and
    what runs once per cell are left out.

    Args:
        config: sizes of the model.
        mean_tokens: tokens per cell, averaged over tokens: sum of squares / sum of the lengths.
        masked: share of tokens the heads predict.

    Source: 6 N + 12 L H Q T of Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    width = config.hidden_size
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * width * mean_tokens
    values = width**2 if config.value_encoder == "continuous" else 0
    gep = 2 * width**2 * (1 + config.weighs("gep_zero"))
    gepc = (2 + config.weighs("gepc_zero")) * width**2 * config.weighs("gepc")
    return 6 * (config.num_hidden_layers * layer + values + masked * (gep + gepc))
