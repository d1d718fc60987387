"""Converted checkpoints of any size compute what scGPT's code does; invalid files raise errors that name the cause."""

import json
import os
import pickle
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.sparse import csr_matrix
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from scgpt_hf import convert_scgpt, generate_cells
from scgpt_hf.cells.source import open_source
from scgpt_hf.conversion.checkpoint import save_converted
from scgpt_hf.inference import embed_cells
from tests.support import ROOT
from tests.support.original_scgpt import Original, Tensors, forward, in_layout, weights_of, write_checkpoint

SCRIPT = ROOT / "scripts" / "convert.py"
SMALL = Original(n_classes=4, flags=True)


def some_inputs(original: Original, seed: int = 0) -> Tensors:
    """Three padded cells of different lengths, each with `<cls>` as its first token."""
    rng = np.random.default_rng(seed)
    vocab, args = original.vocab, original.args
    ids = np.full((3, 9), vocab["<pad>"])
    values = np.full(ids.shape, float(args["pad_value"]))
    real = np.arange(9) < np.array([9, 6, 4])[:, None]
    ids[real] = rng.choice([vocab[f"GENE{gene}"] for gene in range(original.n_genes)], real.sum())
    values[real] = rng.integers(0, original.n_bins, real.sum())
    values[:, 2] = args["mask_value"]
    ids[:, 0] = vocab["<cls>"]
    domain = rng.integers(max(original.n_domains, 1))
    tensors = {"ids": ids, "values": values.astype(np.float32), "real": real, "domains": np.full(3, domain)}
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def to_batch(inputs: Tensors) -> dict[str, torch.Tensor]:
    """The inputs under the names that our models take."""
    return {
        "input_ids": inputs["ids"],
        "values": inputs["values"],
        "attention_mask": inputs["real"],
        "domain_ids": inputs["domains"],
    }


def assert_same(found: Any, expected: Tensors, real: torch.Tensor) -> None:
    """Compare outputs by name; of outputs per token, only those of real tokens."""
    for name, wanted in expected.items():
        ours = found[name]
        if wanted.shape[:2] == real.shape:
            ours, wanted = ours[real], wanted[real]
        torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@st.composite
def originals(draw: st.DrawFn) -> Original:
    """Networks of scGPT's code of any size, with any combination of switches that it can run."""
    n_heads = draw(st.integers(1, 3))
    query = draw(st.sampled_from(["inner_product", "concat", "sum", None]))
    inner = query in ("inner_product", None)
    n_domains = draw(st.integers(0, 3)) if inner else 0
    layout = draw(st.sampled_from(["in_proj", "Wqkv", "_impl.Wqkv"]))
    return Original(
        n_genes=draw(st.integers(3, 50)),
        # Not 2: a norm over two values amplifies rounding without limit where they are nearly equal.
        width=n_heads * draw(st.integers(4, 6)),
        n_heads=n_heads,
        d_hid=draw(st.integers(1, 20)),
        n_layers=draw(st.integers(1, 3)),
        n_bins=draw(st.integers(3, 60)),
        values=draw(st.sampled_from(["continuous", "category", "scaling"])),
        pre_norm=layout != "in_proj" and draw(st.booleans()),
        pooling=draw(st.sampled_from(["cls", "average", "weighted"])),
        explicit_zero=inner and draw(st.booleans()),
        query=query,
        n_domains=n_domains,
        norm=draw(st.sampled_from(["none", "batch", *(["domain"] if n_domains else [])])),
        n_classes=draw(st.integers(0, 5)),
        class_layers=draw(st.integers(1, 4)),
        flags=draw(st.booleans()),
        layout=layout,
        max_seq_len=draw(st.integers(2, 40)),
    )


def convert(folder: Path, original: Original) -> Any:
    """Convert with the settings that the files do not record."""
    scheme = {"norm_scheme": "scgpt_pre"} if original.pre_norm else {}
    return convert_scgpt(folder, cell_pooling=original.pooling, **scheme)


