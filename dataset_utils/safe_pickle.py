"""Reader for arrays that NumPy pickled, which unpickles nothing but data.

`np.load(..., allow_pickle=True)` runs any code that a file names, yet some published data sets come as pickled arrays.
This reader accepts only what NumPy writes: arrays, dtypes and scalars (by their names in NumPy 1 and 2) and Python's
own dict, list, tuple, str, bytes and numbers. It rebuilds the arrays itself from shape and bytes, so that a forged
state never reaches NumPy's own `__setstate__`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from dataset_utils import limits
from dataset_utils.arrays import read_header, read_npz
from dataset_utils.files import check_regular, expanded, parsing
from registry.errors import UserError


def load_npy(path: Path) -> object:
    """Read a .npy file: an array, or the object itself where a single one was saved (0-d object array).

    Raises:
        UserError: it is no .npy file, is damaged, or names anything but data.
    """
    size = check_regular(path)
    with parsing(path, ".npy file"), path.open("rb") as file:
        return _read(file, size, str(path))


def load_npz(path: Path) -> dict[str, object]:
    """Read the arrays of a .npz file by name, each as `load_npy` does. Raises UserError likewise."""
    check_regular(path)
    return read_npz(path, path, read=_read)


def read_pickle(file: IO[bytes], where: str) -> object:
    """Read a pickle of arrays, dicts and the like, also one of Python 2. Raises UserError as `load_npy` does."""
    with parsing(where, "pickle of arrays"):
        return _load(file, where, "latin1")


def _read(file: IO[bytes], size: int, where: str) -> object:
    with parsing(where, ".npy file"):
        shape, dtype = read_header(file, size, where)
        if not dtype.hasobject:
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
        loaded = _load(file, where)
        if not isinstance(loaded, np.ndarray) or loaded.dtype != object or loaded.size != math.prod(shape):
            raise UserError(f"{where}: does not hold the array that its header announces")
        return loaded.reshape(shape) if shape else loaded.item()


def _load(file: IO[bytes], where: str, encoding: str = "ASCII") -> Any:
    loaded = _Unpickler(file, where, encoding).load()
    if expanded(loaded, _parts) > limits.PICKLED:  # such as lists of lists that share their parts
        raise UserError(f"{where}: refused, it holds more than {limits.PICKLED} values")
    return _arrays(loaded, {})


def _parts(item: Any) -> Iterable[Any]:
    """Return the values in a list, a dictionary or an array that are such themselves."""
    if isinstance(item, _Array):
        item = getattr(item, "contents", ())
    if isinstance(item, dict):
        return [*item, *item.values()]
    return item if isinstance(item, list | tuple | set | frozenset) else ()


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):  # type: ignore[misc]
    """Unpickler that gives the accepted names harmless meanings, and refuses all others.

    It is pickle's own in Python: the one in C takes 32 GB for a memo entry of a high number. Dictionaries and sets take
    numbers and text only: hashing a tuple of tuples that share their parts may take for ever.
    """

    def __init__(self, file: IO[bytes], where: str, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self.where = where
        self.known: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self.dtype,
            ("_codecs", "encode"): self.encode,
            ("builtins", "complex"): complex,
            ("__builtin__", "complex"): complex,
            ("__builtin__", "bytes"): self.no_bytes,
        }
        for core in ("numpy.core", "numpy._core"):
            self.known[f"{core}.multiarray", "_reconstruct"] = self.reconstruct
            self.known[f"{core}.multiarray", "scalar"] = self.scalar
            self.known[f"{core}.numeric", "_frombuffer"] = self.frombuffer

    dispatch = dict(_InPython.dispatch)

    def load_build(self) -> None:
        """Give an array or a dtype its state; nothing else has one."""
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise ValueError("a state where there is no array")
        super().load_build()

    def load_setitems(self) -> None:
        """Fill a dictionary."""
        _check_plain(self.stack[::2])
        super().load_setitems()

    def load_setitem(self) -> None:
        """Add one entry to a dictionary."""
        _check_plain(self.stack[-2:-1])
        super().load_setitem()

    def load_dict(self) -> None:
        """Make a dictionary, as protocol 0 does."""
        _check_plain(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        """Fill a set."""
        _check_plain(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        """Make a frozen set."""
        _check_plain(self.stack)
        super().load_frozenset()

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the meaning of a name in the pickle. Raises UserError for any that is not data."""
        if (module, name) not in self.known:
            raise UserError(f"{self.where}: refused, it asks for '{module}.{name}', which is not data")
        return self.known[module, name]

    def dtype(self, code: str, align: bool = False, copy: bool = True) -> _Dtype:
        """Return a dtype for `numpy.dtype(code)`; its byte order follows as state."""
        return _Dtype(code)

    def encode(self, text: str, encoding: str) -> bytes:
        """Return the bytes that protocols 0 to 2 write as latin-1 text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("bytes written in an unusual encoding")
        return text.encode("latin1")

    def no_bytes(self) -> bytes:
        """Return empty bytes, which protocols 0 to 2 write as a call of `bytes`."""
        return b""

    def reconstruct(self, kind: str, shape: tuple[int, ...], code: bytes) -> _Array:
        """Return an empty array; its contents follow as state."""
        return _Array()

    def scalar(self, dtype: _Dtype, raw: bytes) -> np.generic:
        """Return one number or string."""
        value: np.generic = np.frombuffer(raw, dtype.plain())[0]
        return value

    def frombuffer(self, raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        """Return a contiguous array, which protocol 5 writes in this way."""
        flat = np.frombuffer(raw, dtype.plain())
        own: np.ndarray = flat.reshape(shape, order="F" if order == "F" else "C").copy()
        return own


def _check_plain(keys: Iterable[Any]) -> None:
    """Raise ValueError where a key is not a number, text or nothing."""
    if not all(key is None or isinstance(key, str | bytes | int | float | np.generic) for key in keys):
        raise ValueError("a key that is neither text nor a number")


class _Dtype:
    """A dtype being rebuilt: numbers, strings, times and objects; no fields, no sub-arrays."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str | bytes):
            raise ValueError("a dtype without a name")
        self.value = np.dtype(code if isinstance(code, str) else code.decode("ascii"))
        if self.value.names or self.value.subdtype or self.value.kind == "V":
            raise ValueError(f"dtype {code!r} is not supported")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if subarray or names or fields:
            raise ValueError("structured dtypes are not supported")
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)

    def plain(self) -> np.dtype:
        if self.value.hasobject:
            raise ValueError("an object dtype where bytes are given")
        return self.value


