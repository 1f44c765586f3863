"""Turns a nested training state into a JSON skeleton with named tensors, and back.

The skeleton is strict JSON in which plain values stand for themselves and everything else is an
object with a single key:

- ``None``, ``bool``, ``int``, ``str`` and finite ``float``: the JSON value; a list: a JSON array.
- ``{"float": "nan" | "inf" | "-inf"}``: a float that JSON has no number for.
- ``{"tuple": [...]}``: a tuple.
- ``{"dict": [[key, value], ...]}``: a dict in its order; ``1`` and ``"1"`` stay different keys.
- ``{"tensor": name}``: the tensor of that name in one of the safetensors files.

Reading builds these seven kinds of value and nothing else, so a file cannot make it run anything.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""Nested dict (keys ``str`` or ``int``), list, tuple of Tensor, bool, int, float, str, None."""

# What safetensors stores natively; converting another dtype is the caller's choice.
_DTYPES = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)
_PLAIN = frozenset({type(None), bool, int, float, str})
_NON_FINITE = frozenset({"nan", "inf", "-inf"})
_RESERVED_NAME = "__metadata__"  # safetensors keeps its own text under this name


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedState:
    """A state ready to be written.

    Attributes:
        skeleton: The JSON text, UTF-8.
        tensors: The tensors by name, still on their devices and not copied.
    """

    skeleton: bytes
    tensors: dict[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Approximate size on disk, in bytes (without file headers)."""
        return len(self.skeleton) + sum(tensor.nbytes for tensor in self.tensors.values())


def pack_state(state: State) -> PackedState:
    """Separates ``state`` into its skeleton and its tensors.

    A view that occurs several times (a tied weight: same memory, shape, strides and dtype) gets one
    name. Tensors are named by the dotted path of their first occurrence.

    Args:
        state: The nested state; a dict at the top. Subclasses of dict are taken as dicts.

    Returns:
        The packed state. It refers to the tensors of ``state``: write it before they change.

    Raises:
        TypeError: For a value or key of another type, naming its dotted path.
        ValueError: For text with lone surrogates, which UTF-8 cannot hold, naming its dotted path.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict, got {_type_name(state)}; wrap it in one")
    names = _TensorNames()
    skeleton = json.dumps(
        _encode(state, "", names), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return PackedState(skeleton=skeleton.encode(), tensors=names.tensors)


def unpack_state(skeleton: bytes, tensors: Mapping[str, Tensor]) -> State:
    """Rebuilds a state; the inverse of ``pack_state``.

    Args:
        skeleton: The JSON text.
        tensors: The tensors by name. They are handed out, not copied: a name that the skeleton uses
            twice gives the same tensor object twice.

    Returns:
        The state, equal to the packed one in values, types and order.

    Raises:
        ValueError: If the text is not such a skeleton or names an absent tensor.
    """
    try:
        state = _decode(json.loads(skeleton), tensors)
    except RecursionError as error:
        raise ValueError("the skeleton is nested too deeply") from error
    if not isinstance(state, dict):
        raise ValueError(f"the skeleton holds a {_type_name(state)} at its top, expected a dict")
    return state


def tensor_shards(tensors: Mapping[str, Tensor], *, shard_bytes: int) -> Iterator[bytes]:
    """Yields the tensors as safetensors files of about ``shard_bytes`` each, in order.

    Only one shard is in memory at a time. A tensor is never split: one above ``shard_bytes`` makes
    a file of its own.

    Args:
        tensors: The tensors by name, on any device; strided, of a dtype that safetensors stores.
        shard_bytes: The most bytes of tensor data in a file that holds several tensors.
    """
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        if shard and filled + tensor.nbytes > shard_bytes:
            yield save(shard)
            shard, filled = {}, 0
        shard[name] = _compact(tensor)
        filled += tensor.nbytes
    if shard:
        yield save(shard)


def read_shard(data: bytes) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file, on CPU; ``ValueError`` if it is not one."""
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error


def _compact(tensor: Tensor) -> Tensor:
    """Copies to contiguous CPU memory of its own: safetensors refuses strides and shared memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


@final
class _TensorNames:
    """Gives every distinct view a unique name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._by_view: dict[tuple[object, ...], str] = {}

    def name_of(self, tensor: Tensor, path: str) -> str:
        """Returns the name under which ``tensor``, found at ``path``, is stored."""
        _check_tensor(tensor, path)
        # Empty tensors have no address to tell them apart by, so each is stored for itself.
        address = tensor.data_ptr() if tensor.numel() else id(tensor)
        view = (
            address,
            tensor.device,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_neg(),
        )
        if view not in self._by_view:
            self._by_view[view] = self._unused(path)
            self.tensors[self._by_view[view]] = tensor
        return self._by_view[view]

    def _unused(self, path: str) -> str:
        # {"a.b": x, "a": {"b": y}} spells one path twice.
        candidates = itertools.chain([path], (f"{path}#{count}" for count in itertools.count(2)))
        taken = self.tensors.keys() | {_RESERVED_NAME}
        return next(name for name in candidates if name not in taken)


def _encode(value: object, path: str, names: _TensorNames) -> object:
    if isinstance(value, Tensor):
        return {"tensor": names.name_of(value, path)}
    if isinstance(value, dict):
        return {"dict": [_encode_pair(key, item, path, names) for key, item in value.items()]}
    if type(value) is list or type(value) is tuple:
        items = [_encode(item, _join(path, index), names) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) not in _PLAIN:
        raise TypeError(
            f"{_in_state(path)} must be a Tensor, bool, int, float, str, None, or a dict, list or "
            f"tuple of them, got {_type_name(value)}; convert it before saving"
        )
    if type(value) is str:
        _check_text(value, path)
    is_number = type(value) is not float or repr(value) not in _NON_FINITE
    return value if is_number else {"float": repr(value)}


def _encode_pair(key: object, value: object, path: str, names: _TensorNames) -> list[object]:
    if type(key) is str:
        _check_text(key, path)
    elif type(key) is not int:
        raise TypeError(
            f"every key of {_in_state(path)} must be str or int, got {key!r} ({_type_name(key)}); "
            "convert it before saving"
        )
    return [key, _encode(value, _join(path, key), names)]


def _decode(node: object, tensors: Mapping[str, Tensor]) -> object:
    match node:
        case None | bool() | int() | float() | str():
            return node
        case list(items):
            return [_decode(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(_decode(item, tensors) for item in items)
        case {"dict": list(pairs)}:
            return dict(_decode_pair(pair, tensors) for pair in pairs)
        case {"float": str(text)} if text in _NON_FINITE:
            return float(text)
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
    raise ValueError(f"unknown part of a skeleton: {str(node)[:80]}")


def _decode_pair(pair: object, tensors: Mapping[str, Tensor]) -> tuple[str | int, object]:
    match pair:
        case [(str() | int()) as key, value]:
            return key, _decode(value, tensors)
    raise ValueError(f"unknown dict entry in a skeleton: {str(pair)[:80]}")


def _check_tensor(tensor: Tensor, path: str) -> None:
    # A subclass (DTensor, a quantised tensor) means more than its bytes say.
    is_plain = type(tensor) in {Tensor, torch.nn.Parameter} and not tensor.is_meta
    if not is_plain or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{_in_state(path)} must be a plain dense tensor of a real dtype, got "
            f"{_type_name(tensor)} (dtype {tensor.dtype}, layout {tensor.layout}, device "
            f"{tensor.device}); convert it before saving"
        )


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{_in_state(path)} must hold valid Unicode text, got {text!a}; "
            "remove its lone surrogates"
        ) from error


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _in_state(path: str) -> str:
    return f"state.{path}" if path else "state"


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
