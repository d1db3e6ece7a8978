"""dataset_utils.sources.own.annotation_file, against files that wfdb writes and against bytes made by hand."""

import numpy as np
import pytest

from dataset_utils.sources.own.annotation_file import Marks, parse
from dataset_utils.sources.own.signal_files import wfdb_annotations

KNOWN = {1: "N", 5: "V", 22: '"'}


def words(*pairs: tuple[int, int]) -> bytes:
    return b"".join((code << 10 | value).to_bytes(2, "little") for code, value in pairs)


END = words((0, 0))


def test_by_hand():
    # N 5 samples on, its channel; a skip of 0x12345 with its high half first, and V 3 samples further
    skip = words((59, 0)) + b"\x01\x00\x45\x23"
    assert parse(words((1, 5), (62, 1)) + skip + words((5, 3)) + END + b"rest", KNOWN) == Marks(
        [5, 5 + 0x12345 + 3], ["N", "V"], None
    )
    back = words((59, 0)) + b"\xff\xff\xfe\xff"  # -2
    assert parse(words((1, 5)) + back + words((1, 0)) + END, KNOWN).samples == [5, 3]
    assert parse(END, KNOWN) == Marks([], [], None)


def test_notes_at_the_beginning():
    def note(text: str) -> bytes:
        return words((22, 0), (63, len(text))) + text.encode() + b"\0" * (len(text) % 2)

    definitions = note("## annotation type definitions") + note("42 x odd beat") + note("## end of definitions")
    content = note("## time resolution: 12.5") + note("## a comment") + definitions + words((42, 7), (22, 1)) + END
    assert parse(content, KNOWN) == Marks([7, 8], ["x", '"'], 12.5)


@pytest.mark.parametrize("content", [b"", b"\x01", words((1, 5)), words((59, 0)) + b"\0", words((63, 4)) + b"text\0\0"])
def test_what_breaks_off(content):
    with pytest.raises(ValueError, match=r"breaks off|before the first"):
        parse(content, KNOWN)


def test_an_unknown_code():
    with pytest.raises(ValueError, match="code 42 has no symbol"):
        parse(words((42, 1)) + END, KNOWN)


def test_as_wfdb_reads_what_it_writes(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    samples = np.array([3, 900, 901, 5_000, 4_000_000])
    symbols = ["N", "V", "A", "+", "N"]
    notes = ["", "", "odd", "(AFIB", ""]
    wfdb.wrann("s1", "atr", samples, symbol=symbols, aux_note=notes, fs=360, write_dir=str(tmp_path))
    found, theirs = wfdb_annotations(tmp_path / "s1.atr"), wfdb.rdann(str(tmp_path / "s1"), "atr")
    np.testing.assert_array_equal(found.onset, samples / 360)
    assert found.labels == symbols == theirs.symbol and theirs.sample.tolist() == samples.tolist()
