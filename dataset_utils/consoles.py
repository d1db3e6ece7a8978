"""Output to consoles whose encoding lacks some characters."""

from __future__ import annotations

import io
import sys


def safe_output() -> None:
    """Let stdout and stderr print '?' for characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
