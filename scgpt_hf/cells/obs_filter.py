"""SOMA value filters on `obs`: parse one, check it against the columns, and evaluate it.

The syntax is that of `tiledbsoma`. A Census is filtered by TileDB itself; the obs table of an AnnData, an `.h5ad` file
or a cache is filtered here, with pyarrow. Both use the same parsed filter, so a filter selects the same cells and
raises the same errors for every kind of source.

TileDB never gets the user's text, because some of it would end the process or be misread (tiledbsoma 2.3):
`not (a == 1 and b == 2)` and `not a in ['x']` crash it with a segmentation fault, `a == 1.7` on a column of integers
finds the cells with 1, and `in` is missing for booleans and small integers. `ObsFilter.to_soma` writes an equivalent
filter without these.

Source: the grammar of `tiledbsoma._query_condition.QueryCondition`; nulls as in `test_obs_filter.py`, which compares
every kind of filter with TileDB's own answer.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

CELL_ID = "soma_joinid"  # the name of the cell id in a filter, as in a SOMA

_EXAMPLE = "\"tissue_general == 'blood' and disease in ['normal', 'COVID-19']\""
_SYMBOLS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.In: "in",
    ast.NotIn: "not in",
}
_OPPOSITE = {"==": "!=", "<": ">=", "<=": ">", "in": "not in"}
_OPPOSITE |= {opposite: symbol for symbol, opposite in _OPPOSITE.items()}
_SWAPPED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}  # for a constant on the left
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


@dataclass(frozen=True)
class _Comparison:
    """A column compared with constants; more than one only for `in` and `not in`."""

    column: str
    symbol: str
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class _Group:
    """Conditions joined by `and` or by `or`."""

    word: str
    conditions: "tuple[_Condition, ...]"


_Condition: TypeAlias = "_Comparison | _Group"


class ObsFilter:
    """A parsed SOMA value filter.

    A cell whose value is missing (None, NaN) matches only `column == None`; neither `==`, `!=`, `<`, `in` nor `not in`
    with a value select it. `<`, `<=`, `>` and `>=` compare numbers, booleans and ordered categories. They raise for
    text and for other categories: sources read text as categories, and a cache does not store the order of any.

    Example:
        >>> obs = pd.DataFrame({"tissue": ["blood", "lung", "blood"], "age": [31, 40, 52]})
        >>> ObsFilter("tissue == 'blood' and not age < 40").matches(obs).tolist()
        [False, False, True]

    Attributes:
        text: the filter as the user wrote it.
    """

    def __init__(self, text: str) -> None:
        """Parse a filter.

        Args:
            text: comparisons of a column with a constant (`==`, `!=`, `<`, `<=`, `>`, `>=`, `in [...]`,
                `not in [...]`), joined by `and`, `or`, `not`, `&` and `|`. Write `attr("name")` for a column whose
                name is not a Python identifier.

        Raises:
            ValueError: the text is not one complete filter.
        """
        self.text = text
        try:
            self._condition = _parse(_syntax_tree(text), negated=False)
        except (SyntaxError, ValueError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise ValueError(
                f"cannot parse the obs filter {text!r}: {reason}; expected a SOMA value filter such as {_EXAMPLE}"
            ) from error

    def to_soma(self, types: Mapping[str, pa.DataType], ordered: Mapping[str, pa.Array]) -> str:
        """Return an equivalent filter that TileDB evaluates correctly.

        Args:
            types: the type of each column, from the schema of the SOMA dataframe.
            ordered: the categories of each column with ordered categories, in their order.

        Raises:
            ValueError: a column does not exist, or cannot be compared with its constant.
        """
        self._require_columns(types)
        return _write(self._condition, self._convert_constants(types, ordered))

    def matches(self, obs: pd.DataFrame) -> NDArray[np.bool_]:
        """Return whether each row of a pandas table matches. Shape (cells,).

        Args:
            obs: the columns; the index holds the cell ids, which a filter calls `soma_joinid`.

        Raises:
            ValueError: a column does not exist, or cannot be compared with its constant.
        """
        self._require_columns([CELL_ID, *obs])
        names = {comparison.column for comparison in _comparisons(self._condition)}
        columns = {
            name: self._to_arrow(name, obs.index.to_series() if name == CELL_ID else obs[name]) for name in names
        }
        constants = self._convert_constants(
            {name: column.type for name, column in columns.items()},
            {name: column.dictionary for name, column in columns.items() if has_order(column.type)},
        )
        matched: NDArray[np.bool_] = _evaluate(self._condition, columns, constants).to_numpy(zero_copy_only=False)
        return matched

    def _require_columns(self, known: Iterable[str]) -> None:
        """Raise unless all columns of the filter exist."""
        columns = set(known)
        for comparison in _comparisons(self._condition):
            if comparison.column not in columns:
                raise ValueError(
                    f"cannot apply the obs filter {self.text!r}: obs has no column {comparison.column!r}; "
                    f"its columns are {sorted(columns - {CELL_ID})}"
                )

    def _to_arrow(self, name: str, column: pd.Series) -> pa.Array:
        """Return a column of obs with nulls where a value is missing. Shape (cells,)."""
        try:
            array = pa.Array.from_pandas(column)
        except pa.ArrowException as error:
            raise ValueError(
                f"cannot apply the obs filter {self.text!r}: the column {name!r} mixes several types ({error})"
            ) from error
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array

    def _convert_constants(
        self, types: Mapping[str, pa.DataType], ordered: Mapping[str, pa.Array]
    ) -> dict[_Comparison, list[Any]]:
        """Return the constants of each comparison as values of the type of its column."""
        converted = {}
        for comparison in _comparisons(self._condition):
            name = comparison.column
            try:
                constants = [_convert(constant, types[name]) for constant in comparison.constants]
                has_text = pa.types.is_dictionary(types[name]) or isinstance(constants[0], str)
                if comparison.symbol in ("<", "<=", ">", ">=") and has_text:
                    _require_order(ordered.get(name), comparison.symbol, constants[0])
                converted[comparison] = constants
            except (ValueError, OverflowError) as error:
                raise ValueError(
                    f"cannot apply the obs filter {self.text!r}: the column {name!r}, of type "
                    f"{_value_type(types[name])}, {error}"
                ) from error
        return converted


def has_order(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds ordered categories."""
    return bool(pa.types.is_dictionary(kind) and kind.ordered)


