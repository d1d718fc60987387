"""A saved model and its processor, loaded together from a folder or from the Hub, and checked to belong together."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoProcessor, PreTrainedModel

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


class Pretrained(NamedTuple):
    """A model, its processor, and the parts of the model that no file held and that begin anew."""

    model: PreTrainedModel
    processor: ScGPTProcessor
    new: list[str]


def load_pretrained(name: str | Path, model_class: Any, **changes: Any) -> Pretrained:
    """Return the model and the processor saved in a folder or a repository of the Hub.

    Args:
        name: the folder, or the repository's id.
        model_class: one of ours or an Auto class; heads and batch norms that the checkpoint lacks, or
            has in another size, start anew.
        changes: fields of `ScGPTConfig` that shall differ from the saved ones.

    Raises:
        OSError: there is no such folder or repository, or it holds no model.
        ValueError: the folder is a run's, which has its model one folder deeper; it holds another kind of model, not
            the whole encoder, or more of it than its config says; the changes do not go with it; or model and processor
            do not belong together.
    """
    processor = load_processor(name)
    require_inside(name)
    with _translate_load_errors(name):
        saved, _ = ScGPTConfig.get_config_dict(name)
    if saved.get("model_type") != ScGPTConfig.model_type:
        raise ValueError(f"{name} holds a {saved.get('model_type')!r} model, not one of scgpt")
    with _translate_load_errors(name):
        try:
            config = ScGPTConfig(**{**saved, **changes})
        except StrictDataclassError as error:
            wrong = error.__cause__ or error
            raise ValueError(
                f"{name} cannot be changed so: {wrong}"
                if changes
                else f"{name} cannot be used: {wrong}; it may be from a newer version of scgpt_hf, or damaged"
            ) from error
    loading = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _translate_load_errors(name), _report_unprinted():
        model, report = model_class.from_pretrained(name, use_safetensors=True, **loading)
    require_pair(model, processor)
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    lost = [key for key in missing if key.startswith(encoder) and not key.startswith(f"{encoder}input_norm")]
    if lost:
        raise ValueError(f"{name} lacks {len(lost)} weights of the encoder, e.g. {lost[:3]}; it is no checkpoint of it")
    parts = {f"{model.base_model_prefix}.{part}" for part, _ in model.base_model.named_children()}
    if beyond := [key for key in report["unexpected_keys"] if ".".join(key.split(".")[:2]) in parts]:
        raise ValueError(
            f"{name} has {len(beyond)} weights for which the encoder of its config has no place, e.g. "
            f"{sorted(beyond)[:3]}; copy config.json and weights again from one folder"
        )
    return Pretrained(model, processor, sorted({key.removeprefix(encoder).split(".")[0] for key in missing}))


def load_processor(name: str | Path) -> ScGPTProcessor:
    """Return the processor saved in a folder or a repository of the Hub.

    Raises:
        OSError: there is no such folder or repository, or it holds no processor.
        ValueError: the folder is a run's.
    """
    if Path(name, "best_model").is_dir():
        raise ValueError(f"{name} is the folder of a run; its model is {Path(name, 'best_model')}")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise FileNotFoundError(f"there is no folder {name}, and a repository of the Hub would be OWNER/NAME")
    with _translate_load_errors(name):
        processor: ScGPTProcessor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            name, trust_remote_code=False
        )
        if not isinstance(processor, ScGPTProcessor):
            raise ValueError(f"{name} holds a {type(processor).__name__}, not a processor of scgpt")
    return processor


def require_inside(name: str | Path) -> None:
    """Raise if the list of a local model's weights leads out of its folder.

    Raises:
        ValueError: naming the entry.
    """
    index = Path(name, "model.safetensors.index.json")
    if not index.is_file():
        return
    with _translate_load_errors(name):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if wrong := sorted(shard for shard in shards if Path(shard).name != shard):
            raise ValueError(f"{index} leads out of its folder: {wrong[:3]}; expected names of files beside it")


@contextmanager
def _translate_load_errors(name: str | Path) -> Iterator[None]:
    """Turn what the libraries raise on damaged files into an error that names the folder; ours pass."""
    try:
        yield
    except (OSError, ValueError) as error:
        if str(name) in str(error):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(f"{name}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception, others anything; the cause is kept
        raise ValueError(
            f"{name} holds a damaged model or processor ({type(error).__name__}: {str(error)[:200]}); copy it again"
        ) from error


@contextmanager
def _report_unprinted() -> Iterator[None]:
    """Keep the library from printing which heads are left out or begin anew; what matters of it is checked here."""
    printing = logging.getLogger("transformers.modeling_utils")
    printing.addFilter(_is_no_report)  # not its level: a higher one makes the library check its parallel plans
    try:
        yield
    finally:
        printing.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def require_pair(model: PreTrainedModel, processor: ScGPTProcessor) -> None:
    """Raise unless the model is one of ours and has as many genes and special tokens as the processor.

    Raises:
        ValueError: it is another kind of model, or they come from different folders.
    """
    if model.config.model_type != ScGPTConfig.model_type:
        raise ValueError(f"{model.name_or_path or 'this'} is a {model.config.model_type!r} model, not one of scgpt")
    if model.config.vocab_size != processor.vocab_size:
        raise ValueError(
            f"the model {model.name_or_path} has {model.config.vocab_size:,} genes and special tokens, the processor "
            f"{processor.vocab_size:,}; load both from one folder"
        )


def domain_classes(config: ScGPTConfig) -> dict[str, tuple[str, dict[str, int]]]:
    """Return the obs column and the ids of the domains that the encoder needs; empty where it needs none.

    In the form of `StreamConfig.categories`.

    Raises:
        ValueError: the encoder needs domains, and the config does not name them.
    """
    if config.input_norm != "domain":
        return {}
    if config.batch_key is None or not config.domains:
        raise ValueError(
            "the encoder has a batch norm for every experimental batch, but its config does not say which these are; "
            "set model.config.batch_key (an obs column) and model.config.domains (its values, by their ids)"
        )
    return {"domain_ids": (config.batch_key, {domain: index for index, domain in enumerate(config.domains)})}
