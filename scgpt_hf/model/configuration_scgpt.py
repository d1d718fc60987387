"""`ScGPTConfig`: the settings of the architecture and the weights of the objectives.

A setting belongs here if it changes the function that the weights compute. Settings of tokens belong to
`ScGPTProcessor`, settings of training to `TrainingArguments`.
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
        f"models of scgpt need transformers 5.6 or newer, found {transformers.__version__}; "
        "run `pip install --upgrade transformers`"
    ) from error

# Saved in every `config.json`. The library would list only the class that was saved, so that `AutoModel` could not load
# the checkpoint of a head.
AUTO_MAP = {
    "AutoConfig": "configuration_scgpt.ScGPTConfig",
    "AutoModel": "modeling_scgpt.ScGPTModel",
    "AutoModelForPreTraining": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForMaskedLM": "modeling_scgpt.ScGPTForPreTraining",
    "AutoModelForSequenceClassification": "modeling_scgpt.ScGPTForSequenceClassification",
    # The library has no Auto class for perturbations; the model predicts one number for each token.
    "AutoModelForTokenClassification": "modeling_scgpt.ScGPTForPerturbation",
}

# Sizes by name, for the command line. "base" is the size of the published scGPT models.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "base": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 512},
}

# A damaged config.json may contain any number, and building such a model could exhaust the memory.
_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "count_head_size", "shortcut_size")
_LARGEST = dict.fromkeys(_SIZES, 10_000_000)
_LARGEST["num_hidden_layers"] = 1_000

# Explained in `objectives_scgpt`.
OBJECTIVES = ("gep", "gepc", "gep_zero", "gepc_zero", "gen", "ecs", "cce", "dar", "cls", "views", "counts")

# Keywords that the library passes to a config besides its fields. Other unknown keywords are misspelt, or come from a
# newer version.
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
        vocab_size: number of genes and special tokens; the same as `ScGPTProcessor.vocab_size`.
        pad_token_id: vocabulary id of `<pad>`.
        hidden_size: width of the hidden states.
        num_hidden_layers: number of encoder layers.
        num_attention_heads: number of heads per layer; divides `hidden_size`.
        intermediate_size: width of the feed-forward layer.
        dropout: dropout rate of embedded values and of each residual branch.
        attention_dropout: dropout rate of attention probabilities. The original uses `dropout` here too. The default is
            0, because the CUDA kernel for packed input has no dropout, and any other value takes a slower path.
        layer_norm_eps: epsilon of every LayerNorm.
        norm_scheme: "post" normalizes after each residual sum; "pre" before each branch, with a norm at the end;
            "scgpt_pre" is the pre-norm of the original, whose residual starts from the normalized input, without a norm
            at the end.
        value_encoder: how values are embedded: "continuous" by a small network, "category" by a table of bins,
            "scaling" by multiplying the gene embedding.
        n_bins: number of bins of the processor, including the zero bin. Row `n_bins` of the "category" table is
            padding.
        n_value_ids: rows of the "category" table; by default `n_bins` + 2, for padding and masked genes.
        max_value: the "continuous" value encoder clamps larger values to it.
        cell_pooling: how the cell embedding is computed: "cls" takes the hidden state at `<cls>`, "average" the mean
            over tokens, "weighted" the sum weighted by `values`, then L2-normalized. The last two include padding, as
            in the original, so they need padded input.
        gepc_query: how the GEPC head combines a gene with a cell: "inner_product", "concat" or "sum".
        gepc_detach: whether to stop the gradient of the GEPC loss at the gene embedding.
        explicit_zero_prob: whether the expression heads also predict the probability that a gene is expressed.
        n_domains: number of domains (experimental batches).
        batch_key: obs column that holds the experimental batch of a cell.
        domains: values of that column, in the order of their ids; may be empty.
        domain_embedding: whether the expression heads read an embedding of the cell's domain. The encoder then need not
            represent it.
        modalities: names of the modalities of the vocabulary, such as RNA and protein, in the order of their ids, with
            `<pad>` and `<cls>` for special tokens; empty if all tokens are genes.
        modality_embedding: where an embedding of each token's modality is added, if there are several: "decoder" passes
            it to the expression heads, as in scGPT's multi-omic model, "input" adds it to the input of the encoder.
        domain_head: whether an adversarial discriminator predicts the domain (objective "dar").
        input_norm: batch norm over the embedded input: "none", "batch", or "domain" with statistics per domain. Both
            norms include padding, as in the original, so they need padded input.
        class_head_layers: number of linear layers of the class head.
        ecs_threshold: similarity that the objective "ecs" moves pairs of cells away from.
        cce_temperature: temperature of the objective "cce".
        view_temperature: temperature of the objective "views". Source: Chen et al. 2020, arXiv:2002.05709.
        count_likelihood: distribution of the raw counts for the objective "counts": "multinomial", or "nb" (negative
            binomial).
        count_head_size: width of the hidden layer of the count decoder.
        cls_shortcut: whether a function of the expression-weighted sum of gene vectors is added to `<cls>`; see
            `shortcut_scgpt.CellShortcut`. Needs `cell_pooling="cls"`.
        shortcut_size: width of the gene vectors of the shortcut.
        objective: how masked genes enter the input. "masked": as tokens with the value `mask_value`, to which the
            others attend. "generative": as queries by name only, to which no other token attends; the other genes are
            given.
        query_out_proj: whether the output projection of attention is applied to queries; false for models of scGPT's
            code, which leaves it out there.
        leave_out_masked: whether masked genes are left out of the input, so that the encoder reads visible genes only.
            By default they are tokens with the value `mask_value`. The objective "gep" needs them as tokens.
        perturbation_cls: whether `<cls>` precedes the genes in the input of `ScGPTForPerturbation`; false for models of
            scGPT's code.
        perturbation_sum: whether `ScGPTForPerturbation` adds the sum of the projected vectors of the perturbed genes to
            every token, so that all genes learn of a perturbation directly; scGPT's code relies on attention alone.
        total_key: obs column with the total counts of a cell, by which a perturbation model normalizes it; None sums
            the counts of the data. Set it for panels, whose sum varies with the genes of the panel.
        loss_weights: weight of each objective; by default 1 for "gep", "gepc" and those that the settings above add. A
            head exists if its objective has a weight above 0.

    Raises:
        ValueError: a keyword is unknown, or a value or combination of settings is invalid.

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
    modalities: list[str] = field(default_factory=list)
    modality_embedding: Literal["decoder", "input", "both", "none"] = "decoder"
    input_norm: Literal["none", "batch", "domain"] = "none"
    class_head_layers: int = 3
    ecs_threshold: float | int = 0.3
    cce_temperature: float | int = 0.5
    view_temperature: float | int = 0.1
    count_likelihood: Literal["multinomial", "nb"] = "multinomial"
    count_head_size: int = 256
    cls_shortcut: bool = False
    shortcut_size: int = 256
    objective: Literal["masked", "generative"] = "masked"
    query_out_proj: bool = True
    leave_out_masked: bool = False
    perturbation_cls: bool = True
    perturbation_sum: bool = False
    total_key: str | None = None
    loss_weights: dict[str, float | int] = field(default_factory=dict)

    # The library turns this class into a strict dataclass: it checks types, then calls the `validate_*` methods.
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
        """Create the configuration from saved settings. `from_pretrained` calls this method.

        Args:
            config_dict: the settings, as in config.json.
            **kwargs: settings to override, and keywords of the library.

        Raises:
            ValueError: a setting is unknown or its value invalid.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(
                f"the saved configuration is invalid: {error.__cause__ or error}; a newer version of scgpt_hf may have "
                "saved it, or the file is damaged"
            ) from error

    def has_objective(self, objective: str) -> bool:
        """Return whether the loss includes `objective`; the model then has its head."""
        return self.loss_weights.get(objective, 0) > 0

    @property
    def modality_at_input(self) -> bool:
        """True if the encoder reads the modality of each token."""
        return bool(self.modalities) and self.modality_embedding in ("input", "both")

    @property
    def modality_at_decoder(self) -> bool:
        """True if the expression heads read the modality of each token."""
        return bool(self.modalities) and self.modality_embedding in ("decoder", "both")

    @property
    def padding_dependent_settings(self) -> str:
        """Settings that make results depend on padding, such as `"cell_pooling='average'"`; empty if there are none.

        The original averages over padding and normalizes it. Converted checkpoints need the same numbers, so such
        models need padded input.
        """
        independent = {"cell_pooling": "cls", "input_norm": "none"}
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name, value in independent.items() if getattr(self, name) != value
        )

    def validate_architecture(self) -> None:
        """Check the sizes and rates. The library calls this method after construction.

        Raises:
            ValueError: a size, rate, threshold or temperature is out of range, or `num_attention_heads` does not divide
                `hidden_size`.
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
                raise ValueError(f"{name} is {getattr(self, name)}; expected a rate in [0, 1)")
        if self.cls_shortcut and self.cell_pooling != "cls":
            raise ValueError(f"cls_shortcut needs cell_pooling='cls', found {self.cell_pooling!r}")
        if not -1 <= self.ecs_threshold <= 1:
            raise ValueError(f"ecs_threshold is {self.ecs_threshold}; expected a cosine similarity, from -1 to 1")
        for name in ("cce_temperature", "view_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number above 0")

    def validate_objectives(self) -> None:
        """Check that each objective has a head and each head an objective. The library calls this method.

        Raises:
            ValueError: an objective is unknown, a weight is negative or not finite, a head has no objective, or an
                objective no head.
        """
        weights = self.loss_weights
        if unknown := sorted(set(weights) - set(OBJECTIVES)):
            raise ValueError(f"loss_weights has unknown objectives {unknown}; choose from {list(OBJECTIVES)}")
        if wrong := {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}:
            raise ValueError(f"loss_weights are negative or not finite: {wrong}; set 0 to disable an objective")
        # A head without an objective would get no gradient, and distributed training raises for unused parameters.
        zeros = {name for name in ("gep_zero", "gepc_zero") if self.has_objective(name)}
        expected = (
            {f"{name}_zero" for name in ("gep", "gepc") if self.has_objective(name)}
            if self.explicit_zero_prob
            else set()
        )
        if zeros != expected:
            raise ValueError(
                f"explicit_zero_prob={self.explicit_zero_prob} needs weights of {sorted(expected) or 'neither'} of "
                f"gep_zero and gepc_zero, found {sorted(zeros) or 'neither'}; change loss_weights or explicit_zero_prob"
            )
        if self.domain_head != self.has_objective("dar"):
            raise ValueError(
                f"domain_head is {self.domain_head} but the weight of 'dar' is {weights.get('dar', 0)}; "
                "set both or neither"
            )

    def validate_masking(self) -> None:
        """Check that no objective reads the hidden states of genes that are left out. The library calls this method.

        Raises:
            ValueError: masked genes are left out and "gep" has a weight.
        """
        if self.leave_out_masked and self.has_objective("gep"):
            raise ValueError(
                "leave_out_masked=True gives masked genes no hidden state, from which 'gep' would predict them; set "
                "loss_weights without gep, such as {'gepc': 1.0} or {'counts': 1.0}, or leave_out_masked=False"
            )

    def validate_generation(self) -> None:
        """Check the settings of generative training. The library calls this method.

        Raises:
            ValueError: a setting does not allow queries, or "gen" has a weight and there are none.
        """
        if self.objective == "generative" and self.leave_out_masked:
            raise ValueError(
                "objective='generative' makes masked genes queries and leave_out_masked=True removes them; choose one"
            )
        if self.objective == "generative" and (settings := self.padding_dependent_settings):
            raise ValueError(f"objective='generative' needs packed input, and {settings} needs padded input")
        if self.has_objective("gen") and not (self.objective == "generative" and self.has_objective("gep")):
            raise ValueError(
                "'gen' predicts the queries of objective='generative' once more, with the head of 'gep'; set "
                "objective='generative' and a weight of 'gep', or remove 'gen' from loss_weights"
            )

    def validate_domains(self) -> None:
        """Check the domains, and that `gepc_query` supports the other settings. The library calls this method.

        Raises:
            ValueError: a setting needs domains and there are none, `domains` and `n_domains` disagree, or `gepc_query`
                does not support a setting.
        """
        needs = [name for name in ("domain_embedding", "domain_head") if getattr(self, name)]
        needs += ["input_norm='domain'"] if self.input_norm == "domain" else []
        if needs and self.n_domains < 1:
            raise ValueError(f"{' and '.join(needs)} need n_domains >= 1, found {self.n_domains}")
        if self.domains and len(self.domains) != self.n_domains:
            raise ValueError(f"domains lists {len(self.domains)} experimental batches, n_domains is {self.n_domains}")
        options = [n for n in ("explicit_zero_prob", "domain_embedding", "modality_at_decoder") if getattr(self, n)]
        if options and self.gepc_query != "inner_product" and self.has_objective("gepc"):
            raise ValueError(
                f"gepc_query={self.gepc_query!r} does not support {' or '.join(options)}; set "
                "gepc_query='inner_product'"
            )

    def validate_modalities(self) -> None:
        """Check the names of the modalities. The library calls this method.

        Raises:
            ValueError: a name is repeated, or `<pad>` or `<cls>` is missing.
        """
        names = self.modalities
        if names and (len(set(names)) < len(names) or not {"<pad>", "<cls>"} < set(names)):
            raise ValueError(
                f"modalities is {names}; expected different names, with '<pad>' and '<cls>' for special tokens"
            )

    def _reject_unknown(self, keywords: dict[str, Any]) -> None:
        """Raise if a keyword is neither ours nor the library's; the library would ignore a misspelt setting."""
        if (model_type := keywords.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"this is the configuration of a {model_type!r} model, not of scgpt; load it with AutoModel"
            )
        known = {field.name for field in fields(self)}
        for name in keywords:
            if name not in _LIBRARY_KEYWORDS and not name.startswith("_"):
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "a newer version of scgpt_hf may have saved it"
                raise ValueError(f"ScGPTConfig has no setting {name!r}; {hint}")


