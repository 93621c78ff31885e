"""How deep a pickle's tuples go, without loading it."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae_lowmem.data.pickles import DEEPEST_TUPLE, BadPickle, check_tuples

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(value=values, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_ordinary_values_pass_and_the_whole_pickle_is_read(value: Any, protocol: int) -> None:
    file = io.BytesIO(pickle.dumps([value, value], protocol) + b"rest")
    check_tuples(file)
    assert file.read() == b"rest"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_limit_is_exact(protocol: int) -> None:
    value: Any = ()
    for _ in range(DEEPEST_TUPLE - 1):
        value = (value, 1)
    check_tuples(io.BytesIO(pickle.dumps([{"a": value}, np.zeros(3)], protocol)))
    with pytest.raises(BadPickle, match="nested more than"):
        check_tuples(io.BytesIO(pickle.dumps([((value,), 1)], protocol)))


def test_deep_lists_pass_because_nobody_hashes_them() -> None:
    check_tuples(io.BytesIO(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    try:
        check_tuples(io.BytesIO(data))
    except BadPickle as error:
        assert str(error).startswith("it")
