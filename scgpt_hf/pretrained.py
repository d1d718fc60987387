"""Load a saved model with its processor, from a folder, the package or the Hub, and validate that they fit together.

`load_model` serves everything that uses a trained model. `load_pretrained` below it serves fine-tuning, which changes
fields of the config and needs to know which parts have new weights.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.packaged_models import locate_checkpoint, packaged_names
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


class Pretrained(NamedTuple):
    """A model that was loaded from a checkpoint.

    Attributes:
        model: the model, on the CPU.
        processor: its processor.
        new_parts: names of the parts that the checkpoint lacks; their weights are random.
    """

    model: PreTrainedModel
    processor: ScGPTProcessor
    new_parts: list[str]


def load_model(
    model: PreTrainedModel | str | Path,
    processor: ScGPTProcessor | None = None,
    model_class: Any = AutoModel,
    *,
    heads: Sequence[str] = (),
    device: str | None = None,
) -> tuple[PreTrainedModel, ScGPTProcessor]:
    """Load a model and its processor, or validate a pair that is loaded already.

    Args:
        model: a folder, the name of a model of the package, the id of a repository on the Hub, or a loaded model.
        processor: the processor of a loaded model; of a folder or repository, replaces the saved one.
        model_class: Auto class or class of ours to load: the encoder alone, or the encoder with heads.
        heads: names of modules of which the model must have at least one, and none with random weights.
        device: where to move a model that is loaded here; by default a GPU if there is one. A model that was passed
            stays where it is.

    Raises:
        OSError: there is no such folder or repository, or it holds no model.
        ValueError: see `load_pretrained`; a loaded model came without its processor; the two do not fit together; or a
            head is missing or was never trained.

    Example:
        >>> model, processor = load_model("runs/demo/best_model")
        >>> model, processor = load_model("blood-mini")  # comes with the package
    """
    if isinstance(model, str | Path):
        name = model
        model, saved, new_parts = load_pretrained(name, model_class)
        if untrained := sorted(set(heads) & set(new_parts)):
            raise ValueError(
                f"{name} has no trained {' and no '.join(untrained)}; use a checkpoint that was trained with it. "
                "Pretraining trains expression_head and cell_to_gene_head, scgpt-hf finetune class_head"
            )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        processor = processor or saved
    if processor is None:
        raise ValueError("a loaded model needs its processor; pass both, or the folder or repository they come from")
    validate_pair(model, processor)
    if heads and all(getattr(model, head, None) is None for head in heads):
        raise ValueError(
            f"{type(model).__name__} has no {' and no '.join(heads)}; load a checkpoint that has it with "
            f"{model_class.__name__}"
        )
    return model, processor


def load_pretrained(name: str | Path, model_class: Any, **changes: Any) -> Pretrained:
    """Load the model and the processor of a checkpoint.

    Args:
        name: a folder, the name of a model of the package, or the id of a repository on the Hub.
        model_class: Auto class or class of ours to load. Heads and batch norms that the checkpoint lacks, or has in
            another size, get random weights.
        changes: fields of `ScGPTConfig` that replace the saved ones.

    Raises:
        OSError: there is no such folder or repository, or it holds no model.
        ValueError: the folder is that of a run, whose model is one folder deeper; it holds another kind of model, only
            a part of the encoder, or weights that its config has no place for; the changes do not fit the model; or
            model and processor do not fit together.
    """
    processor = load_processor(name)
    place = locate_checkpoint(name)
    validate_shard_names(place)
    with _translate_load_errors(name):
        saved, _ = ScGPTConfig.get_config_dict(place)
    if saved.get("model_type") != ScGPTConfig.model_type:
        raise ValueError(f"{name} holds a {saved.get('model_type')!r} model, not one of scgpt")
    with _translate_load_errors(name):
        try:
            config = ScGPTConfig(**{**saved, **changes})
        except StrictDataclassError as error:
            wrong = error.__cause__ or error
            raise ValueError(
                f"the config of {name} cannot be changed in this way: {wrong}"
                if changes
                else f"{name} cannot be used: {wrong}; it may be from a newer version of scgpt_hf, or damaged"
            ) from error
    loading = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _translate_load_errors(name), _without_load_report():
        model, report = model_class.from_pretrained(place, use_safetensors=True, **loading)
    model.name_or_path = str(name)  # of a model of the package, its name and not its folder
    return Pretrained(model, processor, _find_new_parts(name, model, report))


def load_processor(name: str | Path) -> ScGPTProcessor:
    """Load the processor of a checkpoint.

    Args:
        name: a folder, the name of a model of the package, or the id of a repository on the Hub.

    Raises:
        OSError: there is no such folder or repository, or it holds no processor.
        ValueError: the folder is that of a run, or holds the processor of another library.
    """
    name = locate_checkpoint(name)
    if Path(name, "best_model").is_dir():
        raise ValueError(f"{name} is the folder of a run; its model is {Path(name, 'best_model')}")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise FileNotFoundError(
            f"there is no folder {name}, a repository of the Hub would be OWNER/NAME, and the models of the package "
            f"are {', '.join(packaged_names())}"
        )
    with _translate_load_errors(name):
        processor: ScGPTProcessor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, trust_remote_code=False
        )
        if not isinstance(processor, ScGPTProcessor):
            raise ValueError(f"{name} holds a {type(processor).__name__}, not a processor of scgpt")
    return processor


def validate_shard_names(name: str | Path) -> None:
    """Raise an error if the index of a local checkpoint lists weight files outside its folder.

    Raises:
        ValueError: the index lists such a file; the message names it.
    """
    index = Path(name, "model.safetensors.index.json")
    if not index.is_file():
        return
    with _translate_load_errors(name):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if outside := sorted(shard for shard in shards if Path(shard).name != shard):
            raise ValueError(f"{index} lists files outside its folder: {outside[:3]}; expected plain file names")


def validate_pair(model: PreTrainedModel, processor: ScGPTProcessor) -> None:
    """Raise an error unless the model is an scGPT model that reads the tokens of the processor.

    Both must have the same number of genes and special tokens, and the same modalities. A model with a table of bins
    (`value_encoder` "category") must also have the same number of bins.

    Raises:
        ValueError: it is another kind of model, or the two come from different folders.
    """
    if model.config.model_type != ScGPTConfig.model_type:
        raise ValueError(f"{model.name_or_path or 'this'} is a {model.config.model_type!r} model, not one of scgpt")
    if model.config.vocab_size != processor.vocab_size:
        raise ValueError(
            f"the model {model.name_or_path} has {model.config.vocab_size:,} genes and special tokens, the processor "
            f"{processor.vocab_size:,}; load both from one folder"
        )
    if model.config.modalities:
        processor.modality_ids(model.config.modalities)
    if model.config.value_encoder == "category" and processor.input_style != "binned":
        raise ValueError(
            f"the model {model.name_or_path} has a table of bins, the processor makes {processor.input_style} "
            "values; load both from one folder"
        )
    if model.config.value_encoder == "category" and model.config.n_bins != processor.n_bins:
        raise ValueError(
            f"the model {model.name_or_path} has a table of {model.config.n_bins} bins, the processor makes "
            f"{processor.n_bins}; load both from one folder"
        )


def domain_classes(config: ScGPTConfig) -> dict[str, tuple[str, dict[str, int]]]:
    """Return the obs column and the class ids of the domains that the encoder needs, as `StreamConfig.categories`.

    The result is empty if the encoder needs no domains.

    Raises:
        ValueError: the encoder needs domains, and the config does not list them.
    """
    if config.input_norm != "domain":
        return {}
    if config.batch_key is None or not config.domains:
        raise ValueError(
            "the encoder has a batch norm for every experimental batch, but its config does not say which these are; "
            "set model.config.batch_key (an obs column) and model.config.domains (its values, by their ids)"
        )
    return {"domain_ids": (config.batch_key, {domain: index for index, domain in enumerate(config.domains)})}


def _find_new_parts(name: str | Path, model: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    """Return the parts of a model that the checkpoint lacks, from the library's report of missing weights.

    Raises:
        ValueError: weights of the encoder are missing, or the checkpoint has more of them than the config.
    """
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    # A model with heads holds the encoder under a prefix; the encoder alone has none.
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    # The input norm may be new: integration adds a batch norm for each domain.
    lost = [key for key in missing if key.startswith(encoder) and not key.startswith(f"{encoder}input_norm")]
    if lost:
        raise ValueError(
            f"{name} lacks {len(lost)} weights of the encoder, e.g. {lost[:3]}; it is not a complete checkpoint"
        )
    parts = {f"{model.base_model_prefix}.{part}" for part, _ in model.base_model.named_children()}
    if surplus := [key for key in report["unexpected_keys"] if ".".join(key.split(".")[:2]) in parts]:
        raise ValueError(
            f"{name} has {len(surplus)} weights for which the encoder of its config has no place, e.g. "
            f"{sorted(surplus)[:3]}; copy config.json and weights again from one folder"
        )
    return sorted({key.removeprefix(encoder).split(".")[0] for key in missing})


@contextmanager
def _translate_load_errors(name: str | Path) -> Iterator[None]:
    """Replace the errors that libraries raise on damaged files by one that names the folder; keep errors that do."""
    try:
        yield
    except (OSError, ValueError) as error:
        if str(name) in str(error):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{name}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception, others any type; the cause is kept
        raise ValueError(
            f"{name} holds a damaged model or processor ({type(error).__name__}: {str(error)[:200]}); copy it again"
        ) from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Suppress the table in which the library lists heads that were left out or are new; we check these ourselves."""
    library = logging.getLogger("transformers.modeling_utils")
    # A filter and not a higher level, with which the library would validate its tensor-parallel plans.
    library.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        library.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
