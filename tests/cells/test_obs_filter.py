"""SOMA value filters: pandas tables are filtered as TileDB filters the same table, with the same errors."""

import operator
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.obs import add_primary_filter, find_matching_rows, read_matching_obs
from scgpt_hf.cells.obs_filter import ObsFilter
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.soma.context import TILEDB_CONFIG
from scgpt_hf.cells.source import open_source
from tests.support.synthetic import synthetic_cells

WORDS = ["normal", "COVID-19", "", "it's", "a # b", "é"]
# Literals that fit each column; the types of obs in a Census, in a cache, and in AnnData files.
LITERALS: dict[str, Sequence[object]] = {
    "tissue": WORDS,
    "text": WORDS,
    "grade": ["low", "high"],
    "n genes": [-3, 0, 1, 2, 1000],
    "small": [-3, 0, 1, 100],
    "unsigned": [0, 1, 2, 255],
    "age": [-1.5, 0, 0.1, 2.0],
    "score": [-1.5, 0, 0.1, 2.0],
    "whole": [0, 1, 2],
    "primary": [True, False],
    "flag": [True, False],
    "label": [0, 1, 2],
}
ORDERED = [name for name in LITERALS if name not in ("tissue", "text", "label")]


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """Return up to 12 cells with columns of every type that a filter can use; every nullable one has gaps."""
    n_cells = draw(st.integers(1, 12))

    def values(name: str, missing: object = None) -> list[object]:
        options = [*LITERALS[name], missing] if missing is not ... else list(LITERALS[name])
        return draw(st.lists(st.sampled_from(options), min_size=n_cells, max_size=n_cells))

    return pd.DataFrame(
        {
            "tissue": pd.Categorical(values("tissue"), categories=WORDS),
            "text": pd.array(values("text"), dtype="string"),
            "grade": pd.Categorical(values("grade"), categories=["low", "high"], ordered=True),
            "n genes": np.array(values("n genes", ...), dtype=np.int64),
            "small": np.array(values("small", ...), dtype=np.int8),
            "unsigned": np.array(values("unsigned", ...), dtype=np.uint8),
            "age": np.array(values("age", np.nan), dtype=np.float64),
            "score": np.array(values("score", np.nan), dtype=np.float32),
            "whole": pd.array(values("whole"), dtype="Int64"),
            "primary": np.array(values("primary", ...), dtype=np.bool_),
            "flag": pd.array(values("flag"), dtype="boolean"),
            "label": pd.Categorical(values("label"), categories=[2, 0, 1]),
        }
    )


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    """Return the text of one comparison that is valid for `tables`."""
    name = draw(st.sampled_from(list(LITERALS)))
    column = f"attr({name!r})" if " " in name or draw(st.booleans()) else name
    literals = st.sampled_from(LITERALS[name])
    kind = draw(st.sampled_from(["equal", "list", "missing", "order", "chain"]))
    if kind == "list":
        chosen = draw(st.lists(literals, min_size=1, max_size=3))
        return f"{column} {draw(st.sampled_from(['in', 'not in']))} {chosen!r}"
    if kind == "missing":
        return f"{column} {draw(st.sampled_from(['==', '!=']))} None"
    if kind == "equal" or name not in ORDERED:
        symbol = draw(st.sampled_from(["==", "!="]))
    else:
        symbol = draw(st.sampled_from(["<", "<=", ">", ">="]))
    literal = repr(draw(literals))
    if kind == "chain" and name in ORDERED:
        return f"{literal} <= {column} <= {draw(literals)!r}"
    sides = [column, f"val({literal})" if draw(st.booleans()) and not literal.startswith("-") else literal]
    return f" {symbol} ".join(sides if draw(st.booleans()) else sides[::-1])