def in_one_line(text: str) -> str:
    """Return a valid filter in one line and without comments, so that it can be put in parentheses.

    Raises:
        SyntaxError, ValueError: the text is not one complete filter.
    """
    text = text.strip()
    return ast.unparse(_syntax_tree(text)) if "#" in text or "\n" in text else text


def _syntax_tree(text: str) -> ast.expr:
    """Return the syntax tree of an expression, which may have several lines, with comments.

    In parentheses, Python accepts several lines, but also `a == 1) or (b == 2`. In brackets, that is not a list.
    """
    in_brackets = ast.parse(f"[{text.strip()}\n]", mode="eval").body if "\n" in text.strip() else None
    if isinstance(in_brackets, ast.List) and len(in_brackets.elts) == 1:
        return in_brackets.elts[0]
    return ast.parse(text.strip(), mode="eval").body


def _parse(node: ast.expr, *, negated: bool) -> _Condition:
    """Return the condition of a node of the syntax tree, or its opposite.

    `not` is resolved here: it turns every comparison into the opposite one and swaps `and` with `or`. For a missing
    value both a comparison and its opposite are false, in TileDB as here.
    """
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _parse(operand, negated=not negated)
        case ast.BoolOp(op=operator, values=parts):
            return _join(isinstance(operator, ast.And), parts, negated)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr() as operator, left=left, right=right):
            return _join(isinstance(operator, ast.BitAnd), [left, right], negated)
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as operator], comparators=[right]):
            return _parse_membership(left, operator, right, negated)
        case ast.Compare(left=left, ops=operators, comparators=rights):
            pairs = zip([left, *rights], operators, rights, strict=False)  # a < b < c means a < b and b < c
            comparisons = tuple(_parse_comparison(*pair, negated) for pair in pairs)
            return comparisons[0] if len(comparisons) == 1 else _Group("or" if negated else "and", comparisons)
    raise ValueError(f"{ast.unparse(node)} is not a comparison of a column with a value")


