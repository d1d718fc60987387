"""scgpt_hf: pretrain single-cell transformers, from a Census query to a checkpoint on the Hub.

Importing is cheap: names load on first use, and neither tiledbsoma nor scanpy nor matplotlib comes with them.
The Auto classes of transformers know our model as soon as this package is imported.
"""

from importlib import import_module
from typing import Any

_HOME_OF = {
    "ScGPTConfig": "model.configuration_scgpt",
    "ScGPTModel": "model.modeling_scgpt",
    "ScGPTForPreTraining": "model.modeling_scgpt",
    "ScGPTForSequenceClassification": "model.modeling_scgpt",
    "ScGPTProcessor": "tokens.processing_scgpt",
    "CellBlock": "cells.block",
    "CellSource": "cells.source",
    "open_source": "cells.source",
    "build_census": "cells.soma.build",
    "write_cache": "cells.cache.jobs",
    "demo_cells": "demo",
    "demo_census": "demo",
    "convert_scgpt": "conversion.checkpoint",
    "StreamConfig": "pipeline.stream",
    "prefetch": "cells.threads",
    "stream_cells": "pipeline.stream",
    "ScGPTTrainer": "training.trainer",
    "publish": "publishing.publish_run",
    "publish_cache": "publishing.publish_cache",
    "embed_anndata": "analysis.embed",
    "embed_cells": "analysis.embed",
    "AnnotateSettings": "training.finetuning.settings",
    "IntegrateSettings": "training.finetuning.settings",
    "finetune_classifier": "training.finetuning.annotate",
    "finetune_integration": "training.finetuning.integrate",
    "predict_cell_types": "analysis.annotate",
    "transfer_labels": "analysis.annotate",
    "predict_expression": "analysis.expression",
    "gene_embeddings": "analysis.gene_networks",
    "nearest_genes": "analysis.gene_networks",
    "gene_programs": "analysis.gene_networks",
    "attention_maps": "analysis.gene_networks",
    "mean_attention": "analysis.gene_networks",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'scgpt_hf' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"scgpt_hf.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _register() -> None:
    """Tell transformers' Auto classes which of ours to load for `model_type: scgpt`."""
    import transformers

    from scgpt_hf.model.configuration_scgpt import ScGPTConfig
    from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTForSequenceClassification, ScGPTModel
    from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

    transformers.AutoConfig.register(ScGPTConfig.model_type, ScGPTConfig)
    transformers.AutoModel.register(ScGPTConfig, ScGPTModel)
    transformers.AutoModelForPreTraining.register(ScGPTConfig, ScGPTForPreTraining)
    transformers.AutoModelForMaskedLM.register(ScGPTConfig, ScGPTForPreTraining)
    transformers.AutoModelForSequenceClassification.register(ScGPTConfig, ScGPTForSequenceClassification)
    transformers.AutoProcessor.register(ScGPTConfig, ScGPTProcessor)  # type: ignore[no-untyped-call]


_register()
