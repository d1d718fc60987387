"""Tests that published checkpoints load in a process without this package, and in one with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scgpt_hf.publishing.publish_run import publish
from tests.support.hub_run import make_run
from tests.support.hub_server import Client, Hub, client_environment

N_GENES, N_CELLS = 40, 6
GENERATIVE = {"objective": "generative", "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}}
MODALITIES = ["RNA"] * (N_GENES - 6) + ["protein"] * 6


def make_and_publish(folder: Path) -> str:
    """Publish a tiny model, sharded and in bf16, and one of each other kind; write the expected weights and outputs."""
    import torch
    from safetensors.torch import save_file

    import scgpt_hf
    from scgpt_hf import ScGPTForPreTraining

    torch.manual_seed(0)
    genes = [f"ENSG{number:011d}" for number in range(N_GENES)]
    processor = scgpt_hf.ScGPTProcessor.from_genes(genes, max_tokens=30)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = scgpt_hf.ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **shape)
    model = ScGPTForPreTraining(config).eval()
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32)
    batch = processor(counts, genes)
    with torch.no_grad():
        output = model(**batch)
    expected = {f"weights.{name}": weight.clone() for name, weight in model.state_dict().items()}
    expected |= {"gep": output.gep, "cell_embedding": output.cell_embedding.clone(), "counts": torch.from_numpy(counts)}
    expected |= {f"batch.{name}": batch[name] for name in ("input_ids", "values")}
    with_counts = {"loss_weights": {"gep": 1.0, "counts": 1.0}, "cls_shortcut": True, "n_domains": 2}
    counting = ScGPTForPreTraining(changed(config, **with_counts)).eval()
    counting.count_head.set_statistics(torch.ones(2, processor.vocab_size).tril(35))
    expected |= {f"counting.{name}": weight.clone() for name, weight in counting.state_dict().items()}
    with torch.no_grad():
        expected["counting_embedding"] = counting(**batch).cell_embedding
    perturbation = scgpt_hf.ScGPTForPerturbation(config).eval()
    perturbation.flag_encoder.weight.data.normal_()
    perturbation.expression_head.bias[-1].reset_parameters()  # a new head predicts no change
    expected |= {f"perturbation.{name}": weight.clone() for name, weight in perturbation.state_dict().items()}
    flags = (batch["input_ids"] == batch["input_ids"][0, 1]).long()
    with torch.no_grad():
        expected["perturbed"] = perturbation(**batch, perturbation_flags=flags).expression
    generative = ScGPTForPreTraining(changed(config, **GENERATIVE)).eval()
    expected |= {f"generative.{name}": weight.clone() for name, weight in generative.state_dict().items()}
    asked = {"queries": batch["attention_mask"] & (batch["input_ids"] % 3 == 1)}
    with torch.no_grad():
        expected["asked"] = generative(**batch, **asked).gep
        expected["generated"] = generative(**batch, **asked, input_cell_embedding=torch.ones(N_CELLS, 32)).gep
    with_proteins = scgpt_hf.ScGPTProcessor.from_genes(genes, max_tokens=30, modalities=MODALITIES)
    modalities = {"modalities": with_proteins.modality_names, "modality_embedding": "both"}
    multimodal = ScGPTForPreTraining(changed(config, **modalities)).eval()
    multimodal.scgpt.modality_table.of_token.copy_(
        torch.from_numpy(with_proteins.modality_ids(modalities["modalities"]))
    )
    expected |= {f"multimodal.{name}": weight.clone() for name, weight in multimodal.state_dict().items()}
    batch_with_proteins = with_proteins(counts, genes)
    expected |= {f"multimodal_batch.{name}": batch_with_proteins[name] for name in ("input_ids", "values")}
    with torch.no_grad():
        output = multimodal(**batch_with_proteins)
    expected |= {"multimodal_gep": output.gep, "multimodal_gepc": output.gepc}
    save_file(expected, folder / "expected.safetensors")

    save_and_publish(folder / "generative", generative, processor)
    save_and_publish(folder / "multimodal", multimodal, with_proteins)
    save_and_publish(folder / "perturbation", perturbation, processor)
    save_and_publish(folder / "tiny", model, processor, max_shard_size="20KB")
    config.num_labels = 3
    classifier = scgpt_hf.ScGPTForSequenceClassification(config)
    classifier.scgpt.load_state_dict(model.scgpt.state_dict())
    save_and_publish(folder / "classifier", classifier, processor)
    save_and_publish(folder / "counting", counting, processor)
    save_and_publish(folder / "tiny-bf16", model.bfloat16(), processor)
    return str(folder / "expected.safetensors")


def changed(config: Any, **settings: Any) -> Any:
    """Return a copy of a config with other settings."""
    return type(config)(**{**config.to_dict(), **settings})


def save_and_publish(run: Path, model: Any, processor: Any, **options: Any) -> None:
    """Save model and processor as training does, and publish them under the run's name."""
    make_run(run)
    for path in (run / "best_model").iterdir():
        path.unlink()
    model.save_pretrained(run / "best_model", **options)
    processor.save_pretrained(run / "best_model")
    publish(run, f"org/{run.name}", token="hf_owner")


@pytest.fixture(scope="module")
def expected(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Publish the models and return the file of expected weights and outputs."""
    return str(client(make_and_publish, tmp_path_factory.mktemp("published")))


def test_published_model_is_sharded_and_includes_its_code(hub: Hub, expected: str) -> None:
    files = hub.files("org/tiny")
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert {"modeling_scgpt.py", "processing_scgpt.py", "configuration_scgpt.py", "tokenizer.json"} <= set(files)
    assert not any("scgpt_hf" in line for line in imports_of(files))


def imports_of(files: dict[str, bytes]) -> list[str]:
    """Return the lines of the published code that import something."""
    code = [content.decode() for name, content in files.items() if name.endswith(".py")]
    return [line for text in code for line in text.splitlines() if line.lstrip().startswith(("import ", "from "))]


def test_process_without_this_package_loads_all_models(hub: Hub, expected: str, tmp_path: Path) -> None:
    environment = os.environ | client_environment(hub, tmp_path / "hf_home")
    script = Path(__file__).with_name("standalone.py")
    finished = subprocess.run(
        [sys.executable, str(script), expected],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    passed = json.loads(finished.stdout.splitlines()[-1])
    assert len(passed) == 44
    assert passed[-1] == "no other package was imported"


def load_with_the_package() -> list[str]:
    """Return the modules of the classes that the Auto classes choose when scgpt_hf is imported."""
    import transformers

    import scgpt_hf  # noqa: F401  # registers the classes

    names = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForSequenceClassification",
        "AutoProcessor",
    )
    return [type(getattr(transformers, name).from_pretrained("org/tiny")).__module__ for name in names]


def test_with_this_package_trust_remote_code_is_not_needed(client: Client, expected: str) -> None:
    assert {module.split(".")[0] for module in client(load_with_the_package)} == {"scgpt_hf"}
