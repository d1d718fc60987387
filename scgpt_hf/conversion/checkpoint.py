"""Original scGPT checkpoints become checkpoints of ours: `args.json`, `vocab.json` and `best_model.pt` go in.

Nothing is dropped in silence. This file decides which model and processor come of the three files; they are read in
`convert_files.py`, their keys in `convert_keys.py`, and `convert_report.py` tells what became of each.
"""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypedDict, Unpack, get_args, get_type_hints

import torch

from scgpt_hf.conversion.files import ARGS, VOCAB, WEIGHTS, OriginalFiles, read_original
from scgpt_hf.conversion.keys import infer_settings, place_weights, sort_keys
from scgpt_hf.conversion.report import ConversionReport, card_of
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)


class Switches(TypedDict, total=False):
    """What original files do not record; what is left out takes the published value and is reported as assumed.

    Attributes:
        norm_scheme: "post", or "scgpt_pre" for the original's `pre_norm=True`.
        cell_pooling: "cls", or "average" and "weighted" for the original's `cell_emb_style` "avg-pool" and "w-pool".
        gepc_detach: true for the original's `mvc_decoder_style` "inner product, detach".
        ecs_threshold: the original's, 0.3 unless told otherwise.
        cls_value: value that `<cls>` carries: by default `pad_value` of args.json, −2 in published checkpoints, as in
            their pretraining and `embed_data`; 0 for models made with the original's fine-tuning tokeniser.
    """

    norm_scheme: Literal["post", "scgpt_pre"]
    cell_pooling: Literal["cls", "average", "weighted"]
    gepc_detach: bool
    ecs_threshold: float
    cls_value: float


# Source: defaults of bowang-lab/scGPT:scgpt/model/model.py:22; cls_value is that of scgpt/tasks/cell_emb.py:80.
_PUBLISHED: dict[str, Any] = {"norm_scheme": "post", "cell_pooling": "cls", "gepc_detach": False, "ecs_threshold": 0.3}


def convert_scgpt(
    folder: str | Path, *, weights_file: str = WEIGHTS, **switches: Unpack[Switches]
) -> tuple[ScGPTForPreTraining, ScGPTProcessor, ConversionReport]:
    """Return the model, the processor and the report of an original scGPT checkpoint.

    The model has every head of the original, and an objective of weight 1 for each but the class head, whose labels are
    seldom there: give it a weight in `model.config.loss_weights` to train it.

    Args:
        folder: holds args.json, vocab.json and the weights.
        weights_file: name of the state dict, in any of the layouts `in_proj_*`, `Wqkv`, `_impl.Wqkv`.
        switches: see `Switches`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, files contradict each other, a key is unexpected, misshapen or
            missing, or a switch is unknown.
    """
    _require_known({**switches})
    files = read_original(Path(folder), weights_file)
    cls_value = switches.get("cls_value", files.args["pad_value"])
    taken, left_out = sort_keys(files.weights, files.where)
    kept = {key: files.weights[key] for key in taken}
    inferred = infer_settings(kept, files.where)
    _require_agreement(files, inferred)
    _require_rows(files, inferred.get("n_value_ids"), cls_value)
    with torch.device("meta"):  # no memory, no random numbers: what is not filled below could not be used
        model = ScGPTForPreTraining(_config(files, inferred, {**switches}))
    model.load_state_dict(place_weights(kept, taken, model, files.where), assign=True)
    weights = {name: weight for name, weight in inferred["loss_weights"].items() if name != "cls"}
    inferred["loss_weights"] = model.config.loss_weights = weights or inferred["loss_weights"]
    processor = _processor(files, cls_value)
    assumed = _assumed(files, inferred, {**switches}, processor)
    report = ConversionReport(Path(folder).resolve().name, taken, left_out, inferred, assumed, _notes(files, inferred))
    model.eval()  # type: ignore[no-untyped-call]
    return model, processor, report