def _join(is_and: bool, parts: list[ast.expr], negated: bool) -> _Group:
    return _Group("and" if is_and != negated else "or", tuple(_parse(part, negated=negated) for part in parts))


def _parse_membership(left: ast.expr, operator: ast.cmpop, right: ast.expr, negated: bool) -> _Comparison:
    if not isinstance(right, ast.List) or not right.elts:
        raise ValueError(f"{ast.unparse(right)} is not a list of values such as ['normal', 'COVID-19']")
    constants = tuple(_constant(item) for item in right.elts)
    if None in constants:
        raise ValueError("a list cannot hold None; compare missing values with == None")
    symbol = _SYMBOLS[type(operator)]
    return _Comparison(_column(left), _OPPOSITE[symbol] if negated else symbol, constants)


def _parse_comparison(left: ast.expr, operator: ast.cmpop, right: ast.expr, negated: bool) -> _Comparison:
    symbol = _SYMBOLS.get(type(operator))
    if symbol not in _SWAPPED:
        raise ValueError(
            f"{ast.unparse(ast.Compare(left, [operator], [right]))} uses an operator that filters do not support"
        )
    if _is_column(right) and not _is_column(left):
        left, right, symbol = right, left, _SWAPPED[symbol]
    column, constant = _column(left), _constant(right)
    if constant is None and symbol not in ("==", "!="):
        raise ValueError("None can only be compared with == and !=")
    return _Comparison(column, _OPPOSITE[symbol] if negated else symbol, (constant,))


