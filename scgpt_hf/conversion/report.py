"""The report on a conversion, which lists every key and setting, and the model card."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


@dataclass(frozen=True)
class ConversionReport:
    """The parts of a checkpoint that were converted, and how. `print(report)` prints a summary.

    Attributes:
        source: name of the folder of scGPT's checkpoint.
        converted: original key → name in the state dict of our model.
        left_out: original key → reason why it was not converted.
        inferred: settings inferred with certainty from keys and shapes.
        assumed: settings that no file records and that you did not pass, with the values used.
        notes: what else a user of the model should know.
    """

    source: str
    converted: dict[str, str]
    left_out: dict[str, str]
    inferred: dict[str, Any]
    assumed: dict[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(key)
        n_keys = len(self.converted) + len(self.left_out)
        lines = [f"converted: {len(self.converted)} of the {n_keys} keys of {self.source}"]
        lines += [f"left out: {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
        lines += [
            f"inferred from keys and shapes: {_pairs(self.inferred)}",
            f"assumed: {_pairs(self.assumed) or 'nothing'}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def build_card(config: ScGPTConfig, processor: ScGPTProcessor, report: ConversionReport) -> str:
    """Return the model card of a converted checkpoint, as Markdown."""
    summary = "\n".join(f"- {line}" for line in str(report).splitlines())
    perturbs = "flag_encoder.weight" in report.converted.values()
    return f"""---
library_name: transformers
pipeline_tag: {"tabular-regression" if perturbs else "feature-extraction"}
license: other
license_name: that-of-the-original-weights
tags: [scgpt, single-cell, biology, transcriptomics, gene-expression]
---

# {report.source}, converted to scgpt_hf

Weights of an original [scGPT](https://github.com/bowang-lab/scGPT) checkpoint, unchanged, in the format of
scgpt_hf {version("scgpt_hf")}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.n_bins} bins,
{processor.vocab_size:,} genes and special tokens.

**The value of the token `<cls>` is {processor.cls_value:g}.** The processor sets it; other tokenizers must do the same.

{_PERTURB if perturbs else _EMBED}

Without the package, pass `trust_remote_code=True`. The model's objectives are {", ".join(config.loss_weights)}. To
train others, pass `loss_weights={{...}}` to `AutoModelForPreTraining.from_pretrained`.

## Conversion

{summary}

`conversion.json` lists every key.

## Source and license

Architecture and training: Cui, H. et al. scGPT: toward building a foundation model for single-cell multi-omics using
generative AI. *Nature Methods* 21, 1470-1480 (2024). https://doi.org/10.1038/s41592-024-02201-0. The original code is
under the MIT license; the weights keep the license under which they were published. Do not use the model for diagnosis
or for any decision about a person.
"""


_EMBED = """```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("PATH_OR_REPOSITORY")
model = AutoModel.from_pretrained("PATH_OR_REPOSITORY")
embedding = model(**processor(sc.read_h5ad("cells.h5ad"))).cell_embedding  # raw counts in, (cells, hidden) out
```"""
_PERTURB = """```python
import scanpy as sc, scgpt_hf
adata = sc.read_h5ad("cells.h5ad")  # raw counts, and obs["condition"] with "ctrl" for control cells
found = scgpt_hf.predict_perturbation(adata, ["GENE1+ctrl", "GENE1+GENE2"], "PATH_OR_REPOSITORY")
found.varm["delta"]  # genes x conditions: mean difference of log1p values
```"""


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
