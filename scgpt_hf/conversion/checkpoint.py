"""Convert an original scGPT checkpoint (args.json, vocab.json, best_model.pt) to a model and a processor.

    args.json, vocab.json, best_model.pt
      → files.py       read and check each file
      → keys.py        map each weight to a parameter of our model; infer settings from keys and shapes
      → checkpoint.py  check that the files agree; build the model and the processor
      → report.py      list what was converted, left out, inferred and assumed; write the model card

No weight is dropped silently: each key is converted, or left out for a reason in the report, or raises an error.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, Unpack, get_args, get_origin, get_type_hints

import torch

from scgpt_hf.conversion.files import ARGS, VOCAB, WEIGHTS, OriginalFiles, read_original
from scgpt_hf.conversion.keys import MODALITY_TABLE, infer_settings, is_perturbation_model, map_keys, rename_weights
from scgpt_hf.conversion.report import ConversionReport, build_card
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation, ScGPTForPreTraining
from scgpt_hf.output import require_writable_folder
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)

# How scGPT's perturbation model reads cells, whatever the args.json of the model that it was fine-tuned from says.
# Source: bowang-lab/scGPT:tutorials/Tutorial_Perturbation.ipynb, whose data are log1p values from GEARS.
_PERTURBATION_VALUES: dict[str, Any] = {"input_style": "log1p", "pad_value": 0, "include_zeros": True}


class UnrecordedSettings(TypedDict, total=False):
    """Settings that the files of a checkpoint of scGPT's code do not record.

    A setting that you do not pass takes its value in the published checkpoints, and the report lists it as assumed.

    Attributes:
        norm_scheme: "post", or "scgpt_pre" for scGPT's `pre_norm=True`.
        cell_pooling: "cls", or "average" and "weighted" for scGPT's `cell_emb_style` "avg-pool" and "w-pool".
        gepc_detach: true for scGPT's `mvc_decoder_style` "inner product, detach".
        ecs_threshold: similarity threshold of the ECS objective; 0.3 by default, as in scGPT's code.
        cls_value: value of the token `<cls>`. By default `pad_value` of args.json (-2 in published checkpoints), as in
            scGPT's pretraining and `embed_data`. Pass 0 for models trained with its fine-tuning tokenizer.
        modalities: of a multi-omic model, the names of its modalities by their ids, with `<pad>` and `<cls>`. Without
            them its expression heads are left out.
        gene_modalities: gene → modality; genes that are not listed have the first one.
    """

    norm_scheme: Literal["post", "scgpt_pre"]
    cell_pooling: Literal["cls", "average", "weighted"]
    gepc_detach: bool
    ecs_threshold: float
    cls_value: float
    modalities: list[str]
    gene_modalities: dict[str, str]


# Source: defaults of bowang-lab/scGPT:scgpt/model/model.py:22; cls_value is that of scgpt/tasks/cell_emb.py:80.
_PUBLISHED: dict[str, Any] = {"norm_scheme": "post", "cell_pooling": "cls", "gepc_detach": False, "ecs_threshold": 0.3}


def convert_scgpt(
    folder: str | Path, *, weights_file: str = WEIGHTS, **unrecorded: Unpack[UnrecordedSettings]
) -> tuple[ScGPTForPreTraining | ScGPTForPerturbation, ScGPTProcessor, ConversionReport]:
    """Convert an original scGPT checkpoint.

    A checkpoint of scGPT's TransformerGenerator becomes a `ScGPTForPerturbation`, every other one a
    `ScGPTForPreTraining`.

    The model has every head of scGPT's code. Each head gets an objective of weight 1, except the class head, because
    most data have no labels for it. To train the class head, set its weight in `model.config.loss_weights`.

    Args:
        folder: folder with args.json, vocab.json and the weights.
        weights_file: file name of the state dict, written by torch.save or as safetensors. By default best_model.pt,
            or the only .safetensors file of a folder without it. Its attention weights may be named `in_proj_*`,
            `Wqkv` or `_impl.Wqkv`. Prefixes of wrappers (`module.`, `_orig_mod.`) are removed and reported.
        unrecorded: settings that the files do not record; see `UnrecordedSettings`.

    Returns:
        The model in evaluation mode, the processor, and the report on what was converted.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is invalid, the files contradict each other, a key is unexpected or missing or has an
            unexpected shape, or a setting is unknown or has an invalid value.

    Example:
        >>> model, processor, report = convert_scgpt("scGPT_human")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
        >>> save_converted(model, processor, report, "models/scgpt_human")  # doctest: +SKIP
    """
    _require_valid({**unrecorded})
    files = read_original(Path(folder), weights_file)
    pad_value = 0 if is_perturbation_model(files.weights) else files.args["pad_value"]
    cls_value = unrecorded.get("cls_value", pad_value)
    modalities = unrecorded.get("modalities", [])
    converted, left_out = map_keys(
        files.weights, files.weights_path, modalities, pooling=unrecorded.get("cell_pooling", "cls")
    )
    weights = {key: files.weights[key] for key in converted}
    inferred = infer_settings(weights, files.weights_path)
    _require_agreement(files, inferred)
    _require_value_rows(files, inferred.get("n_value_ids"), cls_value)
    # On the meta device, parameters have no memory and no random values: a weight that the lines below failed to set
    # could not be used unnoticed.
    with torch.device("meta"):
        model_class = ScGPTForPerturbation if is_perturbation_model(weights) else ScGPTForPreTraining
        model = model_class(_build_config(files, inferred, {**unrecorded}))
    processor = _build_processor(files, cls_value, modalities, unrecorded.get("gene_modalities", {}))
    state = rename_weights(weights, converted, model, files.weights_path)
    if modalities:
        state[MODALITY_TABLE] = torch.from_numpy(processor.modality_ids(modalities))
    model.load_state_dict(state, assign=True)
    # `infer_settings` gave the class objective a weight so that the class head is built; it is not trained by default.
    loss_weights = {name: weight for name, weight in inferred["loss_weights"].items() if name != "cls"}
    inferred["loss_weights"] = model.config.loss_weights = loss_weights or inferred["loss_weights"]
    assumed = _assumed_settings(files, inferred, {**unrecorded}, processor)
    source, notes = Path(folder).resolve().name, _notes(files, inferred)
    report = ConversionReport(source, converted, left_out, inferred, assumed, notes)
    model.eval()  # type: ignore[no-untyped-call]
    return model, processor, report


def save_converted(
    model: ScGPTForPreTraining | ScGPTForPerturbation,
    processor: ScGPTProcessor,
    report: ConversionReport,
    out: str | Path,
) -> Path:
    """Save a converted checkpoint to a new folder.

    The folder has the files that the Auto classes load, the report as conversion.json, and a model card. All files are
    written to a temporary folder first, which is then renamed, so `out` is never incomplete.

    Args:
        model: model from `convert_scgpt`.
        processor: processor from `convert_scgpt`.
        report: report from `convert_scgpt`.
        out: folder to create.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` exists.
    """
    out = Path(out)
    require_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(build_card(model.config, processor, report), encoding="utf-8")
        try:
            os.rename(folder, out)
        except OSError as error:
            if out.exists():
                raise FileExistsError(f"{out} was written by another process meanwhile; it was not replaced") from error
            raise
    logger.info("wrote %s, converted from %s", out, report.source)
    return out


def require_new_folder(out: str | Path) -> None:
    """Raise unless a folder can be created. Nothing is left behind.

    Raises:
        FileExistsError: `out` exists.
        OSError: it cannot be created there.
    """
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already; choose a new folder")
    require_writable_folder(out)


def _require_valid(settings: dict[str, Any]) -> None:
    """Raise ValueError unless each setting is one of `UnrecordedSettings` and has a value of its type."""
    types = get_type_hints(UnrecordedSettings)
    for name, value in settings.items():
        if name not in types:
            raise ValueError(f"convert_scgpt has no setting {name!r}; expected one of {', '.join(types)}")
        kind = get_origin(types[name])  # list or dict of the settings of modalities, or Literal
        if kind in (list, dict):
            if not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}; expected a {kind.__name__}")
            continue
        choices = get_args(types[name])
        is_int_for_float = types[name] is float and type(value) is int
        if value not in choices if choices else not (is_int_for_float or isinstance(value, types[name])):
            expected = " or ".join(map(repr, choices)) or f"a {types[name].__name__}"
            raise ValueError(f"{name} is {value!r}; expected {expected}")


def _require_agreement(files: OriginalFiles, inferred: dict[str, Any]) -> None:
    """Raise ValueError if two of the files contradict each other."""
    names = {"embsize": "hidden_size", "d_hid": "intermediate_size", "nlayers": "num_hidden_layers"}
    names |= {"input_emb_style": "value_encoder", "n_layers_cls": "class_head_layers"}
    args = Path(files.weights_path).with_name(ARGS)
    for original, ours in names.items():
        if original in files.args and ours in inferred and files.args[original] != inferred[ours]:
            raise ValueError(
                f"{args}: {original!r} is {files.args[original]!r}, but according to the keys and shapes in "
                f"{files.weights_path} it is {inferred[ours]!r}; the two files belong to different models"
            )
    if len(files.vocab) != inferred["vocab_size"]:
        raise ValueError(
            f"{args.with_name(VOCAB)} has {len(files.vocab):,} tokens, but 'encoder.embedding.weight' in "
            f"{files.weights_path} has {inferred['vocab_size']:,} rows; the two files belong to different models"
        )


def _require_value_rows(files: OriginalFiles, n_rows: int | None, cls_value: float) -> None:
    """Raise ValueError if the embedding table of values lacks a row for a value that the processor produces.

    Args:
        files: the files of the checkpoint.
        n_rows: rows of the table; None if the model embeds values without a table.
        cls_value: value of `<cls>`.
    """
    if n_rows is None:
        return
    n_bins, pad, mask = (files.args[name] for name in ("n_bins", "pad_value", "mask_value"))
    if pad != n_bins or not (n_bins <= mask < n_rows and 0 <= cls_value < n_rows):
        raise ValueError(
            f"{Path(files.weights_path).with_name(ARGS)}: 'n_bins' is {n_bins}, 'pad_value' {pad}, 'mask_value' {mask} "
            f"and cls_value {cls_value}, but 'value_encoder.embedding.weight' in {files.weights_path} has {n_rows} "
            "rows; expected pad_value = n_bins ≤ mask_value, and a row for each value"
        )


def _build_config(files: OriginalFiles, inferred: dict[str, Any], unrecorded: dict[str, Any]) -> ScGPTConfig:
    args = files.args
    settings: dict[str, Any] = {
        "pad_token_id": files.vocab[args["pad_token"]],
        "num_attention_heads": args["nheads"],
        "n_bins": args["n_bins"],
        "dropout": args["dropout"],
        "attention_dropout": args["dropout"],  # as in scGPT's code; see `ScGPTConfig`
    }
    settings |= {"perturbation_cls": False} if is_perturbation_model(files.weights) else {}
    not_of_model = {"cls_value", "gene_modalities"}
    chosen = {name: value for name, value in (_PUBLISHED | unrecorded).items() if name not in not_of_model}
    return ScGPTConfig(**settings, **inferred, **chosen)


def _build_processor(
    files: OriginalFiles, cls_value: float, modalities: Sequence[str], gene_modalities: Mapping[str, str]
) -> ScGPTProcessor:
    args, of_genes = files.args, None
    genes = ScGPTProcessor.from_vocab(files.vocab).genes if modalities or gene_modalities else []
    if unknown := sorted(gene_modalities.keys() - set(genes)):
        raise ValueError(f"gene_modalities has {len(unknown)} genes that are not in {VOCAB}, e.g. {unknown[:5]}")
    if gene_modalities and not modalities:
        raise ValueError("gene_modalities needs modalities, the names of all modalities by their ids")
    if modalities:
        of_genes = [gene_modalities.get(gene, modalities[0]) for gene in genes]
    if is_perturbation_model(files.weights):
        args = args | _PERTURBATION_VALUES
    return ScGPTProcessor.from_vocab(
        files.vocab,
        n_bins=args["n_bins"],
        max_tokens=args["max_seq_len"],
        cls_value=cls_value,
        pad_value=args["pad_value"],
        mask_value=args["mask_value"],
        input_style=args["input_style"],
        include_zeros=args.get("include_zeros", False),
        modalities=of_genes,
    )


def _assumed_settings(
    files: OriginalFiles, inferred: dict[str, Any], unrecorded: dict[str, Any], processor: ScGPTProcessor
) -> dict[str, Any]:
    """Return the settings that were neither recorded nor passed and that matter for this model, with their values."""
    assumed = {name: value for name, value in _PUBLISHED.items() if name not in unrecorded}
    if any("in_proj_" in key for key in files.weights):
        assumed.pop("norm_scheme", None)  # known: scGPT's code supports pre_norm only with flash attention (Wqkv)
    if inferred.get("gepc_query") != "inner_product":
        assumed.pop("gepc_detach", None)
    assumed |= {} if "cls_value" in unrecorded else {"cls_value": processor.cls_value}
    assumed |= {"target_sum": processor.target_sum} if processor.input_style == "log1p" else {}
    if "modalities" in unrecorded and "gene_modalities" not in unrecorded:
        assumed["gene_modalities"] = f"all genes are {unrecorded['modalities'][0]}"
    if is_perturbation_model(files.weights):
        assumed |= {**_PERTURBATION_VALUES, "decoder_activation": None, "decoder_adaptive_bias": False}
    return assumed | {f"{name} of {ARGS}": files.args[name] for name in files.missing_args}


def _notes(files: OriginalFiles, inferred: dict[str, Any]) -> tuple[str, ...]:
    """Return notes for the user about properties of the model that its settings do not show."""
    notes = [
        f"removed the prefix {prefix!r} of a wrapper from {n_keys} keys" for prefix, n_keys in files.wrappers.items()
    ]
    if is_perturbation_model(files.weights):
        notes.append(
            "this is a perturbation model: load it with AutoModelForTokenClassification, or use predict_perturbation; "
            "its input is all genes without <cls>, as in scGPT's tutorial (perturbation_cls=False in the config)"
        )
    if inferred.get("objective") == "generative":
        notes.append(
            "the checkpoint was trained to generate genes: it works with generate_cells, and in further training "
            "masked genes are queries (objective=generative in the config)"
        )
    if "num_labels" in inferred:
        notes.append("the checkpoint has a class head: load it with AutoModelForSequenceClassification")
    if files.args["input_style"] == "binned" and files.args["n_bins"] != 51:
        notes.append(
            f"the model was trained on {files.args['n_bins']} bins, which the processor uses; scGPT's "
            "embed_data uses 51 bins for every model: to reproduce its embeddings, load the processor with n_bins=51"
        )
    if files.args["dropout"]:
        notes.append("attention_dropout is set as in scGPT's code; on a GPU, training is faster with 0")
    return tuple(notes)
