"""The codec: a tree of state becomes named tensors and a JSON document, and back.

Nothing here can run code: there is no pickle, and `decode` builds only the types listed in
`encode`. Tensors go under their path in the tree, so that any safetensors reader shows what
they are; everything else becomes JSON, with a tagged object (`{"$tuple": [...]}`) wherever
JSON has no such type.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
import torch

from paceline.errors import CheckpointError, StateError
from paceline.world.dtensors import is_dtensor, local_part

MAX_DEPTH = 100
"""Deeper trees are refused: they would exhaust the JSON parser's stack when read back."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""safetensors' name of each dtype that it can store and torch's reader can read."""

_STORABLE = frozenset(DTYPES.values()) | {torch.complex128}
_NUMPY_KINDS = "biufc"
_SAFE = " !$&'()*+,;=:@[]<>{}|^-._~#?\"\\`"
_INT_JSON = 2**63


def encode(
    tree: Any, prefix: tuple[str, ...] = (), *, elsewhere: bool = False
) -> tuple[dict[str, torch.Tensor], Any]:
    """Splits a tree of state into tensors and a JSON-able skeleton.

    A tree is made of dict, OrderedDict, Counter, list, tuple, torch.Size, tensors (DTensors
    too), numpy arrays and numbers, None, bool, int, float, str and bytes. Tensors that share the
    same memory are stored once, and decoded to one tensor.

    Args:
        tree: the state. It is not copied: the tensors returned share its memory where they can.
        prefix: the keys that lead to `tree` in a larger tree; they start every name.
        elsewhere: whether a tensor on the meta device stands for one that another rank holds.

    Returns:
        `(tensors, skeleton)`: contiguous tensors by name (`model/layers.0.weight`), and the rest.

    Raises:
        StateError: something cannot be stored; the message gives its path.
    """
    encoder = _Encoder(elsewhere)
    try:
        skeleton = encoder.node(tree, prefix)
    except RecursionError:
        raise StateError("the state is nested too deeply to be stored") from None
    return encoder.tensors, skeleton


def decode(tensors: dict[str, torch.Tensor], skeleton: Any) -> Any:
    """Rebuilds the tree that `encode` split.

    Args:
        tensors: by name; the tree returned holds them, without a copy where their layout allows.
        skeleton: as `encode` made it, or as read back from JSON. It need not be trusted.

    Raises:
        CheckpointError: the skeleton is malformed, or names a tensor that is missing.
    """
    return _Decoder(tensors).node(skeleton, 0)


def names_in(skeleton: Any) -> set[str]:
    """The names of the tensors in a skeleton, or in a part of one."""
    names, waiting = set(), [skeleton]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            names |= {v for k, v in node.items() if k in ("$tensor", "$array") and type(v) is str}
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return names