class _Array:
    """An array being rebuilt."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, contents = state
        self.shape: tuple[int, ...] = shape
        self.order: Literal["F", "C"] = "F" if fortran else "C"
        self.contents: Any = contents
        self.dtype: np.dtype = dtype.value

    def build(self, made: dict[int, Any]) -> np.ndarray:
        if not self.dtype.hasobject:
            raw = self.contents.encode("latin1") if isinstance(self.contents, str) else self.contents  # Python 2: str
            values: np.ndarray = np.frombuffer(raw, self.dtype).reshape(self.shape, order=self.order).copy()
            return values
        flat: np.ndarray = np.empty(len(self.contents), dtype=object)
        for index, item in enumerate(self.contents):
            flat[index] = _arrays(item, made)
        return flat.reshape(self.shape, order=self.order)


def _arrays(item: Any, made: dict[int, Any]) -> Any:
    """Return `item` with every `_Array` and `_Dtype` in it replaced by what it describes.

    `made` holds converted objects by id, so that shared objects stay shared and are converted once.
    """
    if isinstance(item, _Dtype):
        return item.value
    if not isinstance(item, (_Array, dict, list, tuple, set, frozenset)):
        return item
    if id(item) not in made:
        result: Any
        if isinstance(item, _Array):
            result = item.build(made)
        elif isinstance(item, dict):
            result = {_arrays(key, made): _arrays(value, made) for key, value in item.items()}
        else:
            result = type(item)(_arrays(part, made) for part in item)
        made[id(item)] = result
    return made[id(item)]