def training_flops_per_token(config: ScGPTConfig, mean_tokens: float, masked: float = 0.5) -> float:
    """Estimate the floating-point operations of one forward and backward pass, per token.

    The estimate counts matrix products, with 2 operations per multiply-add, and the backward pass as two forward
    passes. It ignores embeddings, norms and everything that runs once per cell; see `training_flops_per_cell`.

    Args:
        config: configuration of the model.
        mean_tokens: mean number of tokens per cell, averaged over tokens: Σ length² / Σ length. Attention costs the
            square of the length, so long cells count more.
        masked: share of tokens that the heads predict.

    Source: 6 N + 12 L H Q T of Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    width, n_keys = config.hidden_size, mean_tokens * (1 - masked if config.objective == "generative" else 1)
    layer = 4 * width**2 + 2 * width * config.intermediate_size + 2 * width * n_keys
    values = width**2 if config.value_encoder == "continuous" else 0
    gep = 2 * width**2 * (1 + config.has_objective("gep_zero"))
    gepc = (2 + config.has_objective("gepc_zero")) * width**2 * config.has_objective("gepc")
    encoder, heads = config.num_hidden_layers * layer + values, masked * (gep + gepc)
    return 6 * (encoder + heads + (encoder + masked * gep) * config.has_objective("gen"))  # a second pass


def training_flops_per_cell(config: ScGPTConfig) -> float:
    """Estimate the floating-point operations of one forward and backward pass that do not depend on a cell's tokens.

    The estimate counts the matrix products of the count decoder and the shortcut, as `training_flops_per_token` does,
    but not what the backward pass computes again to save memory.

    Args:
        config: configuration of the model.
    """
    decoder = config.count_head_size * (config.hidden_size + config.vocab_size) * config.has_objective("counts")
    shortcut = config.shortcut_size * (config.shortcut_size + config.hidden_size) * config.cls_shortcut
    return 6 * (decoder + shortcut)