class _Encoder:
    """One call of `encode`: what was stored so far, and under which names."""

    def __init__(self, elsewhere: bool) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._elsewhere = elsewhere
        # "__metadata__" is not a tensor in a safetensors header.
        self._taken = {"__metadata__"}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()

    def node(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return value if _is_text(value) else {"$str": _surrogates(value)}
        if kind is int:
            return value if -_INT_JSON <= value < _INT_JSON else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if kind in (bytes, bytearray):
            return {f"${kind.__name__}": value.hex()}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.generic):
            return self._number(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if kind in _CONTAINERS:
            return self._container(value, kind, path)
        return _refuse(value, path)

    def _container(self, value: Any, kind: type, path: tuple[Any, ...]) -> Any:
        if id(value) in self._open:
            raise StateError(f"{_dotted(path)}: contains itself, so it cannot be stored")
        if len(path) > MAX_DEPTH:
            raise StateError(f"{_dotted(path[:4])}...: nested more than {MAX_DEPTH} deep")
        self._open.add(id(value))
        try:
            if kind in (list, tuple, torch.Size):
                items = [self.node(item, (*path, i)) for i, item in enumerate(value)]
                return items if kind is list else {_CONTAINERS[kind]: items}
            if kind is dict and all(_is_plain_key(key) for key in value):
                return {key: self.node(item, (*path, key)) for key, item in value.items()}
            pairs = [
                [self._key(key, path), self.node(item, (*path, key))] for key, item in value.items()
            ]
            return {_CONTAINERS[kind]: pairs}
        finally:
            self._open.discard(id(value))

    def _key(self, key: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(key, (torch.Tensor, np.ndarray)):
            raise StateError(f"{_dotted(path)}: a tensor or array cannot be a key of a dictionary")
        return self.node(key, (*path, "a key"))

    def _number(self, value: np.generic, path: tuple[Any, ...]) -> Any:
        if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize > _widest(value.dtype):
            return _refuse(value, path)
        return {"$number": value.dtype.name, "hex": value.tobytes().hex()}

    def _array(self, value: np.ndarray, path: tuple[Any, ...]) -> Any:
        if type(value) is not np.ndarray:
            return _refuse(value, path)
        if value.dtype.kind not in _NUMPY_KINDS or value.dtype.itemsize > _widest(value.dtype):
            raise StateError(
                f"{_dotted(path)}: an array of dtype {value.dtype} cannot be stored; "
                "keep arrays of numbers"
            )
        if not value.dtype.isnative:
            raise StateError(
                f"{_dotted(path)}: an array of dtype {value.dtype} is not in this machine's byte "
                "order; convert it with .astype(array.dtype.newbyteorder('='))"
            )
        # from_numpy takes neither negative strides nor, without a warning, read-only memory.
        usable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
        tensor = torch.from_numpy(value if usable else value.copy(order="C"))
        tag: dict[str, Any] = {"$array": self._store(tensor, path, ties=usable)[0]}
        return tag | {"complex": True} if tensor.dtype == torch.complex128 else tag

    def _tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> Any:
        self._check_tensor(value, path)
        tensor = value.detach()
        lazy = tensor.is_conj() or tensor.is_neg()
        if lazy:
            tensor = tensor.resolve_conj().resolve_neg()
        # Memory allocated here may be freed and reused within this call: it proves no tie.
        name, stride = self._store(tensor, path, ties=not lazy)
        tag: dict[str, Any] = {"$tensor": name}
        if stride is not None:
            tag["stride"] = list(stride)
        if tensor.dtype == torch.complex128:
            tag["complex"] = True
        return tag

    def _check_tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> None:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if not plain and not is_dtensor(value):
            _refuse(value, path)
        empty = value.is_meta and not self._elsewhere
        if value.layout != torch.strided or empty or value.is_quantized:
            what = "meta" if empty else str(value.layout).removeprefix("torch.")
            raise StateError(f"{_dotted(path)}: a {what} tensor cannot be stored; make it dense")
        if value.dtype not in _STORABLE:
            raise StateError(f"{_dotted(path)}: a tensor of dtype {value.dtype} cannot be stored")

    def _store(
        self, tensor: torch.Tensor, path: tuple[Any, ...], ties: bool
    ) -> tuple[str, tuple[int, ...] | None]:
        """Keeps a tensor; returns its name, and its strides if they have to be restored."""
        key = _identity(tensor) if ties else None
        stride = None
        if not is_dtensor(tensor) and not tensor.is_contiguous() and _is_dense(tensor):
            # A channels_last momentum that was restored contiguous would give other bits.
            stride = tensor.stride()
        if key is not None and key in self._stored:
            return self._stored[key], stride
        name = self._name(path)
        if tensor.dtype == torch.complex128:
            tensor = torch.view_as_real(tensor)
        self.tensors[name] = tensor.contiguous()
        if key is not None:
            self._stored[key] = name
        return name, stride

    def _name(self, path: tuple[Any, ...]) -> str:
        name = "/".join(_segment(key) for key in path) or "value"
        # Keys 0 and "0" of one dictionary read the same; the order of the tree tells them apart.
        while name in self._taken:
            name += "~"
        self._taken.add(name)
        return name


_CONTAINERS: dict[type, str] = {
    dict: "$dict",
    OrderedDict: "$ordered",
    Counter: "$counter",
    list: "$list",
    tuple: "$tuple",
    torch.Size: "$size",
}


def _refuse(value: Any, path: tuple[Any, ...]) -> NoReturn:
    kind = type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    article = "an" if name[0].lower() in "aeiou" else "a"
    raise StateError(
        f"{_dotted(path)}: {article} {name} cannot be stored; keep tensors, numpy arrays, numbers, "
        "strings, bytes, None, and dictionaries, lists and tuples of them in the state"
    )


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path) or "the state"


def _segment(key: Any) -> str:
    text = key if isinstance(key, str) else str(key)
    return quote(text, safe=_SAFE, errors="surrogatepass")


def _is_text(value: str) -> bool:
    """Whether JSON preserves the string: it joins two lone surrogates into one character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogates(value: str) -> str:
    return value.encode("utf-8", "surrogatepass").hex()


def _is_plain_key(key: Any) -> bool:
    return type(key) is str and not key.startswith("$") and _is_text(key)


def _widest(dtype: np.dtype) -> int:
    """The largest item size of a kind that exists on every platform (no long double), in bytes."""
    return 16 if dtype.kind == "c" else 8


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any dimension order."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """A key that two tensors share if they are the same view of the same memory."""
    local = local_part(tensor)
    if local.numel() == 0:
        return None
    # getattr: only a DTensor has these.
    layout = (getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None))
    # A meta tensor has no address.
    start = local.untyped_storage()._cdata if local.is_meta else local.data_ptr()
    return (local.device, start, local.dtype, local.shape, local.stride(), *layout)


class _Decoder:
    """One call of `decode`. Trusts nothing in the skeleton."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._built: dict[str, Any] = {}
        self._tags: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {
            "$tensor": self._tensor,
            "$array": self._array,
            "$number": self._number,
            "$str": lambda v, _, __: bytes.fromhex(_text(v)).decode("utf-8", "surrogatepass"),
            "$bytes": lambda v, _, __: bytes.fromhex(_text(v)),
            "$bytearray": lambda v, _, __: bytearray.fromhex(_text(v)),
            "$int": lambda v, _, __: int(_text(v), 16),
            "$float": lambda v, _, __: _FLOATS[_text(v)],
            "$tuple": lambda v, _, depth: tuple(self._items(v, depth)),
            "$size": lambda v, _, depth: torch.Size(self._items(v, depth)),
            "$dict": lambda v, _, depth: dict(self._pairs(v, depth)),
            "$ordered": lambda v, _, depth: OrderedDict(self._pairs(v, depth)),
            "$counter": lambda v, _, depth: Counter(dict(self._pairs(v, depth))),
        }

    def node(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH + 1:
            raise CheckpointError(f"the state is nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return self._items(value, depth)
        if not isinstance(value, dict):
            raise CheckpointError(f"the state holds a {type(value).__name__}, which JSON cannot")
        tag = next(iter(value), "")
        if not isinstance(tag, str):
            raise CheckpointError(f"the state has the key {tag!r}, which JSON cannot")
        if not tag.startswith("$"):
            return {key: self.node(item, depth + 1) for key, item in value.items()}
        if tag not in self._tags:
            raise CheckpointError(f"the state uses {tag[:40]!r}, which this version does not know")
        try:
            return self._tags[tag](value[tag], value, depth)
        except CheckpointError:
            raise
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"the state has a broken {tag!r} entry: {error}") from error

    def _items(self, value: Any, depth: int) -> list[Any]:
        if not isinstance(value, list):
            raise CheckpointError(f"the state has a {type(value).__name__} where a list belongs")
        return [self.node(item, depth + 1) for item in value]

    def _pairs(self, value: Any, depth: int) -> list[tuple[Any, Any]]:
        if not isinstance(value, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in value
        ):
            raise CheckpointError("the state has a dictionary that is not a list of pairs")
        return [(self.node(key, depth + 1), self.node(item, depth + 1)) for key, item in value]

    def _named(self, name: Any) -> torch.Tensor:
        if not isinstance(name, str) or name not in self._tensors:
            raise CheckpointError(f"the state names the tensor {name!r:.80}, which is not stored")
        return self._tensors[name]

    def _tensor(self, name: Any, tag: dict[str, Any], _: int) -> torch.Tensor:
        stored = self._named(name)
        stride = tag.get("stride")
        key = f"{name}|{stride!r:.200}"
        if key in self._built:
            return self._built[key]
        tensor = torch.view_as_complex(stored) if tag.get("complex") else stored
        if stride is not None and not is_dtensor(tensor):
            tensor = _with_stride(tensor, stride)
        self._built[key] = tensor
        return tensor

    def _array(self, name: Any, tag: dict[str, Any], _: int) -> np.ndarray:
        stored = self._named(name)
        key = f"{name}|array"
        if key not in self._built:
            tensor = torch.view_as_complex(stored) if tag.get("complex") else stored
            self._built[key] = tensor.numpy()
        return self._built[key]

    def _number(self, name: Any, tag: dict[str, Any], _: int) -> np.generic:
        dtype = np.dtype(_text(name))
        raw = bytes.fromhex(_text(tag.get("hex")))
        if dtype.kind not in _NUMPY_KINDS or len(raw) != dtype.itemsize:
            raise CheckpointError(f"the state has a broken number of dtype {dtype}")
        return np.frombuffer(raw, dtype)[0]


_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"the state has a {type(value).__name__} where text belongs")
    return value


def _with_stride(tensor: torch.Tensor, stride: Any) -> torch.Tensor:
    whole = isinstance(stride, list) and all(type(s) is int and s > 0 for s in stride)
    if not whole or len(stride) != tensor.dim():
        raise CheckpointError("the state has a tensor with broken strides")
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True))
    if span != tensor.numel():
        raise CheckpointError("the state has a tensor with broken strides")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