@settings(
    deadline=None,
    max_examples=40,
    derandomize=True,  # some random network amplifies rounding beyond any tolerance, e.g. where a pooled sum is near 0
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(original=originals(), seed=st.integers(0, 100))
def test_a_converted_network_computes_the_same_as_the_original(original: Original, seed: int, tmp_path: Path) -> None:
    weights = weights_of(original, seed)
    model, processor, report = convert(write_checkpoint(tmp_path, original, weights), original)
    inputs = some_inputs(original, seed)
    with torch.no_grad():
        found = model(**to_batch(inputs))
    assert_same(found, forward(weights, original, inputs), inputs["real"])
    written = in_layout(weights, original.layout)
    assert report.converted.keys() | report.left_out.keys() == written.keys()
    generative = original.flags and original.pooling == "cls" and original.norm == "none"
    assert set(report.left_out) == ({"flag_encoder.weight"} if original.flags and not generative else set())
    assert model.config.objective == ("generative" if generative else "masked")
    targets = {target.partition("[")[0] for target in report.converted.values()}
    assert targets == model.state_dict().keys()
    assert processor.tokenizer.get_vocab() == original.vocab
    assert (processor.n_bins, processor.max_tokens) == (original.n_bins, original.max_seq_len)
    assert processor.cls_value == processor.pad_value == original.args["pad_value"]
    assert processor.mask_value == original.args["mask_value"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_converted_generative_network_predicts_queries_as_the_original(
    tmp_path: Path, pre_norm: bool, packed: bool
) -> None:
    original = replace(SMALL, pre_norm=pre_norm, layout="Wqkv")
    weights, inputs = weights_of(original), some_inputs(original)
    model, _, _ = convert(write_checkpoint(tmp_path, original, weights), original)
    real = inputs["real"]
    inputs["queries"] = real & (inputs["ids"] % 2 == 0) & (torch.arange(9) > 0)
    assert 3 < inputs["queries"].sum() < real.sum() - 3
    with torch.no_grad():
        expected = forward(weights, original, inputs)
        if packed:
            lengths, given = real.sum(1), (real & ~inputs["queries"])
            batch = {"input_ids": inputs["ids"][real][None], "values": inputs["values"][real][None]}
            batch |= {"queries": inputs["queries"][real][None], "key_positions": given[real].nonzero()[:, 0]}
            for name, n in (("q", lengths), ("k", given.sum(1))):
                batch[f"cu_seq_lens_{name}"] = torch.nn.functional.pad(n.cumsum(0), (1, 0)).int()
                batch[f"max_length_{name}"] = int(n.max())
            found = model(**batch).gep[0]
        else:
            found = model(**to_batch(inputs), queries=inputs["queries"]).gep[real]
    torch.testing.assert_close(found, expected["gep"][real], atol=5e-5, rtol=2e-4)


def test_a_converted_generative_checkpoint_generates(tmp_path: Path) -> None:
    out = save_converted(*convert_scgpt(write_checkpoint(tmp_path / "original", SMALL)), tmp_path / "converted")
    cells = generate_cells(str(out), ["GENE1", "GENE5"], cell_embedding=np.ones((3, SMALL.width)), progress=False)
    assert cells.shape == (3, 2)
    assert np.isfinite(cells.X).all()


@pytest.mark.parametrize("layout", ["Wqkv", "_impl.Wqkv"])
def test_every_naming_of_attention_weights_gives_the_same_network(tmp_path: Path, layout: Any) -> None:
    expected = convert_scgpt(write_checkpoint(tmp_path / "torch", SMALL))[0].state_dict()
    found = convert_scgpt(write_checkpoint(tmp_path / "flash", replace(SMALL, layout=layout)))[0].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_half_precision_weights_are_converted_to_float32(tmp_path: Path) -> None:
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights_of(SMALL).items()
    }
    model, _, report = convert_scgpt(write_checkpoint(tmp_path, SMALL, weights))
    state = model.state_dict()
    for key, target in report.converted.items():
        assert torch.equal(state[target], weights[key].float())


@pytest.mark.parametrize(
    ("wrap", "prefixes"),
    [
        (lambda key: f"module.{key}", ["module."]),
        (lambda key: f"_orig_mod.{key}", ["_orig_mod."]),
        (lambda key: f"_orig_mod.module.{key}", ["_orig_mod.", "module."]),
        (lambda key: key.replace("transformer_encoder.", "transformer_encoder._orig_mod."), ["_orig_mod."]),
    ],
)
def test_prefixes_of_wrappers_are_removed_and_reported(tmp_path: Path, wrap: Any, prefixes: list[str]) -> None:
    weights = weights_of(SMALL)
    expected = convert_scgpt(write_checkpoint(tmp_path / "plain", SMALL))[0].state_dict()
    wrapped = {wrap(key): tensor for key, tensor in weights.items()}
    model, _, report = convert_scgpt(write_checkpoint(tmp_path / "wrapped", SMALL, wrapped))
    found = model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    for prefix in prefixes:
        n_keys = sum(prefix in key for key in wrapped)
        assert f"removed the prefix '{prefix}' of a wrapper from {n_keys} keys" in str(report)


def test_two_keys_that_differ_in_a_prefix_raise(tmp_path: Path) -> None:
    weights = weights_of(SMALL)
    weights["module.encoder.embedding.weight"] = weights["encoder.embedding.weight"] + 1
    folder = write_checkpoint(tmp_path, SMALL, weights)
    assert_rejected(folder, "best_model.pt", "two names of the weights 'encoder.embedding.weight'")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model.safetensors", {}),
        ("MODEL.SAFETENSORS", {}),
        ("other.safetensors", {"weights_file": "other.safetensors"}),
        ("best_model.pt", {}),
    ],
)
def test_weights_in_safetensors_are_converted(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    expected = convert_scgpt(write_checkpoint(tmp_path / "torch", SMALL))[0].state_dict()
    folder = write_checkpoint(tmp_path / "safetensors", SMALL)
    (folder / "best_model.pt").unlink()
    save_file(weights_of(SMALL), folder / name)
    found = convert_scgpt(folder, **options)[0].state_dict()  # type: ignore[arg-type]
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    assert_rejected(folder, name, "not a complete safetensors file", **options)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"", "an empty file"),
    ],
)
def test_weights_of_another_kind_are_named(tmp_path: Path, content: bytes, found: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    (folder / "best_model.pt").write_bytes(content)
    assert_rejected(folder, "best_model.pt", "was not written by torch.save", found)


def test_a_path_that_is_no_original_checkpoint_raises_with_what_to_pass(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "original", SMALL)
    with pytest.raises(FileNotFoundError, match=r"is a file; .*original and --weights_file best_model\.pt"):
        convert_scgpt(folder / "best_model.pt")
    converted = save_converted(*convert_scgpt(folder), tmp_path / "converted")
    with pytest.raises(FileNotFoundError, match=r"has a config\.json.*without converting it"):
        convert_scgpt(converted)
    (folder / "best_model.pt").rename(folder / "weights.pth")
    with pytest.raises(FileNotFoundError, match=r"--weights_file, e\.g\. weights\.pth"):
        convert_scgpt(folder)


# The saved folder


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    original = replace(SMALL, n_domains=2, explicit_zero=True, norm="domain")
    return save_converted(*convert_scgpt(write_checkpoint(tmp_path / "original", original)), tmp_path / "converted")


def test_every_auto_class_loads_the_folder_and_computes_the_same_as_the_original(converted: Path) -> None:
    original = replace(SMALL, n_domains=2, explicit_zero=True, norm="domain")
    inputs = some_inputs(original)
    expected = forward(weights_of(original), original, inputs)
    classes = expected.pop("class_logits")
    batch = to_batch(inputs)
    with torch.no_grad():
        cells = AutoModel.from_pretrained(converted)(**batch)
        assert_same(cells, {name: expected[name] for name in ("cell_embedding", "last_hidden_state")}, inputs["real"])
        pretraining = AutoModelForPreTraining.from_pretrained(converted)
        assert_same(pretraining(**batch), expected, inputs["real"])
        assert pretraining.class_head is None
        weights = pretraining.config.loss_weights | {"cls": 1.0}
        with_classes = AutoModelForPreTraining.from_pretrained(converted, loss_weights=weights)
        assert_same(with_classes(**batch), expected | {"class_logits": classes}, inputs["real"])
        classifier = AutoModelForSequenceClassification.from_pretrained(converted)
        torch.testing.assert_close(classifier(**batch).logits, classes, atol=5e-5, rtol=2e-4)
    assert classifier.config.num_labels == 4
    assert AutoTokenizer.from_pretrained(converted).get_vocab() == original.vocab
    processor = AutoProcessor.from_pretrained(converted)
    assert (processor.cls_value, processor.n_bins, processor.max_tokens) == (-2, 7, 30)
    assert AutoProcessor.from_pretrained(converted, n_bins=51).n_bins == 51


def test_the_card_and_the_report_list_what_was_converted(converted: Path) -> None:
    card, report = (converted / "README.md").read_text(), json.loads((converted / "conversion.json").read_text())
    assert "value of the token `<cls>` is -2" in card
    assert "flag_encoder.weight: marks the genes to generate" in card
    assert "MIT" in card
    assert "bowang-lab/scGPT" in card
    assert (
        report["converted"]["transformer_encoder.layers.0.self_attn.in_proj_weight"]
        == "scgpt.layers.0.self_attn.qkv_proj.weight"
    )
    assert report["converted"]["dsbn.bns.1.running_mean"] == "scgpt.input_norm.running_mean[1]"
    assert list(report["left_out"]) == ["flag_encoder.weight"]


def test_cls_value_is_set_in_the_processor_and_stated_in_the_card(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "original", SMALL)
    out = save_converted(*convert_scgpt(folder, cls_value=0), tmp_path / "converted")
    assert AutoProcessor.from_pretrained(out).cls_value == 0
    assert "value of the token `<cls>` is 0" in (out / "README.md").read_text()


def test_an_existing_folder_is_not_overwritten_and_no_temporary_folder_is_left(tmp_path: Path) -> None:
    parts = convert_scgpt(write_checkpoint(tmp_path / "original", SMALL))
    (tmp_path / "converted").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        save_converted(*parts, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "original"]


def test_a_folder_that_another_process_has_written_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, report = convert_scgpt(write_checkpoint(tmp_path / "original", SMALL))
    save = processor.save_pretrained

    def save_slowly(folder: Path) -> None:
        save(folder)
        (tmp_path / "converted").mkdir()
        (tmp_path / "converted" / "kept").write_text("by the other process")

    monkeypatch.setattr(processor, "save_pretrained", save_slowly)
    with pytest.raises(FileExistsError, match="converted was written by another process meanwhile"):
        save_converted(model, processor, report, tmp_path / "converted")
    assert [path.name for path in (tmp_path / "converted").iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "original"]


def test_a_failed_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, report = convert_scgpt(write_checkpoint(tmp_path / "original", SMALL))

    def fail(folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(processor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_converted(model, processor, report, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


# Settings that are inferred or assumed, and weights that are left out


def test_settings_that_no_file_records_are_assumed_and_reported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, replace(SMALL, layout="Wqkv"))
    assumed = convert_scgpt(folder)[2].assumed
    published = {"norm_scheme": "post", "cell_pooling": "cls", "gepc_detach": False, "ecs_threshold": 0.3}
    assert assumed == published | {"cls_value": -2}
    given = {
        "norm_scheme": "scgpt_pre",
        "cell_pooling": "average",
        "gepc_detach": True,
        "ecs_threshold": 0.8,
        "cls_value": 0,
    }
    model, processor, report = convert_scgpt(folder, **given)
    assert report.assumed == {}
    assert {name: getattr(model.config, name) for name in published} | {"cls_value": processor.cls_value} == given


def test_the_norm_scheme_of_torch_attention_is_not_assumed(tmp_path: Path) -> None:
    assert "norm_scheme" not in convert_scgpt(write_checkpoint(tmp_path, SMALL))[2].assumed


def test_missing_args_take_their_published_values(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    args = {name: SMALL.args[name] for name in ("embsize", "nheads", "d_hid", "nlayers", "n_bins")}
    (folder / "args.json").write_text(json.dumps(args | {"dropout": None}))
    model, processor, report = convert_scgpt(folder)
    assert (model.config.dropout, processor.max_tokens, processor.mask_value, processor.pad_value) == (
        0.2,
        1200,
        -1,
        -2,
    )
    assert report.assumed["max_seq_len of args.json"] == 1200


def test_a_gepc_head_that_fails_in_the_original_is_left_out(tmp_path: Path) -> None:
    original = replace(SMALL, query="concat", explicit_zero=True)
    model, _, report = convert_scgpt(write_checkpoint(tmp_path, original))
    assert model.cell_to_gene_head is None
    assert model.config.loss_weights == {"gep": 1.0, "gep_zero": 1.0}
    assert all(
        "fails in scGPT's code" in report.left_out[key] for key in weights_of(original) if key.startswith("mvc_decoder")
    )


def test_an_encoder_without_heads_becomes_a_model_without_random_weights(tmp_path: Path) -> None:
    original = replace(SMALL, query=None, n_classes=0)
    weights = {key: tensor for key, tensor in weights_of(original).items() if not key.startswith("decoder")}
    model, processor, report = convert_scgpt(write_checkpoint(tmp_path / "original", original, weights))
    out = save_converted(model, processor, report, tmp_path / "converted")
    found = AutoModelForPreTraining.from_pretrained(out).state_dict()
    assert found.keys() == set(report.converted.values())
    assert all(torch.equal(found[target], weights[key]) for key, target in report.converted.items())


# Determinism


def test_the_embedding_of_a_cell_does_not_depend_on_order_or_batch(tmp_path: Path) -> None:
    original = replace(SMALL, max_seq_len=12)
    model, processor, _ = convert_scgpt(write_checkpoint(tmp_path, original))
    counts = csr_matrix(np.random.default_rng(0).poisson(1.5, (40, original.n_genes)).astype(np.float32))
    adata = AnnData(counts)
    adata.var_names = [f"GENE{gene}" for gene in range(original.n_genes)]
    n_expressed = np.diff(counts.indptr)
    assert processor.cls_value == -2
    assert (n_expressed > processor.max_tokens).sum() > 30

    def embed(cells: np.ndarray, batch_size: int) -> np.ndarray:
        part = adata[cells].copy()
        source = open_source(part, primary_only=False)
        return embed_cells(source, np.arange(len(cells)), model, processor, batch_size=batch_size, progress=False)

    expected = embed(np.arange(40), 64)
    for seed, batch_size in enumerate((1, 3, 7, 64)):
        cells = np.random.default_rng(seed).permutation(40)[: 40 - 9 * seed]
        np.testing.assert_allclose(embed(cells, batch_size), expected[cells], atol=1e-6)


# The script


def run_script(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_converts_and_prints_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_checkpoint(tmp_path / "original", SMALL), tmp_path / "converted"
    run_script(monkeypatch, str(folder), "--out", str(out), "--cell_pooling", "average", "--cls_value", "0")
    printed = capsys.readouterr().out
    assert "left out: flag_encoder.weight" in printed
    assert "value of <cls>: 0" in printed
    assert AutoModel.from_pretrained(out).config.cell_pooling == "average"
    with pytest.raises(SystemExit, match="exists already"):
        run_script(monkeypatch, str(folder), "--out", str(out))


def test_the_help_explains_the_unrecorded_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_script(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("pre_norm", "avg-pool", "best_model.pt", "scgpt-hf embed"))


# Invalid input: each error names the file and the key


def assert_rejected(folder: Path, *parts: str, **settings: Any) -> None:
    """Check that conversion raises an error whose message contains all parts."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert_scgpt(folder, **settings)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "best_model.pt"])
def test_a_missing_file_raises(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    (folder / name).unlink()
    assert_rejected(folder, f"lacks {name}", str(folder))


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    assert_rejected(tmp_path / "nowhere", "nowhere", "no such folder")


@pytest.mark.parametrize("name", ["args.json", "vocab.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1 column 2"),
        (b"", "line 1 column 1"),
        (b"[1, 2]", "JSON list"),
        (b"3", "JSON int"),
        (b"\xff\xfe", "utf-8"),
        (b'{"embsize": 1, "embsize": 2}', "'embsize' occurs twice"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_invalid_json_raises(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    (folder / name).write_bytes(content)
    assert_rejected(folder, name, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *((key, None, "is missing") for key in ("embsize", "nheads", "d_hid", "nlayers", "n_bins")),
        *((key, "12", "is '12'; expected a whole number") for key in ("embsize", "nlayers", "max_seq_len")),
        *(("nheads", value, f"is {value}; expected") for value in (0, -1, 2.5, True)),
        ("nheads", 5, "does not divide 'embsize' 12"),
        ("embsize", 24, "it is 12"),
        ("d_hid", 11, "it is 10"),
        ("nlayers", 3, "it is 2"),
        ("n_layers_cls", 4, "it is 3"),
        ("input_emb_style", "category", "it is 'continuous'"),
        ("input_emb_style", "word2vec", "'continuous' or 'category'"),
        ("input_style", "normed_raw", "'binned' or 'log1p'"),
        ("pad_token", "<PAD>", "'<pad>'"),
        ("dropout", 1, "number in [0, 1)"),
        ("dropout", "much", "expected a number"),
        ("mask_value", "auto", "expected a number"),
        *(("pad_value", value, "expected a number") for value in (float("nan"), float("inf"), 10**400)),
        ("nheads", 10**400, "expected a whole number"),
        *((key, 1, "is 1; expected a whole number ≥ 2") for key in ("n_bins", "max_seq_len")),
    ],
)
def test_an_invalid_setting_raises(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    (folder / "args.json").write_text(json.dumps(SMALL.args | {key: value}))
    assert_rejected(folder, "args.json", key, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda vocab: vocab.pop("<pad>"), "no <pad>"),
        (lambda vocab: vocab.pop("<cls>"), "no <cls>"),
        (lambda vocab: vocab.update(GENE1=vocab["GENE2"]), "used twice"),
        (lambda vocab: vocab.pop("GENE1"), "missing"),
        (lambda vocab: vocab.update(GENE1=-1), "found -1"),
        (lambda vocab: vocab.update(GENE1=1000), "found 0 to 1000"),
        (lambda vocab: vocab.update(GENE1="1"), "found '1' for 'GENE1'"),
        (lambda vocab: vocab.update(GENE1=1.0), "found 1.0 for 'GENE1'"),
        (lambda vocab: vocab.update(GENE99=43), "44 tokens"),
        (lambda vocab: vocab.clear(), "no <pad> and no <cls>"),
    ],
)
def test_an_invalid_vocabulary_raises(tmp_path: Path, edit: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    vocab = SMALL.vocab
    edit(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    assert_rejected(folder, "vocab.json", message)


def test_a_vocabulary_of_another_size_than_the_embedding_raises(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    (folder / "vocab.json").write_text(json.dumps({"<cls>": 2, "A": 0, "<pad>": 1}))
    assert_rejected(folder, "vocab.json", "3 tokens", "'encoder.embedding.weight'", "43 rows")


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda w: w.update({"head.weight": ZEROS(2, 3)}), ["'head.weight' (2, 3)", "another model"]),
        (lambda w: w.update({"cls_decoder.extra": ZEROS(1)}), ["'cls_decoder.extra' (1,)", "no part"]),
        (
            lambda w: w.update({"decoder.fc.6.weight": ZEROS(1)}),
            ["'decoder.fc.6.weight' (1,)", "do not exist in the model"],
        ),
        (lambda w: w.update({"bn.weight": ZEROS(12)}), ["lacks", "'bn.bias' (12,)", "'bn.running_mean' (12,)"]),
        (lambda w: w.pop("encoder.embedding.weight"), ["lacks 'encoder.embedding.weight'"]),
        (lambda w: w.pop("decoder.fc.4.bias"), ["lacks 'decoder.fc.4.bias' (1,)"]),
        (lambda w: w.pop("mvc_decoder.W.weight"), ["lacks 'mvc_decoder.W.weight' (12, 12)"]),
        (lambda w: w.pop("transformer_encoder.layers.1.self_attn.in_proj_bias"), ["lacks", "in_proj_bias' (36,)"]),
        (lambda w: w.pop("cls_decoder.out_layer.weight"), ["lacks 'cls_decoder.out_layer.weight'"]),
        (lambda w: w.update({"decoder.fc.0.weight": ZEROS(12, 24)}), ["(12, 24); expected (12, 12)", "decoder.fc.0"]),
        (lambda w: w.update({"encoder.embedding.weight": ZEROS(43)}), ["shape (43,); expected a matrix"]),
        (lambda w: w.update({"encoder.enc_norm.bias": ZEROS(12).long()}), ["int64; expected torch.float32"]),
        (lambda w: w.update({"dsbn.bns.0.weight": ZEROS(12)}), ["affine", "cannot be converted"]),
        (
            lambda w: w.update({"pert_encoder.weight": ZEROS(3, 12)}),
            ["decoder.fc.0.weight", "do not exist in the model"],
        ),
        (lambda w: w.update({"decoder.zero_logit.0.weight": ZEROS(12, 12)}), ["lacks", "'decoder.zero_logit.0.bias'"]),
        (
            lambda w: w.update({"transformer_encoder.layers.0.self_attn.Wqkv.bias": ZEROS(36)}),
            ["in_proj_bias' and", "Wqkv.bias' are two names of the same weights"],
        ),
        (
            lambda w: w.update({f"scgpt.{key}": w.pop(key) for key in list(w)}),
            ["53 keys, e.g. 'scgpt.encoder", "another model"],
        ),
    ],
)
def test_weights_that_do_not_fit_the_model_raise(tmp_path: Path, edit: Any, parts: list[str]) -> None:
    weights = weights_of(SMALL)
    edit(weights)
    assert_rejected(write_checkpoint(tmp_path, SMALL, weights), "best_model.pt", *parts)


def test_the_state_dict_of_another_model_raises(tmp_path: Path) -> None:
    weights = torch.nn.TransformerEncoderLayer(12, 3).state_dict()
    assert_rejected(
        write_checkpoint(tmp_path, SMALL, weights),
        "best_model.pt",
        "'self_attn.in_proj_weight' (36, 12)",
        "another model",
    )


@pytest.mark.parametrize(("key", "value"), [("pad_value", -2), ("mask_value", 9), ("n_bins", 9)])
def test_a_value_embedding_without_rows_for_the_special_values_raises(tmp_path: Path, key: str, value: int) -> None:
    original = replace(SMALL, values="category")
    folder = write_checkpoint(tmp_path, original)
    (folder / "args.json").write_text(json.dumps(original.args | {key: value}))
    assert_rejected(folder, "args.json", f"'{key}' {'is ' * (key == 'n_bins')}{value}", "9 rows")


def test_a_value_embedding_has_no_row_for_a_negative_cls_value(tmp_path: Path) -> None:
    assert_rejected(
        write_checkpoint(tmp_path, replace(SMALL, values="category")), "cls_value -2", "9 rows", cls_value=-2
    )


@pytest.mark.parametrize(
    ("unrecorded", "message"),
    [
        ({"pre_norm": True}, "no setting 'pre_norm'"),
        ({"norm_scheme": "pre"}, "norm_scheme is 'pre'; expected 'post' or 'scgpt_pre'"),
        ({"cell_pooling": "avg-pool"}, "cell_pooling is 'avg-pool'; expected 'cls' or"),
        ({"gepc_detach": 1}, "gepc_detach is 1; expected a bool"),
        ({"ecs_threshold": "0.3"}, "ecs_threshold is '0.3'; expected a float"),
        ({"cls_value": True}, "cls_value is True; expected a float"),
        ({"cls_value": float("nan")}, "cls_value must be a finite number"),
    ],
)
def test_unknown_settings_and_invalid_values_raise(tmp_path: Path, unrecorded: dict[str, Any], message: str) -> None:
    assert_rejected(write_checkpoint(tmp_path, SMALL), message, **unrecorded)


class Harmful:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_raises_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    folder, made = write_checkpoint(tmp_path / "original", SMALL), tmp_path / "created by the pickle"
    content = weights_of(SMALL) | {"harmful": Harmful(made)}
    torch.save(content, folder / "best_model.pt", _use_new_zipfile_serialization=not legacy)
    assert_rejected(
        folder, "best_model.pt", "a call of posix.mkdir" if os.name == "posix" else "a call of", "weights_only=True"
    )
    (folder / "best_model.pt").write_bytes(pickle.dumps(content["harmful"]))
    assert_rejected(folder, "best_model.pt", "weights_only=True")
    assert not made.exists()
    pickle.loads(pickle.dumps(Harmful(made)))  # without the protection, it does run
    assert made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": ZEROS(1)}, "epoch": 3}, "key 'model' contains dict"),
        ({"epoch": 3}, "key 'epoch' contains int"),
        ({3: ZEROS(1)}, "key 3 contains Tensor"),
        ({"a": ZEROS(2, 2).to_sparse()}, "key 'a' contains Tensor"),
        ([ZEROS(1)], "contains list"),
        ({}, "contains an empty dict"),
        (ZEROS(3), "contains Tensor"),
    ],
)
def test_a_file_that_is_not_a_state_dict_raises(tmp_path: Path, content: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    torch.save(content, folder / "best_model.pt")
    assert_rejected(folder, "best_model.pt", message, "expected a state dict")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), cut=st.integers(0, 20_000), zipped=st.booleans())
def test_damaged_weights_raise(tmp_path: Path, content: bytes, cut: int, zipped: bool) -> None:
    folder = write_checkpoint(tmp_path, SMALL)
    content_of_file = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(content_of_file[: min(cut, len(content_of_file) - 1)] if zipped else content)
    assert_rejected(folder, "best_model.pt")