def _is_column(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or _argument(node, "attr") is not None


def _column(node: ast.expr) -> str:
    """Return the name of a column, written `name` or `attr("name with a dot")`."""
    if isinstance(node, ast.Name):
        return node.id
    argument = _argument(node, "attr")
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    raise ValueError(f'{ast.unparse(node)} is not a column; write attr("name") for a name that is not a plain word')


def _constant(node: ast.expr) -> Any:
    """Return a string, number, boolean or None, written as such or within `val(...)`; numbers may have signs."""
    node = _argument(node, "val") or node
    match node:
        case ast.Constant(value=None | str() | int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _constant(operand)
            if isinstance(value, int | float):
                return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            raise ValueError("& and | bind more closely than comparisons: write (a == 1) & (b == 2), or use and, or")
    raise ValueError(f"{ast.unparse(node)} is not a constant; is it text without its quotes?")


def _argument(node: ast.expr, function: str) -> ast.expr | None:
    """Return the argument of a call such as `attr("name")`, or None if the node is no such call."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name == function:
            return argument
    return None


def _comparisons(condition: _Condition) -> Iterator[_Comparison]:
    if isinstance(condition, _Comparison):
        yield condition
    else:
        for part in condition.conditions:
            yield from _comparisons(part)


def _require_order(categories: pa.Array | None, symbol: str, constant: Any) -> None:
    """Raise unless a value has a place in the order of the categories.

    TileDB finds no cell if it has none, and a SOMA may lack the categories that no cell has.

    Args:
        categories: the categories in their order, or None for text and for categories without an order.
        symbol: `<` or its like.
        constant: the value.
    """
    if categories is None:
        raise ValueError(f"holds text or categories without an order; use ==, != or in, not {symbol}")
    known = categories.to_pylist()
    if constant not in known:
        raise ValueError(f"has the categories {known}, in this order; {constant!r} is none of them; compare with one")


def _convert(constant: Any, kind: pa.DataType) -> Any:
    """Return a constant as a value of a column's type.

    Raises:
        OverflowError: it is too large for a float.
        ValueError: it is of another kind, or no value of the column can equal it.
    """
    if constant is None:
        return None
    kind = _value_type(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        if not isinstance(constant, str):
            raise ValueError(f"holds text and cannot be compared with {constant!r}; put the value into quotes")
        # Lone surrogates, which TileDB rejects. Python reads bytes of the command line that are not UTF-8 as such.
        if constant.encode(errors="replace").decode() != constant:
            raise ValueError(
                f"cannot be compared with {constant!r}, which is not valid UTF-8; check the terminal's locale"
            )
        return constant
    if isinstance(constant, str):
        raise ValueError(f"cannot be compared with the text {constant!r}")
    if pa.types.is_floating(kind):
        return float(constant)
    if pa.types.is_boolean(kind):
        if constant not in (0, 1):
            raise ValueError(f"can only be compared with True and False, found {constant!r}")
        return bool(constant)
    if not pa.types.is_integer(kind):
        raise ValueError("cannot be used in a filter; columns of text, numbers and booleans can")
    return _whole_number(constant, kind)


def _whole_number(constant: float, kind: pa.DataType) -> int:
    """Return a number as an integer of a column's type."""
    # tiledbsoma would cut off the fraction: `age < 1.7` would leave out the cells of age 1
    signed = pa.types.is_signed_integer(kind)
    limit = 2 ** (kind.bit_width - signed)
    if not (-limit if signed else 0) <= constant < limit or constant != int(constant):
        raise ValueError(f"cannot be compared with {constant!r}; expected a whole number in the range of the type")
    return int(constant)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, whether or not they are stored as categories."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _write(condition: _Condition, constants: Mapping[_Comparison, list[Any]]) -> str:
    """Return a condition in the part of the syntax that TileDB evaluates correctly."""
    if isinstance(condition, _Group):
        return f" {condition.word} ".join(f"({_write(part, constants)})" for part in condition.conditions)
    column, symbol = f"attr({condition.column!r})", condition.symbol
    values = [ast.unparse(ast.Constant(constant)) for constant in constants[condition]]
    if symbol not in ("in", "not in"):
        return f"{column} {symbol} {values[0]}"
    if all(isinstance(constant, str) for constant in condition.constants):
        return f"{column} {symbol} [{', '.join(values)}]"
    # TileDB has no lists of booleans, of small integers or of negative numbers
    word, each = ("or", "==") if symbol == "in" else ("and", "!=")
    return f" {word} ".join(f"({column} {each} {value})" for value in values)


def _evaluate(
    condition: _Condition, columns: Mapping[str, pa.Array], constants: Mapping[_Comparison, list[Any]]
) -> pa.BooleanArray:
    """Return where a condition holds; never null. Shape (cells,)."""
    if isinstance(condition, _Group):
        join = pc.and_ if condition.word == "and" else pc.or_
        masks = (_evaluate(part, columns, constants) for part in condition.conditions)
        result = next(masks)
        for mask in masks:
            result = join(result, mask)
        return result
    column, symbol, values = columns[condition.column], condition.symbol, constants[condition]
    if values == [None]:
        return pc.is_null(column) if symbol == "==" else pc.is_valid(column)
    if not pa.types.is_dictionary(column.type):
        matched = _compare(column, symbol, values)
    elif symbol in ("==", "!=", "in", "not in"):  # a few categories stand for many cells
        matched = pc.take(_compare(column.dictionary, symbol, values), column.indices)
    else:
        place = pc.index(column.dictionary, pa.scalar(values[0], column.type.value_type)).as_py()
        matched = _compare(column.indices, symbol, [place])
    return pc.fill_null(matched, False)


def _compare(values: pa.Array, symbol: str, constants: list[Any]) -> pa.BooleanArray:
    """Return the result for each value, null where it is missing. Shape (values,)."""
    if symbol in _COMPARE:
        return _COMPARE[symbol](values, pa.scalar(constants[0], values.type))
    found = pc.is_in(values, value_set=pa.array(constants, values.type))
    found = found if symbol == "in" else pc.invert(found)
    return pc.if_else(pc.is_valid(values), found, None)
