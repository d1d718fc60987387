"""scgpt_hf: pretrain single-cell transformers, from a Census query to a checkpoint on the Hub.

Importing the package takes little time: it imports no other library, and each public name is loaded when it is first
used. The Auto classes of transformers know the model nevertheless; see `registration.py`.

Example:
    >>> import scgpt_hf
    >>> adata = scgpt_hf.demo_cells()
    >>> report = scgpt_hf.embed_anndata(adata, "runs/demo/best_model")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scgpt_hf.registration import register_with_transformers

# The same names twice: imports that type checkers follow and that are never run, and a table for `__getattr__`. A test
# compares the two.
if TYPE_CHECKING:
    from scgpt_hf.analysis.annotate import predict_cell_types as predict_cell_types
    from scgpt_hf.analysis.annotate import transfer_labels as transfer_labels
    from scgpt_hf.analysis.annotate_cells import annotate as annotate
    from scgpt_hf.analysis.checking.check import check_cells as check_cells
    from scgpt_hf.analysis.embed import embed_anndata as embed_anndata
    from scgpt_hf.analysis.embed_census import embed_census as embed_census
    from scgpt_hf.analysis.embed_file import embed_file as embed_file
    from scgpt_hf.analysis.evaluation.evaluate import evaluate_embeddings as evaluate_embeddings
    from scgpt_hf.analysis.expression import predict_expression as predict_expression
    from scgpt_hf.analysis.gene_networks import attention_maps as attention_maps
    from scgpt_hf.analysis.gene_networks import gene_embeddings as gene_embeddings
    from scgpt_hf.analysis.gene_networks import gene_programs as gene_programs
    from scgpt_hf.analysis.gene_networks import mean_attention as mean_attention
    from scgpt_hf.analysis.gene_networks import nearest_genes as nearest_genes
    from scgpt_hf.analysis.generate import generate_cells as generate_cells
    from scgpt_hf.cells.block import CellBlock as CellBlock
    from scgpt_hf.cells.cache.jobs import write_cache as write_cache
    from scgpt_hf.cells.modalities import join_modalities as join_modalities
    from scgpt_hf.cells.soma.build import build_census as build_census
    from scgpt_hf.cells.source import CellSource as CellSource
    from scgpt_hf.cells.source import open_source as open_source
    from scgpt_hf.cells.threads import prefetch as prefetch
    from scgpt_hf.conversion.checkpoint import convert_scgpt as convert_scgpt
    from scgpt_hf.demo import demo_cells as demo_cells
    from scgpt_hf.demo import demo_census as demo_census
    from scgpt_hf.inference import embed_cells as embed_cells
    from scgpt_hf.model.configuration_scgpt import ScGPTConfig as ScGPTConfig
    from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation as ScGPTForPerturbation
    from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining as ScGPTForPreTraining
    from scgpt_hf.model.modeling_scgpt import ScGPTForSequenceClassification as ScGPTForSequenceClassification
    from scgpt_hf.model.modeling_scgpt import ScGPTModel as ScGPTModel
    from scgpt_hf.packaged_models import packaged_model as packaged_model
    from scgpt_hf.perturbation.evaluation.evaluate import evaluate_perturbation as evaluate_perturbation
    from scgpt_hf.perturbation.finetune import finetune_perturbation as finetune_perturbation
    from scgpt_hf.perturbation.predict import predict_perturbation as predict_perturbation
    from scgpt_hf.perturbation.settings import PerturbationSettings as PerturbationSettings
    from scgpt_hf.pipeline.stream import StreamConfig as StreamConfig
    from scgpt_hf.pipeline.stream import stream_cells as stream_cells
    from scgpt_hf.pretrained import load_model as load_model
    from scgpt_hf.pretraining import pretrain as pretrain
    from scgpt_hf.publishing.publish_cache import publish_cache as publish_cache
    from scgpt_hf.publishing.publish_run import publish as publish
    from scgpt_hf.reporting.report import write_report as write_report
    from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor as ScGPTProcessor
    from scgpt_hf.training.finetuning.annotate import finetune_classifier as finetune_classifier
    from scgpt_hf.training.finetuning.integrate import finetune_integration as finetune_integration
    from scgpt_hf.training.finetuning.settings import AnnotateSettings as AnnotateSettings
    from scgpt_hf.training.finetuning.settings import IntegrateSettings as IntegrateSettings
    from scgpt_hf.training.settings_parsing import make_settings as make_settings
    from scgpt_hf.training.settings_parsing import parse_settings as parse_settings
    from scgpt_hf.training.summary import RunSummary as RunSummary
    from scgpt_hf.training.trainer import ScGPTTrainer as ScGPTTrainer
    from scgpt_hf.verbosity import set_verbosity as set_verbosity

    __version__: str

# Public name → module that defines it.
_MODULE_OF = {
    "ScGPTConfig": "model.configuration_scgpt",
    "ScGPTModel": "model.modeling_scgpt",
    "ScGPTForPreTraining": "model.modeling_scgpt",
    "ScGPTForSequenceClassification": "model.modeling_scgpt",
    "ScGPTForPerturbation": "model.modeling_scgpt",
    "ScGPTProcessor": "tokens.processing_scgpt",
    "CellBlock": "cells.block",
    "CellSource": "cells.source",
    "open_source": "cells.source",
    "join_modalities": "cells.modalities",
    "build_census": "cells.soma.build",
    "write_cache": "cells.cache.jobs",
    "demo_cells": "demo",
    "demo_census": "demo",
    "convert_scgpt": "conversion.checkpoint",
    "load_model": "pretrained",
    "packaged_model": "packaged_models",
    "StreamConfig": "pipeline.stream",
    "stream_cells": "pipeline.stream",
    "prefetch": "cells.threads",
    "parse_settings": "training.settings_parsing",
    "make_settings": "training.settings_parsing",
    "pretrain": "pretraining",
    "RunSummary": "training.summary",
    "ScGPTTrainer": "training.trainer",
    "AnnotateSettings": "training.finetuning.settings",
    "IntegrateSettings": "training.finetuning.settings",
    "finetune_classifier": "training.finetuning.annotate",
    "finetune_integration": "training.finetuning.integrate",
    "annotate": "analysis.annotate_cells",
    "check_cells": "analysis.checking.check",
    "embed_anndata": "analysis.embed",
    "embed_cells": "inference",
    "embed_census": "analysis.embed_census",
    "embed_file": "analysis.embed_file",
    "predict_cell_types": "analysis.annotate",
    "transfer_labels": "analysis.annotate",
    "predict_expression": "analysis.expression",
    "generate_cells": "analysis.generate",
    "gene_embeddings": "analysis.gene_networks",
    "nearest_genes": "analysis.gene_networks",
    "gene_programs": "analysis.gene_networks",
    "attention_maps": "analysis.gene_networks",
    "mean_attention": "analysis.gene_networks",
    "evaluate_embeddings": "analysis.evaluation.evaluate",
    "PerturbationSettings": "perturbation.settings",
    "finetune_perturbation": "perturbation.finetune",
    "predict_perturbation": "perturbation.predict",
    "evaluate_perturbation": "perturbation.evaluation.evaluate",
    "write_report": "reporting.report",
    "publish": "publishing.publish_run",
    "publish_cache": "publishing.publish_cache",
    "set_verbosity": "verbosity",
}

__all__ = sorted(_MODULE_OF)

# Hidden from type checkers, which would otherwise accept any name and infer `Any`.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("scgpt_hf")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'scgpt_hf' has no attribute {name!r}; public names: {', '.join(__all__)}")
        return getattr(import_module(f"scgpt_hf.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]


register_with_transformers()
