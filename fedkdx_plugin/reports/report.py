"""tmp"""

from pathlib import Path


def write(folders, out, title, about=""):
    return Path(out) / "report.html"
