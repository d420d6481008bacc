import enum
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ledger.canonical import MAX_BYTES, decimal, decode, encode, is_decimal
from capsfl.ledger.errors import CanonicalError

_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(max_codepoint=127)), inner),
    max_leaves=12,
).filter(lambda value: _depth(value) <= 8)


def _depth(value: object) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value if isinstance(value, list) else value.values()
    return 1 + max(map(_depth, inner), default=0)


@given(_values)
def test_every_value_reads_back_from_its_bytes(value):
    assert decode(encode(value)) == value
    assert encode(decode(encode(value))) == encode(value)


@given(_values, st.data())
def test_changed_bytes_are_refused_or_are_the_canonical_bytes_of_another_value(value, data):
    original = bytearray(encode(value))
    position = data.draw(st.integers(0, len(original) - 1))
    original[position] ^= data.draw(st.integers(1, 255))
    try:
        other = decode(bytes(original))
    except CanonicalError:
        return
    assert encode(other) == bytes(original)
    assert other != value or repr(other) != repr(value)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_or_canonical(data):
    try:
        value = decode(data)
    except CanonicalError:
        return
    assert encode(value) == data


def test_keys_are_sorted_and_the_order_of_insertion_leaves_no_trace():
    assert encode({"b": 1, "a": [True, None, "é"]}) == b'{"a":[true,null,"\\u00e9"],"b":1}'
    assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" 1",
        b"1\n",
        b"1 2",
        b"[1,]",
        b"NaN",
        b"-Infinity",
        b"[Infinity]",
        b"1.0",
        b"1e3",
        b"-0",
        b"01",
        b"9007199254740992",
        b"-9007199254740992",
        b"1" * 4300,
        b"1" * 1_000_000,
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b'{"\\u00e9":1}',
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'"\\u0061"',
        b'"\\u00E9"',
        b'"\\/"',
        "é".encode(),
        b"\xef\xbb\xbf1",
        b"\xff",
        b"\x00",
        b'"unterminated',
        b'"\\',
        b"[" * 9 + b"]" * 9,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'["]","' + b"[" * 20 + b'",[[[[[[[[]]]]]]]]]',
        b'"' + b'\\"' * 400_000,
        b'"' + b"x" * 50_000_000 + b'"',
        b"[" + b"0," * 400_000 + b"0 ]",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_hostile_bytes_are_refused_in_bounded_time(data):
    start = time.process_time()
    with pytest.raises(CanonicalError) as caught:
        decode(data)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_brackets_inside_strings_do_not_count_as_nesting():
    value = ["[[[[[[[[[[{{{{", '\\"[[[[[[[[[[', "\\\\", '"']
    assert decode(encode(value)) == value
    deepest: list[object] = []
    for _ in range(7):
        deepest = [deepest]
    assert decode(encode(deepest)) == deepest


class _Level(enum.IntEnum):
    ONE = 1


class _Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        *(1.0, math.nan, b"", (1,), {1}, {1: 2}, {"é": 1}, {None: 1}, 2**53, -(2**53), "\ud800", ["\udfff"]),
        *(_Level.ONE, _Name("a"), {_Name("a"): 1}, [[[[[[[[[]]]]]]]]], "x" * MAX_BYTES, Ellipsis),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_values_outside_the_canonical_form_are_refused(value):
    with pytest.raises(CanonicalError):
        encode(value)


def test_a_value_that_contains_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CanonicalError, match="deeper"):
        encode(loop)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_decimal_reads_back_as_exactly_the_same_float(x):
    text = decimal(x)
    assert is_decimal(text)
    assert math.copysign(1, float(text)) == math.copysign(1, x)
    assert float(text) == x


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf, True, "1", None])
def test_what_is_not_a_finite_number_has_no_decimal(x):
    with pytest.raises(CanonicalError):
        decimal(x)


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "1e999", "01", "+1", "1_0", " 1", "1.", ".5", "٣", "0x1", 1.0, None]
)
def test_other_spellings_are_no_decimals(text):
    assert not is_decimal(text)