def filters() -> st.SearchStrategy[str]:
    """Return filters that join comparisons in every way of the syntax."""

    def join(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        words = st.sampled_from(["and", "or", "&", "|"])
        return st.one_of(
            st.builds("not ({})".format, inner), st.builds("({}) {} ({})".format, inner, words, inner), inner
        )

    return st.recursive(comparisons(), join, max_leaves=5)


@pytest.fixture(scope="module")
def write() -> Callable[[pd.DataFrame], soma.DataFrame]:
    """Write a table to a SOMA dataframe in memory and open it."""

    def write(table: pd.DataFrame) -> soma.DataFrame:
        # mem:// belongs to its context. Timestamps: TileDB stores categories in a second version of the schema, and of
        # two versions from the same millisecond it may read the first.
        context = soma.SOMATileDBContext(tiledb_config={"sm.compute_concurrency_level": 1, **TILEDB_CONFIG})
        arrow = pa.Table.from_pandas(table.assign(soma_joinid=np.arange(len(table))), preserve_index=False)
        stored = {"schema": arrow.schema, "domain": [[0, max(len(table) - 1, 0)]], "context": context}
        soma.DataFrame.create("mem://obs", **stored, tiledb_timestamp=1).close()
        with soma.DataFrame.open("mem://obs", "w", context=context, tiledb_timestamp=2) as frame:
            frame.write(arrow)
        return soma.DataFrame.open("mem://obs", context=context, tiledb_timestamp=3)

    return write


def tiledb_rows(frame: soma.DataFrame, soma_filter: str) -> list[int]:
    """Return the rows that TileDB selects."""
    return frame.read(value_filter=soma_filter, column_names=["soma_joinid"]).concat()["soma_joinid"].to_pylist()


@given(table=tables(), texts=st.lists(filters(), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_a_filter_selects_the_same_cells_from_a_table_as_from_a_soma(write, table, texts):
    with write(table) as frame:
        types = {field.name: field.type for field in frame.schema}
        ordered = frame.get_enumeration_values(["grade"])
        for text in texts:
            parsed = ObsFilter(text)
            matched = np.flatnonzero(parsed.matches(table)).tolist()
            try:
                soma_filter = parsed.to_soma(types, ordered)
            except ValueError as error:  # tiledbsoma does not store categories that no cell has
                if "has the categories" not in str(error):
                    raise
            else:
                assert tiledb_rows(frame, soma_filter) == matched, text


OBS = pd.DataFrame(
    {
        "tissue": pd.Categorical(["blood", "lung", None]),
        "age": [30, 40, 50],
        "small": np.array([1, 2, 3], np.int8),
        "score": [0.5, np.nan, 1.5],
        "primary": [True, False, True],
        "day": pd.to_datetime(["2020-01-01"] * 3),
    }
)


@pytest.mark.parametrize(
    ("obs_filter", "named"),
    [
        ("organ == 'blood'", "'organ'"),
        ("attr('organ') in ['blood']", "'organ'"),
        ("tissue == 1", "'tissue'"),
        ("tissue < 'lung'", "'tissue'"),
        ("age == '30'", "'age'"),
        ("age < 30.5", "'age'"),
        ("age == 1e999", "'age'"),
        ("small == 200", "'small'"),
        (f"score < {10**400}", "'score'"),
        ("primary == 2", "'primary'"),
        ("primary == 'True'", "'primary'"),
        ("day > 0", "'day'"),
    ],
)
def test_a_filter_that_does_not_fit_its_columns_raises_alike_for_a_table_and_a_soma(write, obs_filter, named):
    messages = []
    with write(OBS) as frame:
        for select in (lambda: find_matching_rows(OBS, obs_filter), lambda: read_matching_obs(frame, obs_filter, ())):
            with pytest.raises(ValueError, match=named) as raised:
                select()
            messages.append(str(raised.value))
    assert obs_filter in messages[0]
    # Arrow and TileDB name some types differently, e.g. string and large_string
    assert messages[0].replace("large_", "") == messages[1].replace("large_", "")


@pytest.mark.parametrize(
    "text",
    [
        *("", "tissue", "True", "tissue = 'blood'", "tissue == 'blood') or (age == 30", "tissue == 'blood', age == 30"),
        *("tissue == primary", "tissue == blood", "1 == 1", "tissue is None", "'blood' in tissue", "30 < age > None"),
        *("tissue in []", "tissue in ('blood',)", "tissue in ['blood', None]", "tissue in ['blood'] in ['lung']"),
        *("tissue == 'blood' & age == 30", "~(age == 30)", "(age == 30) ^ (age == 40)", "age + 1 == 31", "-age == 3"),
        *(
            "age == 3j",
            "tissue == f'x'",
            "tissue == b'x'",
            "tissue == -'x'",
            "tissue.name == 'x'",
            "lower(tissue) == 'x'",
        ),
        *("attr(tissue) == 'x'", "attr('a', 'b') == 'x'", "attr() == 'x'", "tissue == val('a', 'b')", "age < None"),
        *("(x := age) == 30", "lambda: age == 30", "age == 30 if True else False", "tissue == 'blo\x00od'"),
    ],
)
def test_text_that_is_no_filter_raises_before_any_data_is_read(text):
    with pytest.raises(ValueError, match="cannot parse the obs filter"):
        ObsFilter(text)


def test_columns_with_values_of_several_types_raise():
    with pytest.raises(ValueError, match="'mixed'"):
        ObsFilter("mixed == 'a'").matches(pd.DataFrame({"mixed": pd.Categorical(["a", 1])}))


@pytest.mark.parametrize("symbol", ["<", "<=", ">", ">="])
def test_a_value_outside_the_order_of_the_categories_raises_alike_for_a_table_and_a_soma(write, symbol):
    # With a missing value, tiledbsoma drops the category "low". TileDB then matches no cell instead of the first two.
    grade = pd.Categorical(["high", "high", None], categories=["low", "high"], ordered=True)
    with write(pd.DataFrame({"grade": grade})) as frame, pytest.raises(ValueError, match=r"categories \['high'\]"):
        read_matching_obs(frame, f"grade {symbol} 'low'", ())
    with pytest.raises(ValueError, match=r"categories \['low', 'high'\], in this order; 'middle' is none of them"):
        ObsFilter(f"grade {symbol} 'middle'").matches(pd.DataFrame({"grade": grade}))


# A column of each type, and the order of its values. That of the categories is not alphabetical.
GRADES = ["low", "mid", "high"]
COLUMNS: dict[str, tuple[object, list[object]]] = {
    "plain": (["a", "b", "c", "b"], ["a", "b", "c"]),
    "with_gaps": (pd.array(["a", None, "c", "b"], dtype="string"), ["a", "b", "c"]),
    "category": (pd.Categorical(["a", None, "c", "b"]), ["a", "b", "c"]),
    "grade": (pd.Categorical(["low", "mid", "high", "mid"], categories=GRADES, ordered=True), GRADES),
    "grade_with_gaps": (pd.Categorical(["low", None, "high", "mid"], categories=GRADES, ordered=True), GRADES),
    "integer": (np.array([3, 1, 2, 2]), [1, 2, 3]),
    "integer_with_gaps": (pd.array([3, None, 2, 1], dtype="Int64"), [1, 2, 3]),
    "real": (np.array([0.5, np.nan, 1.5, 2.5]), [0.5, 1.5, 2.5]),
    "boolean": (np.array([True, False, True, True]), [False, True]),
    "boolean_with_gaps": (pd.array([True, None, False, True], dtype="boolean"), [False, True]),
}
CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": operator.eq,
    "not in": operator.ne,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a file with the columns of `COLUMNS`, the Census built from it, and caches of both."""
    folder = tmp_path_factory.mktemp("sources")
    adata = synthetic_cells(3, range(20), 4, ["donor_1", "donor_2"], "first")
    adata.obs = adata.obs.assign(**{name: values for name, (values, _) in COLUMNS.items()})
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(folder / "first.h5ad")
    paths = {"file": folder / "first.h5ad"}
    paths["census"] = build_census([paths["file"]], folder / "census", keep_obs=list(COLUMNS))
    for name in ("file", "census"):
        with closing(open_source(paths[name], primary_only=False)) as source:
            write_cache(source, folder / f"cache_of_{name}", columns=list(COLUMNS))
        paths[f"cache_of_{name}"] = folder / f"cache_of_{name}"
    return paths


@pytest.mark.parametrize("symbol", CONDITIONS)
@pytest.mark.parametrize("name", COLUMNS)
def test_all_sources_select_the_same_cells_or_raise(sources, name, symbol):
    column, order = COLUMNS[name]
    value = order[1]
    text = f"{name} {symbol} {[value] if 'in' in symbol else value!r}"
    places = [None if pd.isna(cell) else order.index(cell) for cell in column]
    expected = [cell for cell, place in enumerate(places) if place is not None and CONDITIONS[symbol](place, 1)]
    refused = []
    for kind, path in sources.items():
        try:
            with closing(open_source(path, obs_filter=text, primary_only=False)) as source:
                assert source.obs().index.tolist() == expected, kind
        except ValueError as error:
            if "categories without an order" in str(error):
                refused.append(kind)
            elif expected or "matches none" not in str(error):
                raise
    # Text has no order in any source, and caches do not store the order of categories.
    unordered = ["cache_of_file", "cache_of_census"] if "grade" in name else list(sources)
    assert refused == (unordered if symbol[0] in "<>" and isinstance(value, str) else [])


def test_the_cell_id_can_be_filtered_on():
    obs = OBS.set_index(pd.Index([10, 20, 30], name="cell_id"))
    assert find_matching_rows(obs, "soma_joinid in [10, 30]").tolist() == [0, 2]


def test_a_filter_without_matches_raises(write):
    with write(OBS) as frame:
        for select in (lambda: find_matching_rows(OBS, "age == 31"), lambda: read_matching_obs(frame, "age == 31", ())):
            with pytest.raises(ValueError, match="none of the 3 cells"):
                select()
    assert find_matching_rows(OBS, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" age == 30 ", "(age == 30) and is_primary_data == True"),
        ("age == 30 # years", "(age == 30) and is_primary_data == True"),
        ("(age == 30  # years\n or age == 40)", "(age == 30 or age == 40) and is_primary_data == True"),
        ("tissue == 'a # b'", "(tissue == 'a # b') and is_primary_data == True"),
        (None, "is_primary_data == True"),
    ],
)
def test_the_filter_on_primary_data_is_added_to_the_users_filter(text, expected):
    found = add_primary_filter(text, ["age", "is_primary_data"], primary_only=True)
    assert found == expected
    ObsFilter(found)
