"""Load published checkpoints with only transformers and its dependencies, and compare them with the originals.

test_standalone.py runs this file as `python standalone.py EXPECTED.safetensors`. It prints the checks that passed.
"""

import json
import sys
from typing import Any

import numpy as np

ABSENT = {"scgpt_hf", "numba", "scanpy", "anndata", "tiledbsoma", "cellxgene_census", "datasets"}


class Absent:
    """Make packages look as if they were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402  # after the others are hidden
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

GENES = [f"ENSG{number:011d}" for number in range(40)]
REMOTE = {"trust_remote_code": True}


def same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor], prefix: str) -> bool:
    """Return whether all weights of the model are in `expected`, bit for bit."""
    found = {prefix + name: weight for name, weight in model.state_dict().items()}
    return found.keys() <= expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def same_encoder(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    """Return whether the encoder of a model with a head is the published one."""
    return same_weights(model.scgpt, expected, "weights.scgpt.")


def main(path: str) -> list[str]:
    """Load the published models in every supported way, and return the names of the checks that passed."""
    expected = load_file(path)
    counts = expected["counts"].numpy()
    passed: list[str] = []

    def check(name: str, condition: bool) -> None:
        if not condition:
            raise AssertionError(name)
        passed.append(name)

    config = transformers.AutoConfig.from_pretrained("org/tiny", **REMOTE)
    check("config", type(config).__module__.startswith("transformers_modules") and config.model_type == "scgpt")
    # Without this argument, the library would ask on the terminal.
    tokenizer = transformers.AutoTokenizer.from_pretrained("org/tiny", trust_remote_code=False)
    check("tokenizer without remote code", tokenizer.convert_tokens_to_ids(GENES) == list(range(40)))
    try:
        transformers.AutoModel.from_pretrained("org/tiny", trust_remote_code=False)
    except ValueError as error:
        check("model without remote code raises", "trust_remote_code" in str(error))
    processor = transformers.AutoProcessor.from_pretrained("org/tiny", **REMOTE)
    batch = processor(counts, GENES)
    check("processor", all(torch.equal(batch[name], expected[f"batch.{name}"]) for name in ("input_ids", "values")))

    for auto in (transformers.AutoModelForPreTraining, transformers.AutoModelForMaskedLM):
        model = auto.from_pretrained("org/tiny", **REMOTE).eval()
        check(f"{auto.__name__} weights", same_weights(model, expected, "weights."))
        with torch.no_grad():
            output = model(**batch)
        check(f"{auto.__name__} output", torch.equal(output.gep, expected["gep"]))
    for options in ({}, {"attn_implementation": "eager"}, {"device_map": "cpu"}):
        model = transformers.AutoModel.from_pretrained("org/tiny", **REMOTE, **options).eval()
        name = f"AutoModel {', '.join(options) or 'as it is'}"
        check(f"{name}: weights", same_weights(model, expected, "weights.scgpt."))
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
            first = model(**batch, return_dict=False)[0]
        check(f"{name}: output", torch.allclose(output.cell_embedding, expected["cell_embedding"], atol=1e-5))
        check(f"{name}: hidden states", len(output.hidden_states) == config.num_hidden_layers + 1)
        check(f"{name}: tuple", torch.equal(first, output.last_hidden_state))

    model = transformers.AutoModelForPreTraining.from_pretrained("org/counting", **REMOTE).eval()
    check("count decoder and shortcut", same_weights(model, expected, "counting."))
    with torch.no_grad():
        found = model(**batch).cell_embedding
        encoder = transformers.AutoModel.from_pretrained("org/counting", **REMOTE).eval()
        # Close, not equal: the other process may use another number of threads.
        check("embedding with a shortcut", torch.allclose(found, expected["counting_embedding"], atol=1e-5))
        check("encoder with a shortcut", torch.equal(encoder(**batch).cell_embedding, found))

    model = transformers.AutoModelForTokenClassification.from_pretrained("org/perturbation", **REMOTE).eval()
    check("perturbation model", same_weights(model, expected, "perturbation."))
    flags = (batch["input_ids"] == batch["input_ids"][0, 1]).long()
    with torch.no_grad():
        found = model(**batch, perturbation_flags=flags).expression
    check("perturbed expression", torch.allclose(found, expected["perturbed"], atol=1e-5))

    model = transformers.AutoModelForPreTraining.from_pretrained("org/generative", **REMOTE).eval()
    check("generative model", same_weights(model, expected, "generative."))
    queries = batch["attention_mask"] & (batch["input_ids"] % 3 == 1)
    real, vectors = batch["attention_mask"], torch.ones(len(counts), model.config.hidden_size)
    with torch.no_grad():
        found = model(**batch, queries=queries).gep
        generated = model(**batch, queries=queries, input_cell_embedding=vectors).gep
    check("queries", torch.allclose(found[real], expected["asked"][real], atol=1e-5))
    check("cells from embeddings", torch.allclose(generated[real], expected["generated"][real], atol=1e-5))

    model = transformers.AutoModelForPreTraining.from_pretrained("org/multimodal", **REMOTE).eval()
    check("model of genes and proteins", same_weights(model, expected, "multimodal."))
    names = model.config.modalities[:-2]
    with_proteins = transformers.AutoProcessor.from_pretrained("org/multimodal", **REMOTE)
    check("modalities of the processor", names == ["RNA", "protein"] == list(dict.fromkeys(with_proteins.modalities)))
    joint, key = with_proteins(counts, GENES), "multimodal_batch"
    check("proteins beside genes", all(torch.equal(joint[n], expected[f"{key}.{n}"]) for n in ("input_ids", "values")))
    with torch.no_grad():
        output, real = model(**joint), joint["attention_mask"]
    same = (torch.allclose(output[n][real], expected[f"multimodal_{n}"][real], atol=1e-5) for n in ("gep", "gepc"))
    check("predicted genes and proteins", all(same))

    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        "org/tiny", num_labels=3, output_loading_info=True, **REMOTE
    )
    check("new class head", same_encoder(model, expected) and model(**batch).logits.shape == (len(counts), 3))
    check("new class head is reported", any("class_head" in name for name in report["missing_keys"]))
    model = transformers.AutoModelForSequenceClassification.from_pretrained("org/classifier", **REMOTE)
    check("class head", model.config.num_labels == 3 and same_encoder(model, expected))
    model = transformers.AutoModel.from_pretrained("org/classifier", **REMOTE)
    check("encoder of a classifier", same_weights(model, expected, "weights.scgpt."))
    model = transformers.AutoModelForPreTraining.from_pretrained("org/classifier", **REMOTE)
    check("pretraining from a classifier", same_encoder(model, expected))

    model.save_pretrained("again")
    processor.save_pretrained("again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained("again", num_labels=2, **REMOTE)
    check("saved again without the package", same_encoder(again, expected))
    own = type(transformers.AutoProcessor.from_pretrained("again", **REMOTE)).__module__.split(".")[1]
    check("the code comes from the new folder", {own, type(again).__module__.split(".")[1]} == {"again"})

    half = {name: weight.bfloat16() if weight.is_floating_point() else weight for name, weight in expected.items()}
    for repo_id, options in (("org/tiny-bf16", {}), ("org/tiny", {"dtype": torch.bfloat16})):
        model = transformers.AutoModelForPreTraining.from_pretrained(repo_id, **options, **REMOTE).eval()
        check(f"bf16 {repo_id}", model.dtype == torch.bfloat16 and same_weights(model, half, "weights."))
        with torch.no_grad():
            check(f"bf16 output {repo_id}", bool(torch.isfinite(model(**batch).gep).all()))
    check("no other package was imported", not ABSENT & {name.split(".")[0] for name in sys.modules})
    return passed


if __name__ == "__main__":
    np.seterr(all="raise")
    print(json.dumps(main(sys.argv[1])))
