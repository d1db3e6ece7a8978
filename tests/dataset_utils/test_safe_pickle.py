"""dataset_utils.safe_pickle: reads what numpy wrote, refuses everything else."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from dataset_utils.safe_pickle import load_npy, load_npz
from registry.errors import UserError


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def save_raw(path, contents: bytes, shape=()):
    """Write an object array whose pickle is `contents`."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(contents)


def example():
    shared = np.arange(3, dtype=">i2")
    return {
        "X": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((2, 2), np.float32))],
        "y": np.array([0, 1]),
        "names": ["a", "ü"],
        "unicode": np.array(["ab", "c"]),
        "bytes": b"\x00\xff",
        "scalar": np.float64(1.5),
        "text scalar": np.str_("ab"),
        "nested": np.array([{"a": 1}, None, (1, 2.5, True, 3j)], dtype=object),
        "shared": (shared, shared),
        "empty": np.zeros((0, 4)),
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_every_protocol(tmp_path, protocol):
    array = np.empty((), dtype=object)
    array[()] = example()
    save_raw(tmp_path / "a.npy", pickle.dumps(array, protocol))
    loaded = load_npy(tmp_path / "a.npy")
    assert loaded.keys() == example().keys()
    for key in ("y", "unicode", "empty"):
        np.testing.assert_array_equal(loaded[key], example()[key])
        assert loaded[key].dtype == example()[key].dtype
    for mine, theirs in zip(loaded["X"], example()["X"], strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype and mine.flags.writeable
    assert loaded["bytes"] == b"\x00\xff" and loaded["names"] == ["a", "ü"]
    assert loaded["scalar"] == 1.5 and loaded["text scalar"] == "ab"
    assert loaded["nested"].tolist() == example()["nested"].tolist()
    np.testing.assert_array_equal(loaded["shared"][0], [0, 1, 2])
    assert loaded["shared"][0] is loaded["shared"][1]


def test_reads_numpy_1_and_2_names(tmp_path):
    array = np.array([np.arange(3), None], dtype=object)
    contents = pickle.dumps(array, 2)
    older = contents.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    newer = contents.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    assert older != newer
    for contents in (older, newer):
        save_raw(tmp_path / "a.npy", contents, shape=(2,))
        np.testing.assert_array_equal(load_npy(tmp_path / "a.npy")[0], [0, 1, 2])


def test_plain_arrays_and_npz(tmp_path):
    np.save(tmp_path / "plain.npy", np.eye(2))
    np.testing.assert_array_equal(load_npy(tmp_path / "plain.npy"), np.eye(2))
    np.savez(tmp_path / "b.npz", data=np.array({"x": np.eye(3)}, dtype=object), other=np.arange(2))
    loaded = load_npz(tmp_path / "b.npz")
    np.testing.assert_array_equal(loaded["data"]["x"], np.eye(3))
    np.testing.assert_array_equal(loaded["other"], [0, 1])


@pytest.mark.parametrize(
    ("forbidden", "name"),
    [
        (Evil(os.system, "touch {mark}"), r"posix\.system|nt\.system"),
        (Evil(eval, "open('{mark}', 'w')"), r"builtins\.eval"),
        (Evil(getattr, "a", "upper"), r"builtins\.getattr"),
        (Evil(np.load, "{mark}"), r"numpy\.load"),
        (Evil(np.memmap, "{mark}"), r"numpy\.memmap"),
    ],
)
def test_refuses_and_runs_nothing(tmp_path, forbidden, name):
    mark = tmp_path / "ran"
    forbidden.arguments = tuple(a.replace("{mark}", str(mark)) for a in forbidden.arguments)
    np.save(tmp_path / "a.npy", np.array([forbidden, 1], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", data=np.array([forbidden], dtype=object))
    for read, file in ((load_npy, "a.npy"), (load_npz, "a.npz")):
        with pytest.raises(UserError, match=f"{file}.*(numpy.*)?{name}"):
            read(tmp_path / file)
    assert not mark.exists()


def test_forged_dtype_and_array_states_never_reach_numpy(tmp_path):
    # flags that deny that an object dtype holds objects would make numpy read pointers from bytes
    contents = pickle.dumps(np.array([1, 2], dtype=object), 2)
    assert contents.count(b"K?t") == 1
    save_raw(tmp_path / "a.npy", contents.replace(b"K?t", b"K\x00t"), shape=(2,))
    assert load_npy(tmp_path / "a.npy").tolist() == [1, 2]
    for descr in ("V8", "i4,O"):
        forged = np.zeros(2, np.dtype(descr))
        save_raw(tmp_path / "a.npy", pickle.dumps(np.array([forged, 0], dtype=object)), shape=(2,))
        with pytest.raises(UserError, match="not supported"):
            load_npy(tmp_path / "a.npy")
    # object arrays from raw bytes would turn them into pointers
    contents = pickle.dumps(np.array([np.float64(1.0)], dtype=object), 2).replace(b"f8", b"O8")
    save_raw(tmp_path / "a.npy", contents, shape=(1,))
    with pytest.raises(UserError, match="object dtype where bytes"):
        load_npy(tmp_path / "a.npy")


def test_shape_must_fit_bytes(tmp_path):
    contents = pickle.dumps(np.array([np.arange(4, dtype=np.int64)], dtype=object), 2)
    op = next(pos for op, arg, pos in pickletools.genops(contents) if op.name == "BININT1" and arg == 4)
    save_raw(tmp_path / "a.npy", contents[: op + 1] + b"\xff" + contents[op + 2 :], shape=(1,))
    with pytest.raises(UserError, match="damaged"):
        load_npy(tmp_path / "a.npy")


def test_damaged_files(tmp_path):
    np.save(tmp_path / "good.npy", np.array([example()], dtype=object), allow_pickle=True)
    good = (tmp_path / "good.npy").read_bytes()
    for length in (0, 5, 40, 130, len(good) // 2, len(good) - 1):
        (tmp_path / "cut.npy").write_bytes(good[:length])
        with pytest.raises(UserError, match=r"cut\.npy"):
            load_npy(tmp_path / "cut.npy")
    for path in ("none.npy", "good.npy"):
        with pytest.raises(UserError, match=path):
            load_npz(tmp_path / path)


def test_recursive_and_exploding_pickles(tmp_path):
    loop = []
    loop.append(loop)
    save_raw(tmp_path / "loop.npy", pickle.dumps(np.array([loop, 0], dtype=object)), shape=(2,))
    with pytest.raises(UserError, match="nested too deeply"):
        load_npy(tmp_path / "loop.npy")
    laughs = []
    for _ in range(100):
        laughs = [laughs, laughs]
    array = np.empty(1, dtype=object)
    array[0] = laughs
    save_raw(tmp_path / "laughs.npy", pickle.dumps(array), shape=(1,))
    assert len(load_npy(tmp_path / "laughs.npy")[0]) == 2