def save_converted(
    model: ScGPTForPreTraining, processor: ScGPTProcessor, report: ConversionReport, out: str | Path
) -> Path:
    """Write what `convert_scgpt` returned to a new folder, and return the folder.

    It holds what the Auto classes load, the whole report as `conversion.json`, and a model card. It appears when it is
    complete.

    Raises:
        FileExistsError: there is something at `out`.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; name a new folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        folder = Path(beside, out.name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card_of(model.config, processor, report), encoding="utf-8")
        os.rename(folder, out)
    logger.info("wrote %s, converted from %s", out, report.source)
    return out


def _require_known(switches: dict[str, Any]) -> None:
    """Raise unless each switch is one of `Switches`, with one of its values."""
    kinds = get_type_hints(Switches)
    for name, value in switches.items():
        if name not in kinds:
            raise ValueError(f"convert_scgpt knows no switch {name!r}; it knows {', '.join(kinds)}")
        choices = get_args(kinds[name])
        whole = kinds[name] is float and type(value) is int
        if value not in choices if choices else not (whole or isinstance(value, kinds[name])):
            wanted = " or ".join(map(repr, choices)) or f"a {kinds[name].__name__}"
            raise ValueError(f"{name} is {value!r}; expected {wanted}")


def _require_agreement(files: OriginalFiles, inferred: dict[str, Any]) -> None:
    """Raise where two of the files say different things."""
    names = {"embsize": "hidden_size", "d_hid": "intermediate_size", "nlayers": "num_hidden_layers"}
    names |= {"input_emb_style": "value_encoder", "n_layers_cls": "class_head_layers"}
    args = Path(files.where).with_name(ARGS)
    for theirs, ours in names.items():
        if theirs in files.args and ours in inferred and files.args[theirs] != inferred[ours]:
            raise ValueError(
                f"{args}: {theirs!r} is {files.args[theirs]!r}, but the keys and shapes of {files.where} say "
                f"{inferred[ours]!r}; the two files are not of one model"
            )
    if len(files.vocab) != inferred["vocab_size"]:
        raise ValueError(
            f"{args.with_name(VOCAB)} has {len(files.vocab):,} tokens, but 'encoder.embedding.weight' of {files.where} "
            f"has {inferred['vocab_size']:,} rows; the two files are not of one model"
        )


def _require_rows(files: OriginalFiles, n_rows: int | None, cls_value: float) -> None:
    """Raise unless the table of values, if there is one, has a row for whatever the processor will ask of it."""
    if n_rows is None:
        return
    n_bins, pad, mask = (files.args[name] for name in ("n_bins", "pad_value", "mask_value"))
    if pad != n_bins or not (n_bins <= mask < n_rows and 0 <= cls_value < n_rows):
        raise ValueError(
            f"{Path(files.where).with_name(ARGS)}: 'n_bins' is {n_bins}, 'pad_value' {pad}, 'mask_value' {mask}, "
            f"cls_value {cls_value}, and 'value_encoder.embedding.weight' of {files.where} has {n_rows} rows; expected "
            "padding at n_bins, the mask from there on, and all within the table"
        )


def _config(files: OriginalFiles, inferred: dict[str, Any], switches: dict[str, Any]) -> ScGPTConfig:
    args = files.args
    settings: dict[str, Any] = {
        "pad_token_id": files.vocab[args["pad_token"]],
        "num_attention_heads": args["nheads"],
        "n_bins": args["n_bins"],
        "dropout": args["dropout"],
        "attention_dropout": args["dropout"],  # as in the original; see `ScGPTConfig`
    }
    chosen = {name: value for name, value in (_PUBLISHED | switches).items() if name != "cls_value"}
    return ScGPTConfig(**settings, **inferred, **chosen)


def _processor(files: OriginalFiles, cls_value: float) -> ScGPTProcessor:
    args = files.args
    return ScGPTProcessor.from_vocab(
        files.vocab,
        n_bins=args["n_bins"],
        max_tokens=args["max_seq_len"],
        cls_value=cls_value,
        pad_value=args["pad_value"],
        mask_value=args["mask_value"],
        input_style=args["input_style"],
    )


def _assumed(
    files: OriginalFiles, inferred: dict[str, Any], switches: dict[str, Any], processor: ScGPTProcessor
) -> dict[str, Any]:
    """Return the settings nobody gave, if they matter for this model, with the values they took."""
    assumed = {name: value for name, value in _PUBLISHED.items() if name not in switches}
    if any("in_proj_" in key for key in files.weights):
        assumed.pop("norm_scheme", None)  # certain: the original norms before a branch in its flash layers only
    if inferred.get("gepc_query") != "inner_product":
        assumed.pop("gepc_detach", None)
    assumed |= {} if "cls_value" in switches else {"cls_value": processor.cls_value}
    assumed |= {"target_sum": processor.target_sum} if processor.input_style == "log1p" else {}
    return assumed | {f"{name} of {ARGS}": files.args[name] for name in files.unrecorded}


def _notes(files: OriginalFiles, inferred: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if "num_labels" in inferred:
        notes.append("the class head is in the folder: AutoModelForSequenceClassification loads it")
    if files.args["input_style"] == "binned" and files.args["n_bins"] != 51:
        notes.append(
            f"the model was trained on {files.args['n_bins']} bins, and the processor makes as many; the original's "
            "embed_data makes 51 whatever the model: for its vectors load the processor with n_bins=51"
        )
    if files.args["dropout"]:
        notes.append("attention_dropout is the original's; 0 is faster in training on a GPU")
    return tuple(notes)
