"""The library's `Trainer`, with the processor in the collator, trains, validates, saves and resumes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification, AutoProcessor, Trainer
from transformers import TrainingArguments as Arguments

from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTProcessor

GENES = [f"ENSG{number:011d}" for number in range(30)]
COUNTS = np.random.default_rng(0).poisson(1.0, (24, 30)).astype(np.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    processor = ScGPTProcessor.from_genes(GENES)
    processor.save_pretrained(tmp_path / "checkpoint")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, dropout=0.1, **sizes)
    ScGPTForPreTraining(config).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def make_trainer(
    auto: Any, checkpoint: Path, *, packed: bool, steps: int, options: dict[str, Any], checkpointing: bool = False
) -> Trainer:
    """Return a trainer of `auto` on the cells of COUNTS; the data set holds the positions of the cells."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    classify = auto is AutoModelForSequenceClassification
    model = auto.from_pretrained(checkpoint, **({"num_labels": 2} if classify else {}))
    if checkpointing:
        model.gradient_checkpointing_enable()

    def collate(cells: list[int]) -> dict[str, Any]:
        masks = {} if classify else {"mask_ratios": [0.5]}
        batch = dict(processor(COUNTS[cells], GENES, packed=packed, **masks))
        return batch | ({"labels": torch.tensor(cells) % 2} if classify else {})

    arguments = Arguments(
        str(checkpoint.parent / "run"),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **options,
    )
    cells = list(range(len(COUNTS)))
    return Trainer(model, arguments, collate, train_dataset=cells, eval_dataset=cells[:8], processing_class=processor)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("auto", "options"),
    [(AutoModelForSequenceClassification, {}), (AutoModelForPreTraining, {"label_names": ["labels"]})],
    ids=["classifier", "pretraining"],
)
def test_it_trains_validates_saves_and_resumes(
    checkpoint: Path, auto: Any, options: dict[str, Any], packed: bool
) -> None:
    settings = {"packed": packed, "options": options}
    trainer = make_trainer(auto, checkpoint, steps=4, **settings)
    trainer.train()
    validated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(validated) == 2
    assert np.isfinite(validated).all()
    weights = trainer.model.state_dict()
    again = make_trainer(auto, checkpoint, steps=4, **settings)
    again.train(resume_from_checkpoint=str(checkpoint.parent / "run" / "checkpoint-2"))
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    saved = checkpoint.parent / "run" / "checkpoint-4"
    loaded = auto.from_pretrained(saved).state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.items())
    assert AutoProcessor.from_pretrained(saved).genes == GENES


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_does_not_change_the_loss(checkpoint: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            AutoModelForSequenceClassification,
            checkpoint,
            packed=False,
            steps=3,
            options={},
            checkpointing=checkpointing,
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
