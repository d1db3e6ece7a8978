"""Reader of WFDB annotation files, such as 100.atr.

The format is that of annot(5) in the WFDB Applications Guide: pairs of bytes, little-endian, of a code (6 bits) and a
value (10 bits). wfdb's own reader never ends on a file whose first notes begin with '## ' and are not those it knows.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

NOT_ONE, NOTE, SKIP, OF_LAST, AUX = 0, 22, 59, (60, 61, 62), 63
"""Codes: no annotation, a comment, a long interval, values of the annotation before, and its text."""
RATE = re.compile(r"## time resolution: ([0-9]+\.?[0-9]*)")
BEGIN, END = "## annotation type definitions", "## end of definitions"
DEFINITION = re.compile(r"([0-9]+) (\S+) .+")


class Marks(NamedTuple):
    """Annotations of a record.

    Attributes:
        samples: sample numbers.
        symbols: symbols of their kinds, such as 'N'.
        rate: rate that the sample numbers count in, Hz; None for that of the record.
    """

    samples: list[int]
    symbols: list[str]
    rate: float | None


def parse(content: bytes, known: dict[int, str]) -> Marks:
    """Return the annotations in a file.

    Args:
        content: the file's bytes.
        known: code -> symbol; the file may define others.

    Raises:
        ValueError: the file breaks off, or has a code without a symbol.
    """
    samples: list[int] = []
    codes: list[int] = []
    texts: list[str] = []
    sample = place = 0
    while (word := _word(content, place)) != 0:
        code, value, place = word >> 10, word & 0x3FF, place + 2
        if code == SKIP:
            high, low = _word(content, place), _word(content, place + 2)
            sample, place = sample + struct.unpack("<i", struct.pack("<I", high << 16 | low))[0], place + 4
        elif code == AUX:
            text, place = content[place : place + value], place + value + value % 2
            if not texts:
                raise ValueError("a text before the first annotation")
            texts[-1] = text.decode("latin-1").rstrip("\0")
        elif code not in OF_LAST:
            sample += value
            samples.append(sample)
            codes.append(code)
            texts.append("")
    return _named(samples, codes, texts, dict(known))


def _named(samples: list[int], codes: list[int], texts: list[str], symbols: dict[int, str]) -> Marks:
    """Return the annotations that mark something; comments at sample 0 may state the rate and define symbols."""
    rate, kept, defining = None, [], False
    for index, (sample, code, text) in enumerate(zip(samples, codes, texts, strict=True)):
        if sample == 0 and code == NOTE:
            if hit := RATE.match(text):
                rate = float(hit[1])
            defining = text == BEGIN or (defining and text != END)
            if defining and (hit := DEFINITION.fullmatch(text)):
                symbols[int(hit[1])] = hit[2]
        elif code != NOT_ONE:
            kept.append(index)
    unknown = next((codes[index] for index in kept if codes[index] not in symbols), None)
    if unknown is not None:
        raise ValueError(f"code {unknown} has no symbol")
    return Marks([samples[index] for index in kept], [symbols[codes[index]] for index in kept], rate)


def _word(content: bytes, place: int) -> int:
    if len(content) < place + 2:
        raise ValueError("it breaks off")
    return content[place] | content[place + 1] << 8
