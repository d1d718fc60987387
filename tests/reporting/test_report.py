"""Tests of the report pages: escaping, self-containedness, and the content of each kind of report."""

import json
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from scgpt_hf.publishing.run_summary import Code
from scgpt_hf.reporting.page import Html, bar, inline_png, inline_svg, key_numbers, page, section, table, tag
from scgpt_hf.reporting.plots import save_figure
from scgpt_hf.reporting.report import write_report
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "report.py"
EVIL = "<script>alert('&\"')</script>"


class Reader(HTMLParser):
    """Parse a page: collect tags, links and texts, and check that all elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def require_self_contained(text: str) -> Reader:
    reader = Reader(text)
    assert all(link.startswith("data:image/") for link in reader.links)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    return reader


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), st.text(alphabet="<>&\"' ab"))
def test_text_is_escaped_and_can_be_read_back(text: str, attribute: str) -> None:
    reader = Reader(tag("p", text, title=attribute))
    assert "".join(reader.texts) == text
    assert reader.tags == ["p"]


def test_html_is_not_escaped_and_code_becomes_an_element() -> None:
    assert tag("p", Html("<b>x</b>"), ["<", Html("<i></i>")]) == "<p><b>x</b>&lt;<i></i></p>"
    assert tag("p", Code("a<b")) == "<p><code>a&lt;b</code></p>"
    assert tag("meta", name='"') == '<meta name="&quot;">'


def test_blocks_escape_text_and_empty_sections_are_left_out() -> None:
    text = page(
        EVIL, EVIL, section(EVIL, key_numbers({EVIL: EVIL}), table([(EVIL, EVIL)], (EVIL, EVIL), numeric_columns=[1]))
    )
    reader = require_self_contained(text)
    assert reader.texts.count(EVIL) == 10
    assert section("Empty", "", [], Html("")) == ""


@pytest.mark.parametrize(("share", "width"), [(0.25, "25.0%"), (-1, "0.0%"), (7, "100.0%")])
def test_bars_are_between_zero_and_full_width(share: float, width: str) -> None:
    assert f"width:{width}" in bar(share)


def test_images_are_embedded_and_must_be_png(tmp_path: Path) -> None:
    save_figure(Figure(figsize=(4, 2)), tmp_path / "small.png")
    save_figure(Figure(figsize=(7, 2)), tmp_path / "wide.png")
    assert "min-width" not in inline_png(tmp_path / "small.png", "x")
    assert "min-width:640px" in inline_png(tmp_path / "wide.png", "x")
    assert inline_png(tmp_path / "missing.png", "x") == ""
    (tmp_path / "false.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is not a PNG"):
        inline_png(tmp_path / "false.png", "x")


def test_embedded_figures_are_reproducible() -> None:
    def draw() -> Html:
        figure = Figure(figsize=(2, 2))
        figure.add_subplot().plot([0, 1])
        return inline_svg(figure, EVIL)

    assert draw() == draw()
    assert "".join(Reader(draw()).texts) == EVIL


def a_run(folder: Path) -> Path:
    folder.mkdir()
    summary = {
        "model_parameters": 12345,
        "train_cells": 900,
        "train_donors": 4,
        "cells_per_second": 75.6,
        "composition": {"assay": {EVIL: 7}},
        "data": {"uri": "file:///home/me/secret/census", "obs_filter": EVIL},
        "versions": {"torch": "2"},
        "recipe": {"seed": 42},
        "best": {
            "step": 20,
            "epoch": 2.0,
            "eval_gep_mse": 90.0,
            "eval_constant_mse": 200.0,
            "eval_gene_mean_mse": 128.0,
        },
    }
    lines = [
        {"step": 10, "epoch": 1.0, "loss": 300.0, "gep": 300.0},
        {"step": 20, "epoch": 2.0, "eval_loss": 90.0, "eval_gep_mse": 90.0, "eval_constant_mse": 200.0},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "settings.yaml").write_text(
        yaml.safe_dump({"data": {"donor_key": EVIL}, "training": {"output_dir": "/x/y"}})
    )
    save_figure(Figure(figsize=(7, 3)), folder / "umap.png")
    return folder


def test_pretraining_report_is_complete_and_holds_no_local_path(tmp_path: Path) -> None:
    path = write_report(a_run(tmp_path / EVIL.replace("/", "")))
    reader = require_self_contained(path.read_text())
    text = " ".join(reader.texts)
    for expected in ("12,345", "128.00", "90.00", EVIL, "75.6", "embed_anndata", "42", "not recorded"):
        assert expected in text
    for location in ("secret", "/x/y", "/home", str(tmp_path)):
        assert location not in text
    assert reader.tags.count("img") == 3
    assert sorted(file.suffix for file in path.parent.glob("report*")) == [".html"]


def test_the_report_shows_the_command_with_the_relative_path_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    a_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert "--model runs/mine/best_model " in write_report("runs/mine").read_text()


def test_pretraining_report_of_a_run_in_progress(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0.1, "loss": 3.0}))
    text = write_report(tmp_path).read_text()
    assert "The run is not finished" in text
    assert require_self_contained(text).tags.count("img") == 1


def test_finetuning_report_shows_confusion_f1_and_calibration(tmp_path: Path) -> None:
    summary = {
        "task": "annotate",
        "model": "runs/demo/best_model",
        "train_cells": 30,
        "held_out": "donor_id",
        "validation": {"macro_f1": 0.7, "accuracy": 0.8},
        "majority_baseline": {"label": "T", "macro_f1": 0.2},
        "calibration_error": {"before": 0.3, "after": 0.05},
        "confusion": {"labels": ["T", EVIL], "counts": [[8, 1], [1, 3]]},
        "reliability": {"confidence": [0.5, 0.9], "accuracy": [0.5, 0.8], "cells": [4, 10]},
        "labels": {"T": {"train": 20, "validation": 9}, EVIL: {"train": 10, "validation": 4}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    reader = require_self_contained(write_report(tmp_path).read_text())
    assert reader.tags.count("img") == 3
    assert {"0.700", "0.200", "0.050", EVIL, "20"} <= set(reader.texts)


def an_evaluation(folder: Path) -> Path:
    folder.mkdir()
    method = {
        "scores": {"NMI": 0.5, "linear probe macro-F1": 0.25},
        "not_computable": {"iLISI": EVIL, "ARI": "does not apply to this method"},
        "predictions": {
            "linear probe macro-F1": {
                "protocol": "5 folds", "accuracy": 0.5, "calibration_error": 0.1, "left_out": {EVIL: 3}, "f1": {},
            }
        },
    }  # fmt: skip
    cells = {"n": 158, "labels": {EVIL: 100, "B": 58}, "batches": {"donor": 158}, "left_out": {"without a label": 2}}
    record = {
        "kind": "evaluation",
        "data": EVIL,
        "settings": {"embedding_keys": ["X_scgpt"], "labels_key": "cell_type", "batch_key": "donor_id", "seed": 0},
        "cells": cells,
        "methods": {
            "X_scgpt": method,
            "HVG + PCA": {"scores": {"NMI": 0.625}, "not_computable": {}, "predictions": {}},
        },
        "figures": [{"file": "scores.png", "caption": EVIL}],
        "versions": {"scanpy": "1"},
    }
    (folder / "scores.json").write_text(json.dumps(record))
    save_figure(Figure(figsize=(3, 2)), folder / "scores.png")
    return folder


def test_evaluation_report_shows_scores_reasons_and_cells(tmp_path: Path) -> None:
    reader = require_self_contained(write_report(an_evaluation(tmp_path / "scores")).read_text())
    assert {"0.500", "0.625", "0.250", "–", EVIL, "158 cells", "2 without a label", "5 folds"} <= set(reader.texts)
    assert "does not apply to this method" not in reader.texts
    assert reader.tags.count("img") == 1


def test_empty_and_incomplete_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to report in .*metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "scores.json").write_text('{"cells": {}}')
    with pytest.raises(ValueError, match=r"scores\.json .*'methods'"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_script_prints_the_path_of_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", str(a_run(tmp_path / "run"))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"report\.py: nothing to report"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
