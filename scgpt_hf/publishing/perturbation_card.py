"""Write the model card of a perturbation model.

As in `card.py`, `run_summary.py` states the facts and this module sets them in Markdown.
"""

from pathlib import Path

from huggingface_hub import ModelCard

from scgpt_hf.publishing.card import (
    LOCAL_CHECKPOINT,
    TAGS,
    Metrics,
    assemble_card,
    card_metadata,
    card_title,
    how_to_cite,
    markdown_table,
)
from scgpt_hf.publishing.finetuned_card import is_on_hub
from scgpt_hf.publishing.record import UNKNOWN, RunRecord
from scgpt_hf.publishing.run_summary import finetuning_data, finetuning_recipe, source_name

PERTURB = "perturb"
_METRICS: Metrics = {
    "best.eval_pearson_delta": ("pearson correlation", "correlation of effects, validation conditions"),
}


def perturbation_card(run: Path, repo_id: str | None = None) -> ModelCard:
    """Return the model card of a run of `finetune_perturbation`.

    Args:
        run: the run folder, with summary.json and settings.yaml.
        repo_id: repository of the checkpoint; when not given, the code in the card loads the local `best_model`.

    Raises:
        ValueError: a file is malformed; the message names file and key.
    """
    summary, settings = RunRecord.read(run / "summary.json"), RunRecord.read(run / "settings.yaml")
    title, base = card_title(run, repo_id), summary.get("model", str)
    what = (
        "A model that predicts the expression of single cells after genetic perturbations of one or several genes. It "
        "turns a control cell into a perturbed one."
    )
    sections = [
        f"# {title}\n\n{what}",
        _LOAD,
        f"## Data\n\n{markdown_table(finetuning_data(summary))}\n\n{_conditions(summary)}",
        f"## Training\n\n{markdown_table(finetuning_recipe(summary, settings))}\n\n"
        "`settings.yaml` holds all settings of `scripts/perturb.py train`.",
        _results(summary),
        _LIMITS,
        how_to_cite(summary),
    ]
    metadata = card_metadata(
        summary,
        title,
        task_type="tabular-regression",
        task_name="perturbation prediction, validation conditions",
        metrics=_METRICS,
        dataset_name=source_name(summary),
        tags=[*TAGS, "perturbation"],
        base_model=base if base and is_on_hub(base) else None,
    )
    return assemble_card(metadata, sections, repo_id)


def _conditions(summary: RunRecord) -> str:
    """Return the conditions of each part as a list."""
    parts = {
        "Training": summary.get("conditions.train", list),
        "Validation": summary.get("conditions.validation", list),
    }
    parts |= {f"Held out, {name}": names for name, names in (summary.get("conditions.test", dict) or {}).items()}
    return "\n".join(f"- {name}: {', '.join(map(str, names or []))}" for name, names in parts.items() if names)


def _results(summary: RunRecord) -> str:
    """Return the validation of the checkpoint that was kept, or say that there was none."""
    error = summary.number("best.eval_loss", ".2f")
    if error == UNKNOWN:
        text = "All training conditions were trained on, and none was used for validation."
    else:
        correlation = summary.number("best.eval_pearson_delta", ".2f")
        text = (
            f"Validation conditions, which chose the checkpoint: squared error of the effects {error} (no change: 1), "
            f"correlation {correlation}."
        )
    return (
        f"## Results\n\n{text}\n\nScores on the held-out conditions, beside simple methods, are in the report of "
        "`scripts/perturb.py evaluate`."
    )


_LOAD = f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModelForTokenClassification as Perturbation, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}")
model = Perturbation.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts, and obs["condition"] with "ctrl" for control cells
found = scgpt_hf.predict_perturbation(adata, ["GENE1+ctrl", "GENE1+GENE2"], model, processor)
found.varm["delta"]  # genes x conditions: mean difference of log1p values
```

You can also load the model without installing scgpt_hf, with transformers 5.6 or newer. Tokens are `<cls>` and all
genes, with log1p values and a flag of 1 for the perturbed genes, which `processor.genes` names:

```python
from transformers import AutoModelForTokenClassification as Perturbation, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
model = Perturbation.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
batch = processor(counts, genes)  # (cells, genes), names of the genes
flags = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("GENE1")).long()
predicted = model(**batch, perturbation_flags=flags).expression  # log1p values, shaped like input_ids
```"""

_LIMITS = """## Intended use

Rank perturbations, or genes that respond to one, before an experiment. Predict for cells, a kind of perturbation and an
assay like those of the training.

## Limits

- Do not use the model for diagnosis, or for decisions about a person.
- A gene that was never perturbed in the training is predicted from its vector. Without a pretrained model, and if the
  screen does not measure it, the prediction is a share of the mean effect of the training conditions.
- The model predicts mean effects. It says little about how single cells differ in their response.
- Simple methods are hard to beat on this task. Compare the model with them on your own data."""
