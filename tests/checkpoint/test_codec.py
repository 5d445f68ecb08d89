"""The codec gives back what it was given, stores no code, and refuses the rest by its path."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paceline.checkpoint.codec import DTYPES, MAX_DEPTH, decode, encode
from paceline.checkpoint.safetensors_file import raw_bytes
from paceline.errors import CheckpointError, StateError


def there_and_back(tree: Any) -> Any:
    tensors, skeleton = encode(tree)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return decode(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, bit by bit, NaNs included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(raw_bytes(tensor.contiguous()))


SIMPLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="=", sizes=(64, 128)),
)
ARRAYS = NUMBERS.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
)
TENSORS = ARRAYS.map(lambda array: torch.from_numpy(np.array(array))).flatmap(
    lambda t: st.sampled_from([t, t.mT if t.dim() > 1 else t, t[::2] if t.dim() else t])
)
SCALARS = ARRAYS.filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0])
KEYS = st.text(max_size=3) | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
LEAVES = SIMPLE | ARRAYS | TENSORS | SCALARS
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(KEYS, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=12,
)


@given(TREES)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tree_comes_back_bit_by_bit(tree: Any) -> None:
    assert same(there_and_back(tree), tree)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex128], ids=str)
def test_every_dtype_comes_back_bitwise_even_empty_or_without_dimensions(dtype: Any) -> None:
    size = dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * size,), dtype=torch.uint8)
    whole = bits.view(dtype).reshape(2, 3)
    for tensor in (whole, whole[0, 0], whole[:0]):
        assert same(there_and_back({"t": tensor})["t"], tensor)


def test_tensors_are_found_under_their_path_however_odd_the_keys() -> None:
    one = torch.ones(1)
    tree = {"model": {"layers.0.weight": one, "a/b": one + 1, "é\ud800\n": one + 2}, 0: [one + 3]}
    tree |= {"0": [one + 4], "__metadata__": one + 5}

    tensors, _ = encode(tree)

    assert list(tensors)[:2] == ["model/layers.0.weight", "model/a%2Fb"]
    assert {name for name in tensors if name.startswith("0/")} == {"0/0", "0/0~"}
    assert "__metadata__" not in tensors
    assert all(name.isascii() and name.isprintable() for name in tensors)
    assert same(there_and_back(tree), tree)


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    array = np.arange(3.0)
    tree = {"a": weight, "b": [weight.detach()], "row": weight[0], "x": array, "y": (array,)}

    tensors, _ = encode(tree)
    got = there_and_back(tree)

    assert set(tensors) == {"a", "row", "x"}
    assert got["a"] is got["b"][0]
    assert got["x"] is got["y"][0]
    assert torch.equal(got["row"], weight[0])


def test_equal_tensors_that_are_not_tied_stay_apart() -> None:
    got = there_and_back([torch.ones(3), torch.ones(3), torch.empty(0), torch.empty(0)])
    got[0].add_(1)
    assert got[1].tolist() == [1, 1, 1]


def test_memory_that_exists_only_while_encoding_ties_nothing() -> None:
    values = [torch.full((64, 64), complex(i, i)).conj().T for i in range(20)]
    assert all(map(same, there_and_back(values), values))


def test_a_channels_last_tensor_keeps_its_memory_format() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    got = there_and_back(tensor)
    assert got.stride() == tensor.stride()
    assert torch.equal(got, tensor)


def test_a_string_of_halves_is_not_joined_into_one_character() -> None:
    halves = chr(0xD83D) + chr(0xDE00)
    assert same(there_and_back({halves: [halves]}), {halves: [halves]})


def test_a_dictionary_that_looks_like_one_of_our_tags_is_only_a_dictionary() -> None:
    tree = {"$tensor": "x", "a": {"$tuple": [1]}, "b": {"$int": {"$pickle": 1}}}
    assert same(there_and_back(tree), tree)


def test_a_counter_can_still_be_counted() -> None:
    # MultiStepLR calls .elements() on it, and looks it up by whole numbers.
    assert sorted(there_and_back({"m": Counter({3: 1, 5: 2})})["m"].elements()) == [3, 5, 5]


class Tagged(torch.Tensor):
    pass


def looped() -> list[Any]:
    loop: list[Any] = []
    loop.append({"again": loop})
    return loop


REFUSED = {
    "callbacks.mine.lock: a _thread.lock": {"callbacks": {"mine": {"lock": threading.Lock()}}},
    "f: a function": {"f": lambda: 0},
    "s: a set": {"s": {1}},
    "x.1: a complex": {"x": (1, 1j)},
    "a: an array of dtype object": {"a": np.array([None])},
    "a: an array of dtype >f8": {"a": np.zeros(2, ">f8")},
    "a: an array of dtype <U1": {"a": np.array(["x"])},
    "t: a sparse_coo tensor": {"t": torch.eye(2).to_sparse()},
    "t: a meta tensor": {"t": torch.empty(2, device="meta")},
    "t: a tensor of dtype torch.float8_e8m0fnu": {"t": torch.empty(2, dtype=torch.float8_e8m0fnu)},
    "t: a test_codec.Tagged": {"t": torch.ones(1).as_subclass(Tagged)},
    "again: contains itself": looped(),
    "d: a tensor or array cannot be a key": {"d": {torch.ones(1): 1}},
    "n: a numpy.datetime64": {"n": np.datetime64("2020-01-01")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_stored_is_refused_by_its_path(message: str) -> None:
    with pytest.raises(StateError) as caught:
        encode(REFUSED[message])
    assert message in str(caught.value)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 2000])
def test_a_tree_too_deep_to_read_back_is_refused_when_saved(depth: int) -> None:
    with pytest.raises(StateError, match="deep"):
        encode(nested(depth))
    assert same(there_and_back(nested(MAX_DEPTH)), nested(MAX_DEPTH))


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = {1: (tree,)} if depth % 2 else (tree,)
    return tree


def test_a_number_longer_than_json_may_hold_comes_back() -> None:
    assert there_and_back([-(2**20_000), 2**63, -(2**63)]) == [-(2**20_000), 2**63, -(2**63)]


HOSTILE = [
    {"$pickle": "gASV"},
    {"$tensor": "nowhere"},
    {"$tensor": ["t"]},
    {"$tensor": "t", "stride": [10**12, 1]},
    {"$tensor": "t", "stride": [100, 1]},
    {"$tensor": "t", "stride": [-1, 3]},
    {"$tensor": "t", "stride": [0, 0]},
    {"$tensor": "t", "stride": "11"},
    {"$tensor": "t", "complex": True},
    {"$tuple": 3},
    {"$tuple": {"a": 1}},
    {"$dict": [[1]]},
    {"$dict": [[[1], 2]]},
    {"$counter": "abc"},
    {"$size": ["x"]},
    {"$bytes": "zz"},
    {"$str": "ff"},
    {"$int": "ten"},
    {"$float": "huge"},
    {"$number": "O", "hex": "00" * 8},
    {"$number": "float32", "hex": "00"},
    {"$number": "no such type", "hex": ""},
    {"$number": 7},
    {"$array": "half"},
    json.loads("[" * 500 + "]" * 500),
]


@pytest.mark.parametrize("skeleton", HOSTILE, ids=lambda s: json.dumps(s)[:30])
def test_a_hostile_skeleton_is_one_clear_error(skeleton: Any) -> None:
    tensors = {"t": torch.zeros(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match="the state"):
        decode(tensors, {"a": [skeleton]})
