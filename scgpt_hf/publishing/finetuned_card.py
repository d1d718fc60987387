"""Write the model card of a fine-tuned model: a classifier of cell types, or an encoder that integrates batches.

As in `card.py`, `run_summary.py` states the facts and this module sets them in Markdown.
"""

from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from scgpt_hf.publishing.card import (
    LOCAL_CHECKPOINT,
    TAGS,
    Metrics,
    assemble_card,
    card_metadata,
    card_title,
    error_table,
    escape_cell,
    how_to_cite,
    markdown_table,
)
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.publishing.run_summary import (
    about_held_out,
    classifier_rows,
    finetuning_data,
    finetuning_recipe,
    label_rows,
    source_name,
)

ANNOTATE, INTEGRATE = "annotate", "integrate"
# For each task: the Hub's name for what the model does, a tag, and the values of the summary that are results.
_TASKS: dict[str, tuple[str, str, Metrics]] = {
    ANNOTATE: (
        "tabular-classification",
        "cell-type-annotation",
        {"validation.macro_f1": ("f1", "macro-F1"), "validation.accuracy": ("accuracy", "accuracy")},
    ),
    INTEGRATE: (
        "feature-extraction",
        "batch-integration",
        {f"best.eval_{name}_mse": ("mse", f"{name.upper()} MSE, bins squared") for name in ("gep", "gepc")},
    ),
}


def finetuned_card(run: Path, repo_id: str | None = None) -> ModelCard:
    """Return the model card of a fine-tuning run.

    Args:
        run: the run folder, with summary.json and settings.yaml.
        repo_id: repository of the checkpoint; when not given, the code in the card loads the local `best_model`.

    Raises:
        ValueError: a file is malformed, or the task is unknown; the message names file and key.
    """
    summary, settings = RunRecord.read(run / "summary.json"), RunRecord.read(run / "settings.yaml")
    task = summary.text("task")
    if task not in _TASKS:
        raise ValueError(f"summary.json: expected one of {list(_TASKS)} at 'task', found {task!r}")
    if task == ANNOTATE:
        what = (
            f"A classifier of single cells. It predicts `{summary.text('labels_key')}`, with a calibrated confidence. "
            "It consists of a pretrained encoder and a classification head."
        )
        load, results, limits = _LOAD_CLASSIFIER, _classifier_results(summary), _LIMITS_OF_CLASSIFIER
    else:
        key = summary.text("batch_key")
        what = (
            f"An encoder of single cells for data of several experimental batches (`{key}`). It was fine-tuned to "
            "embed cells of one type close to each other, whatever their batch."
        )
        load, limits = (text.replace("{key}", key) for text in (_LOAD_INTEGRATION, _LIMITS_OF_INTEGRATION))
        results = _integration_results(summary)
    title = card_title(run, repo_id)
    sections = [
        f"# {title}\n\n{what}",
        load,
        _data(summary),
        _training(summary, settings),
        results,
        limits,
        how_to_cite(summary),
    ]
    pipeline, tag, metrics = _TASKS[task]
    base = summary.text("model")
    metadata = card_metadata(
        summary,
        title,
        task_type=pipeline,
        task_name=f"{tag.replace('-', ' ')}, held-out cells",
        metrics=metrics,
        dataset_name=source_name(summary),
        tags=[*TAGS, tag],
        base_model=base if is_on_hub(base) else None,
    )
    return assemble_card(metadata, sections, repo_id)


def is_on_hub(name: str) -> bool:
    """Return whether a model's name has the form OWNER/NAME and is not a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def _data(summary: RunRecord) -> str:
    rows = finetuning_data(summary)
    rows["License of this repository"] = "weights: as the data and the pretrained model require; code: Apache-2.0"
    return f"""## Data

{markdown_table(rows)}

Numbers in brackets count the cells of training and validation together. `split.json` lists the cells of each part."""


def _training(summary: RunRecord, settings: RunRecord) -> str:
    table = markdown_table(finetuning_recipe(summary, settings))
    return f"## Training\n\n{table}\n\n`settings.yaml` holds all settings of `scgpt-hf finetune`."


def _classifier_results(summary: RunRecord) -> str:
    """Return the scores of the model and of simple methods, and the scores of each label."""
    scores = "\n".join(
        f"| {escape_cell(name)} | {macro_f1} | {accuracy} |" for name, macro_f1, accuracy in classifier_rows(summary)
    )
    labels = "\n".join(
        f"| {escape_cell(label)} | {n_train:,} | {n_held_out:,} | {recall} | {precision} |"
        for label, n_train, n_held_out, recall, precision in label_rows(summary)
    )
    calibration = summary.number("calibration_error.after", ".3f")
    return f"""## Results

Scores on the held-out cells, and those of simpler methods on the same cells. Macro-F1 is the mean of the F1 scores of
all labels. {about_held_out(summary)}

| | macro-F1 | accuracy |
| --- | --- | --- |
{scores}

Expected calibration error (mean gap between confidence and accuracy): {calibration}.

| label | training cells | held-out cells | recall | precision |
| --- | --- | --- | --- | --- |
{labels}"""


def _integration_results(summary: RunRecord) -> str:
    return f"""## Results

Prediction of masked genes in held-out cells. Expression values are bins (ranks within a cell), so errors are in bins
squared. A run does not measure how well batches mix and cell types stay apart; use `scgpt-hf evaluate` for that.

{error_table(summary)}"""


_LOAD_CLASSIFIER = f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModelForSequenceClassification as Classifier, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), Classifier.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts
scgpt_hf.predict_cell_types(adata, model, processor)  # obs["predicted_cell_type"], and its confidence
```

You can also load the model without installing scgpt_hf. This needs transformers 5.6 or newer, which downloads the
code of the model along with its weights. Compute the logits of a few hundred cells per call:

```python
import scanpy as sc, torch
from transformers import AutoModelForSequenceClassification as Classifier, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
model = Classifier.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
with torch.no_grad(): logits = model(**processor(sc.read_h5ad("cells.h5ad")[:100])).logits  # model.config.id2label
```"""

_LIMITS_OF_CLASSIFIER = """## Intended use

Get a first guess at the labels of cells similar to the training cells, and check it against marker genes. Start with
the cells of low confidence. The input is raw counts of the same organism.

## Limits

- Do not use the model for diagnosis, or for decisions about a person.
- The model knows only the labels above, with their meaning in the training data. A cell of another type gets one of
  these labels, or "unassigned" if the confidence is low.
- Expect somewhat lower scores on other donors, and much lower ones on other tissues, assays and states.
- Labels with few training cells are predicted poorly; see the table.
- Logistic regression on variable genes is hard to beat. Compare the model with it on your own data."""

_LOAD_INTEGRATION = f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), AutoModel.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts, and obs["{{key}}"]
scgpt_hf.embed_anndata(adata, model, processor)  # adata.obsm["X_scgpt"]: (cells, hidden)
```"""

_LIMITS_OF_INTEGRATION = """## Intended use

Embed cells of the batches above together, to cluster, plot and compare them. The input is raw counts, and the batch
of each cell.

## Limits

- Do not use the model for diagnosis, or for decisions about a person.
- The model embeds only cells of the batches above, which it looks up in obs["{key}"]. For other batches, fine-tune
  again.
- Differences between batches can be biological. Integration can hide them.
- Before you rely on the model, compare it with a simple method (variable genes and PCA) on your own data."""
