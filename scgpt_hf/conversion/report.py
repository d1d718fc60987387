"""What a conversion tells: the report that accounts for every key and setting, and the model card."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


@dataclass(frozen=True)
class ConversionReport:
    """What became of an original checkpoint.

    Attributes:
        source: name of its folder.
        taken: place in our model of each original key that was taken.
        left_out: reason for each original key that was not.
        inferred: settings that keys and shapes tell with certainty.
        assumed: settings that no file records and nobody gave, with the value they took.
        notes: what else a user should know.
    """

    source: str
    taken: dict[str, str]
    left_out: dict[str, str]
    inferred: dict[str, Any]
    assumed: dict[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for key, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(key)
        n_keys = len(self.taken) + len(self.left_out)
        lines = [f"taken: {len(self.taken)} of the {n_keys} keys of {self.source}"]
        lines += [f"left out: {', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
        lines += [f"inferred from the keys: {_pairs(self.inferred)}", f"assumed: {_pairs(self.assumed) or 'nothing'}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def card_of(config: ScGPTConfig, processor: ScGPTProcessor, report: ConversionReport) -> str:
    """Return the model card of a converted checkpoint."""
    summary = "\n".join(f"- {line}" for line in str(report).splitlines())
    return f"""---
library_name: transformers
pipeline_tag: feature-extraction
license: other
license_name: that-of-the-original-weights
tags: [scgpt, single-cell, biology, transcriptomics, gene-expression]
---

# {report.source}, converted to scgpt_hf

Weights of an original [scGPT](https://github.com/bowang-lab/scGPT) checkpoint, unchanged, in the format of
scgpt_hf {version("scgpt_hf")}: {config.num_hidden_layers} layers x {config.hidden_size}, {config.n_bins} bins,
{processor.vocab_size:,} genes and special tokens.

**The token `<cls>` carries the value {processor.cls_value:g}.** The processor sets it; other tokenisers must do so too.

```python
import scanpy as sc, scgpt_hf
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("PATH_OR_REPOSITORY")
model = AutoModel.from_pretrained("PATH_OR_REPOSITORY")
embedding = model(**processor(sc.read_h5ad("cells.h5ad"))).cell_embedding  # raw counts in, (cells, hidden) out
```

Without the package, add `trust_remote_code=True`. Objectives beside {", ".join(config.loss_weights)} are weighed by
`AutoModelForPreTraining.from_pretrained(..., loss_weights={{...}})`.

## Conversion

{summary}

`conversion.json` lists every key.

## Source and licence

Architecture and training: Cui, H. et al. scGPT: toward building a foundation model for single-cell multi-omics using
generative AI. *Nature Methods* 21, 1470-1480 (2024). https://doi.org/10.1038/s41592-024-02201-0. The original code is
under the MIT licence; the weights stay under the licence of whoever published them. Not for diagnosis, nor for any
decision about a person.
"""


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
