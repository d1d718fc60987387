"""Write the model card of a pretraining run: how to load the model, its data, training, results, limits and citations.

`run_summary.py` states the facts; this module sets them in Markdown, with the metadata that the Hub reads.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scgpt_hf.publishing.record import UNKNOWN, RunRecord
from scgpt_hf.publishing.run_summary import (
    EMBEDDING_SCORES,
    Code,
    Rows,
    error_rows,
    explain_values,
    pretraining_data,
    pretraining_recipe,
    read_summary,
    score_rows,
    supervision_rows,
    value_unit,
)

# The name that a card uses for its own checkpoint until it is published; `name_checkpoint` puts the repository there.
LOCAL_CHECKPOINT = "best_model"
TAGS = ["scgpt", "single-cell", "biology", "transcriptomics", "gene-expression"]
# Key of the summary → the Hub's type of metric, and the name that the Hub shows.
Metrics = dict[str, tuple[str, str]]
_METRICS: Metrics = {
    "best.eval_gep_mse": ("mse", "GEP MSE, bins squared"),
    "best.eval_gepc_mse": ("mse", "GEPC MSE, bins squared"),
    "best.eval_variance_explained": ("explained_variance", "share of the variance explained, against a constant"),
    **{f"best.eval_{key}": (key, f"{name} of the cell types") for key, (name, _) in EMBEDDING_SCORES.items()},
}
_HUB_DATASET = "hf://datasets/"


def model_card(run: Path, repo_id: str | None = None, weights: str = LOCAL_CHECKPOINT) -> ModelCard:
    """Return the model card of a pretraining run, finished or in progress.

    For a fine-tuned model, see `finetuned_card`.

    Args:
        run: the run folder, with any of settings.yaml, split.json, summary.json, metrics.jsonl, loss.png, umap.png.
        repo_id: repository of the checkpoint; when not given, the code in the card loads the local `best_model`.
        weights: folder inside the run with config.json and processor_config.json of the checkpoint.

    Returns:
        The card. Values that the run does not record read "not recorded"; while training is in progress, lines with
        such values are left out.

    Raises:
        ValueError: a file is malformed; the message names the file and the key.
    """
    settings, summary = RunRecord.read(run / "settings.yaml"), read_summary(run)
    in_progress = (run / "split.json").is_file() and summary.get("steps", int) is None
    config = RunRecord.read(run / weights / "config.json")
    title = card_title(run, repo_id)
    figures = [name for name in ("loss.png", "umap.png") if (run / name).is_file()]
    sections = [
        _how_to_load(RunRecord.read(run / weights / "processor_config.json"), settings, summary),
        *_other_uses(config),
        _data(summary, settings),
        _training(summary, settings, config),
        _results(summary, figures),
        *_supervision(summary),
        _USE_AND_LIMITS,
        how_to_cite(summary),
    ]
    if in_progress:
        sections = [_IN_PROGRESS, *map(_drop_unknown_lines, sections)]
    return assemble_card(_metadata(summary, settings, title), [f"# {title}\n\n{_WHAT}", *sections], repo_id)


def card_title(run: Path, repo_id: str | None) -> str:
    """Return the name of the repository, or of the run folder where there is none."""
    return repo_id.split("/")[-1] if repo_id else run.resolve().name


def assemble_card(metadata: ModelCardData, sections: list[str], repo_id: str | None) -> ModelCard:
    """Return a card of metadata and sections, with code that loads the checkpoint from `repo_id` if given."""
    text = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return ModelCard(name_checkpoint(text, repo_id) if repo_id else text)


def name_checkpoint(card: str, repo_id: str) -> str:
    """Return the text of a card with code that loads the checkpoint from a repository."""
    return card.replace(f'from_pretrained("{LOCAL_CHECKPOINT}"', f'from_pretrained("{repo_id}"')


def card_metadata(
    summary: RunRecord,
    title: str,
    *,
    task_type: str,
    task_name: str,
    metrics: Metrics,
    dataset_name: str = "see the card",
    **fields: Any,
) -> ModelCardData:
    """Return the metadata that the Hub reads: library, task, license, and the results it can list.

    Args:
        summary: summary of the run.
        title: name of the model.
        task_type: the Hub's name for what the model does, e.g. "feature-extraction".
        task_name: what the results measure.
        metrics: which values of the summary are results.
        dataset_name: data of the results, unless they are from the Census.
        fields: more fields of `ModelCardData`.
    """
    census = summary.get("data.census_version", str)
    results = [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type="custom",  # the Census is not a data set of the Hub
            dataset_name=f"CELLxGENE Census {census}" if census else dataset_name,
            dataset_revision=census,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for key, (kind, name) in metrics.items()
        if (value := summary.get(key, (int, float))) is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task_type,
        model_name=title,
        eval_results=results or None,
        license="cc-by-4.0" if census else "other",
        license_name=None if census else "see-the-sources",
        **fields,
    )


def _metadata(summary: RunRecord, settings: RunRecord, title: str) -> ModelCardData:
    sources = [str(name) for name in settings.get("data.data", list) or []]
    on_hub = [name.removeprefix(_HUB_DATASET).rstrip("/") for name in sources if name.startswith(_HUB_DATASET)]
    return card_metadata(
        summary,
        title,
        task_type="feature-extraction",
        task_name="masked gene expression prediction, donors held out",
        metrics={key: (kind, name.replace("bins", value_unit(summary))) for key, (kind, name) in _METRICS.items()},
        tags=TAGS,
        datasets=[name.split("@")[0] for name in on_hub] or None,  # without the revision
    )


def _drop_unknown_lines(section: str) -> str:
    """Return the section without the lines whose value is not recorded yet, such as rows of tables."""
    return "\n".join(line for line in section.splitlines() if UNKNOWN not in line)


def _how_to_load(processor: RunRecord, settings: RunRecord, summary: RunRecord) -> str:
    head = "holds the classes of the training cells" if supervision_rows(summary) else "starts with random weights"
    cls_value = processor.number("cls_value", "g")
    cls_value = settings.number("data.cls_value", "g") if cls_value == UNKNOWN else cls_value
    return f"""## How to load

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor, model = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}"), AutoModel.from_pretrained("{LOCAL_CHECKPOINT}")
adata = sc.read_h5ad("cells.h5ad")  # raw counts
scgpt_hf.embed_anndata(adata, model, processor)  # adata.obsm["X_scgpt"]: (cells, hidden)
```

You can also load the model without installing scgpt_hf. This needs transformers 5.6 or newer, which downloads the
code of the model along with its weights. Embed a few hundred cells per call:

```python
import scanpy as sc, torch
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
model = AutoModel.from_pretrained("{LOCAL_CHECKPOINT}", trust_remote_code=True)
with torch.no_grad(): embedding = model(**processor(sc.read_h5ad("cells.h5ad")[:100])).cell_embedding
```

The checkpoint also loads with `AutoModelForPreTraining`, `AutoModelForMaskedLM` and
`AutoModelForSequenceClassification`; the classification head of the latter {head}.
The processor gives the `<cls>` token the expression value {cls_value}; other tokenizing code must do the same."""


def _other_uses(config: RunRecord) -> list[str]:
    """Return the sections on generation and on modalities, for models that have them."""
    sections = [_GENERATION] if config.get("objective", str) == "generative" else []
    names = [name for name in config.get("modalities", list) or [] if name not in ("<pad>", "<cls>")]
    return [*sections, *([_MODALITIES.replace("{names}", ", ".join(names))] if names else [])]


def _data(summary: RunRecord, settings: RunRecord) -> str:
    weights = "CC BY 4.0, like the training data" if summary.get("data.census_version", str) else "see the sources"
    rows = pretraining_data(summary, settings)
    rows["License of this repository"] = f"weights: {weights}; code: Apache-2.0"
    return f"""## Data

{markdown_table(rows)}

Numbers in brackets count the cells of training and validation together. `split.json` lists the genes, and the donors
and cells of each part."""


def _training(summary: RunRecord, settings: RunRecord, config: RunRecord) -> str:
    return f"""## Training

{markdown_table(pretraining_recipe(summary, settings, config))}

`settings.yaml` holds all settings. To repeat the run, get the data and run `scgpt-hf pretrain settings.yaml`."""


def _results(summary: RunRecord, figures: list[str]) -> str:
    shown = "\n\n".join(f"![{name}]({name})" for name in figures)
    return f"""## Results

Best validation, at step {summary.number("best.step")}: prediction of masked genes in cells of held-out donors.
{explain_values(summary)} Compare the model with the simple
predictions in the same table.

{error_table(summary)}

Share of the variance explained (1 - GEP / constant): {summary.number("best.eval_variance_explained", ".1%")}.
{score_table(summary)}
{shown}""".rstrip()


def _supervision(summary: RunRecord) -> list[str]:
    """Return the section on the labels of a supervised run; no section for any other run."""
    rows = supervision_rows(summary)
    return [f"## Supervision\n\n{_SUPERVISED}\n\n{markdown_table(rows)}"] if rows else []


def score_table(summary: RunRecord) -> str:
    """Return the scores of the embedding of labelled cells beside the baselines as a table; nothing without labels."""
    if not (rows := score_rows(summary)):
        return ""
    header = ["embedding", *(name for name, _ in EMBEDDING_SCORES.values())]
    lines = [[row.method, *("–" if score is None else f"{score:.3f}" for score in row.scores)] for row in rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in EMBEDDING_SCORES.values())
    return f"""
Cell types of labelled cells of held-out donors, in the embedding of the model and of simple methods that were fitted to
the training cells. Higher is better.

{table}

{meanings}.
"""


def error_table(summary: RunRecord) -> str:
    """Return the errors of the model and of its baselines as a table."""
    rows = [
        f"| {row.name} | {UNKNOWN if row.value is None else f'{row.value:.2f}'} | {row.meaning} |"
        for row in error_rows(summary)
    ]
    return "\n".join(["| prediction | mean squared error | what it uses |", "| --- | --- | --- |", *rows])


def how_to_cite(summary: RunRecord) -> str:
    """Return the section with the citations of scGPT, this software and, where it was used, the Census."""
    version = summary.get("versions.scgpt_hf", str)
    lines = [
        "- scGPT: Cui, H. et al. scGPT: toward building a foundation model for single-cell multi-omics using "
        "generative AI. *Nature Methods* 21, 1470-1480 (2024). https://doi.org/10.1038/s41592-024-02201-0",
        "- this software: scgpt_hf" + (f", version {version}" if version else ""),
    ]
    if census := summary.get("data.census_version", str):
        lines.append(
            f"- CELLxGENE Census, version {census}: CZI Cell Science Program et al. CZ CELLxGENE Discover. "
            "*Nucleic Acids Research* 53, D886-D900 (2025). https://doi.org/10.1093/nar/gkae1142"
        )
    return "\n".join(["## How to cite\n", *lines])


def markdown_table(rows: Rows) -> str:
    """Return a table of two columns without a header; `Code` is set in backticks."""
    texts = {name: f"`{text}`" if isinstance(text, Code) else text for name, text in rows.items()}
    cells = [f"| {name} | {escape_cell(text)} |" for name, text in texts.items()]
    return "\n".join(["| | |", "| --- | --- |", *cells])


def escape_cell(text: str) -> str:
    r"""Return the text of a table cell with pipes escaped.

    Example:
        >>> escape_cell("a || b")
        'a \\|\\| b'
    """
    return text.replace("|", "\\|")


_WHAT = """A transformer that reads a cell as a list of genes with their expression. It was pretrained to predict the
expression of masked genes from the genes that stay visible, with the architecture and the objectives of scGPT."""

_GENERATION = f"""## Generate cells

The model was trained to predict genes that are asked for by name only. It predicts them from measured genes
(`prompt=`), from a cell embedding, or from both:

```python
import scgpt_hf
from transformers import AutoModelForPreTraining, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}")
model = AutoModelForPreTraining.from_pretrained("{LOCAL_CHECKPOINT}")
cells = scgpt_hf.generate_cells(model, ["CD3D", "LYZ"], processor, cell_embedding=vectors)  # cells.X: (cells, genes)
```

`vectors` come from `embed_anndata(..., normalize=False)`. Without the package, pass `queries`, a boolean tensor that is
true at the genes that are asked for, to `model`."""

_MODALITIES = f"""## Modalities

The model reads the modalities {{names}}. Each is a kind of token with separate expression values. Join your
tables with `scgpt_hf.join_modalities`. In cells that lack a modality, it can be predicted:

```python
import scgpt_hf
from transformers import AutoModelForPreTraining, AutoProcessor
processor = AutoProcessor.from_pretrained("{LOCAL_CHECKPOINT}")
model = AutoModelForPreTraining.from_pretrained("{LOCAL_CHECKPOINT}")
predicted = scgpt_hf.predict_expression(rna, model, processor, genes=["protein:CD3"]).layers["gep"]
```

`processor.genes` lists the names, and `processor.modalities` the modality of each."""

_SUPERVISED = """**This model was trained with labels.** Compare how well its embeddings separate such labels with other
supervised models, not with models that never saw a label. Its class head holds these classes: the checkpoint loads as
a classifier with `AutoModelForSequenceClassification`."""

_IN_PROGRESS = """**Training is in progress.** These are the weights of a checkpoint. What is only known after training
is left out."""

_USE_AND_LIMITS = """## Intended use

Embed single cells, to explore, integrate and annotate them, or fine-tune the model for such a task. The input is raw
counts of the organism above. `processor.match_genes` reports which of your genes are in the vocabulary.

## Limits

- Do not use the model for diagnosis, or for decisions about a person.
- The model has seen only the tissues, assays and states listed above. Its embeddings are untested elsewhere.
- Effects of donor and assay remain in the embeddings.
- Bins are ranks within a cell. Equal bins in two cells do not mean equal counts.
- Compare the errors with those of the simple predictions. Ties among low counts cannot be predicted, and predicting
  each gene's mean is easy.
- Before you rely on the model, compare it with a simple method (variable genes and PCA) on your own data."""
