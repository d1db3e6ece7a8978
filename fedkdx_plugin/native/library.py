"""The library of compiled operations.

A C compiler (`CC`, or `cc`) makes it once on each machine, in about three seconds; it is kept in the user's cache
folder. Without a compiler, or with FEDKDX_FUSED=0, PyTorch's own operations are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SWITCH = "FEDKDX_FUSED"
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
OF_THIS_PROCESSOR = "-march=native"
SECONDS = 60  # time limit of the compiler

POINTER, SIZE, DOUBLE = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double
SIGNATURES = {
    "chain_sizes": [POINTER, SIZE, SIZE, SIZE, POINTER, POINTER],
    "chain_forward": [POINTER, SIZE, POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, POINTER, POINTER],
    "chain_backward": [POINTER, SIZE, POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, *[POINTER] * 6],
    "mutual_losses": [POINTER, POINTER, POINTER, SIZE, SIZE, *[DOUBLE] * 4, *[POINTER] * 4],
    "contrastive_loss": [POINTER, POINTER, SIZE, SIZE, DOUBLE, DOUBLE, *[POINTER] * 3],
    "clip_and_move": [SIZE, POINTER, POINTER, POINTER, DOUBLE, DOUBLE],
}
RESULTS = {"contrastive_loss": DOUBLE}

_left_out = False


def operations() -> ctypes.CDLL | None:
    """Return the compiled operations; None if they are switched off or cannot be made."""
    return None if _left_out else _library()


def required() -> ctypes.CDLL:
    """Return the compiled operations where `operations` has been found to give some.

    Raises:
        RuntimeError: there are none.
    """
    found = operations()
    if found is None:
        raise RuntimeError("the compiled operations are switched off or cannot be made; ask `operations` first")
    return found


@contextmanager
def left_out() -> Iterator[None]:
    """Disable the compiled operations in the block, as `torch.vmap` cannot transform them."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return opened(_compiled())
    except (OSError, subprocess.SubprocessError):
        return None


def opened(path: Path) -> ctypes.CDLL:
    """Open the library at a path. Raises OSError if it is none."""
    found = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    return found


def _compiled() -> Path:
    """Return the path of the library, after making it if it is missing. Raises OSError or SubprocessError."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        raise FileNotFoundError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    kind = "\n".join((platform.machine(), _processor(), compiler, *FLAGS)).encode()
    text = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]")))
    key = hashlib.sha256(text + version + kind).hexdigest()[:16]
    folder = cache_folder()
    path = folder / f"fused-{key}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            make(compiler, path)
        except OSError:  # the folder is not writable: made for this process only
            path = Path(tempfile.mkdtemp(prefix="fedkdx-")) / path.name
            make(compiler, path)
    return path


def cache_folder() -> Path:
    """Return the folder that keeps compiled code between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedkdx"


def make(compiler: str, path: Path, processors: Sequence[Sequence[str]] = ([OF_THIS_PROCESSOR], [])) -> None:
    """Compile the library.

    Args:
        compiler: command of the compiler.
        path: file to write.
        processors: options for the processor, tried one after the other, as some compilers do not know the first.

    Raises:
        OSError or SubprocessError: it cannot be made.
    """
    part = path.with_suffix(f".{os.getpid()}.part")
    sources = sorted(map(str, FOLDER.glob("*.c")))
    try:
        for processor in processors:
            command = [compiler, *FLAGS, *processor, "-o", str(part), *sources, "-lm"]
            if subprocess.run(command, capture_output=True, timeout=SECONDS).returncode == 0:
                part.replace(path)
                return
        raise subprocess.CalledProcessError(1, command)
    finally:
        part.unlink(missing_ok=True)


def _processor() -> str:
    """Return what the library's instructions depend on, as several machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
