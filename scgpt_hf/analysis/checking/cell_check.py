"""`CellCheck`: what `check_cells` found in a file of cells, and its report for people."""

import textwrap
from dataclasses import dataclass, field

from scgpt_hf.analysis.checking.obs_roles import BATCH, DONOR, LABEL, GroupColumn
from scgpt_hf.measuring import format_duration

_SHOWN = 5  # columns of one kind in the report


@dataclass
class CellCheck:
    """Findings of `check_cells`. `str()` of them is a report for people.

    Attributes:
        name: the path of the file, or "AnnData".
        kind: "anndata", "h5ad", "zarr", "10x", "loom" or "text".
        n_cells: number of cells.
        n_columns: columns of the counts; several may be of one gene.
        n_genes: number of different genes.
        n_ensembl: how many of them have an Ensembl id.
        species: of most genes, as `find_species` returns it.
        layers: name of each layer → "raw counts", or why it does not hold them.
        layer: the layer whose counts are used; None if there is none.
        repeated_barcodes: cells with the name of an earlier one. They are kept: cells are known by their position.
        empty_cells: cells without any count; None if the counts cannot be read.
        groups: obs columns that divide the cells into groups.
        model: name of the model; None if the file was checked without one.
        coverage: how the genes match the vocabulary of the model, as `GeneMatch.coverage`.
        model_species: species of the genes of the vocabulary.
        unknown_cells: cells that express no gene of the vocabulary.
        read_seconds: time to read all counts.
        embed_seconds: time to embed all cells, estimated from a few batches.
        device: where the model ran.
        memory: peak memory of the process, or of the GPU, in bytes.
        problems: what will not work, each with what to do.
        notes: what works, but may surprise.
    """

    name: str
    kind: str
    n_cells: int
    n_columns: int
    n_genes: int = 0
    n_ensembl: int = 0
    species: str | None = None
    layers: dict[str, str] = field(default_factory=dict)
    layer: str | None = None
    repeated_barcodes: int = 0
    empty_cells: int | None = None
    groups: list[GroupColumn] = field(default_factory=list)
    model: str | None = None
    coverage: dict[str, int] | None = None
    model_species: str | None = None
    unknown_cells: int | None = None
    read_seconds: float | None = None
    embed_seconds: float | None = None
    device: str | None = None
    memory: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if the file will work."""
        return not self.problems

    def __str__(self) -> str:
        lines = {
            "raw counts": _layer_line(self),
            "genes": _genes_line(self),
            "vocabulary": _coverage_line(self),
            "cells": _cells_line(self),
            "donors": _groups_line(self.groups, DONOR),
            "batches": _groups_line(self.groups, BATCH),
            "labels": _groups_line(self.groups, LABEL),
            "other groups": _groups_line(self.groups, ""),
            "time": _time_line(self),
            "memory": None if self.memory is None else f"{self.memory / 2**30:.1f} GiB at the peak, measured",
        }
        title = f"{self.name}: {self.n_cells:,} cells, {self.n_columns:,} columns of counts ({self.kind})"
        table = [_wrap(f"{name:>14}  ", line) for name, line in lines.items() if line]
        notes = [_wrap("Note: ", note) for note in self.notes]
        problems = [_wrap("Problem: ", problem) for problem in self.problems]
        end = "This file will work." if self.ok else "This file will not work as it is."
        return "\n".join([title, *table, *notes, *problems, end])


def _wrap(start: str, text: str) -> str:
    """Return text in lines of 80 characters, indented below its start."""
    return textwrap.fill(text, 80, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


def _layer_line(check: CellCheck) -> str:
    used = f"in {check.layer}" if check.layer else "not found"
    others = "; ".join(f"{name}: {state}" for name, state in check.layers.items() if name != check.layer)
    return f"{used} ({others})" if others else used


def _genes_line(check: CellCheck) -> str:
    named = f"{check.n_ensembl:,} with Ensembl id" if check.n_ensembl else "by symbol, without Ensembl ids"
    return f"{check.n_genes:,}, {named}; species: {check.species or 'not recognized'}"


def _coverage_line(check: CellCheck) -> str | None:
    if check.coverage is None:
        return None
    found = check.coverage
    return (
        f"{found['by_id'] + found['by_symbol']:,} of {found['vocabulary']:,} genes of the model matched: "
        f"{found['by_id']:,} by id, {found['by_symbol']:,} by symbol"
    )


def _cells_line(check: CellCheck) -> str | None:
    if check.empty_cells is None:
        return None
    unknown = "" if check.unknown_cells is None else f", {check.unknown_cells:,} without a gene of the model"
    return f"{check.n_cells:,} read, {check.empty_cells:,} without counts{unknown}"


def _groups_line(groups: list[GroupColumn], role: str) -> str | None:
    found = [column for column in groups if column.role == role]
    if not found:
        return "no obs column recognized" if role else None
    texts = [
        f"{column.name} ({column.n_groups:,}{f', {column.n_missing:,} cells without' if column.n_missing else ''})"
        for column in found[:_SHOWN]
    ]
    return ", ".join(texts) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _time_line(check: CellCheck) -> str | None:
    if check.embed_seconds is not None:
        return f"about {format_duration(check.embed_seconds)} to embed all cells on {check.device}, measured on a few"
    if check.read_seconds is not None:
        return f"{check.read_seconds:.1f} s to read all counts; with --model, also the time to embed them"
    return None
