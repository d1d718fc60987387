"""The Auto classes of transformers know the model after `import scgpt_hf`, whatever is imported next, or before."""

import subprocess
import sys

import pytest

CHECK = """
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("scgpt", vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
                              intermediate_size=4, pad_token_id=3)
autos = AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification
print(*[type(auto.from_config(config)).__name__ for auto in autos], PROCESSOR_MAPPING[type(config)].__name__)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("scgpt_hf")]
"""
KNOWN = "ScGPTModel ScGPTForPreTraining ScGPTForPreTraining ScGPTForSequenceClassification ScGPTProcessor"


@pytest.mark.parametrize(
    "first",
    [
        "import scgpt_hf",
        "import transformers.modeling_layers, scgpt_hf",
        "import scgpt_hf, transformers.modeling_layers",  # imports the Auto classes before its own end
        "import scgpt_hf; from scgpt_hf.model.modeling_scgpt import ScGPTModel",
        "import scgpt_hf; from transformers import AutoProcessor",
    ],
)
def test_the_auto_classes_know_the_model(first):
    done = subprocess.run([sys.executable, "-c", f"import sys\n{first}\n{CHECK}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == KNOWN.split()


def test_another_error_of_an_import_passes_unchanged():
    code = "import scgpt_hf; import transformers.no_such_module"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'transformers.no_such_module'"
