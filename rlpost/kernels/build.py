"""Compiles the C files here, once a machine, with the compiler that is installed; without one there are no kernels.

The library lies in the user's cache folder under a name made of everything it depends on: sources, compiler, flags and
processor. A new version, or another machine with the same home folder, gets its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(f"{name}.c") for name in ("layers", "attention", "step", "sample"))
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("common", "pieces"))
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    # Nobody reads errno or the processor's exception flags; results are the same.
    *("-fno-math-errno", "-fno-trapping-math"),
)
SIGNATURES = {
    "norm": "pppfpppnnii",
    "norm_backward": "pppppppnnnii",
    "swiglu": "ppnnii",
    "swiglu_backward": "ppppnnii",
    "add": "pppnii",
    "cross_entropy": "pnpfppnnii",
    "cross_entropy_backward": "pnpfpppnnii",
    "attend": "pii",
    "attend_backward": "ppii",
    "step": "pii",
    "sample": "pnpfppnnii",
}
"""Of each function: p a pointer, n a 64-bit and i a 32-bit integer, f a float32."""
KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
SWITCH = "RLPOST_KERNELS"
"""Environment variable: 0 does without."""


class NoKernels(Exception):
    """There are none on this machine; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        NoKernels: there is no C compiler, or it cannot compile them.
    """
    if os.environ.get(SWITCH) == "0":
        raise NoKernels(f"{SWITCH} is 0")
    name, *options = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if (program := shutil.which(name)) is None:
        raise NoKernels("no C compiler: install one (cc), or name it in the variable CC")
    # A library that could not be kept is loaded from here; once loaded, its file is not needed.
    with tempfile.TemporaryDirectory(prefix="rlpost-kernels-") as work:
        try:
            found = ctypes.CDLL(str(_compiled([program, *options], Path(work))))
        except OSError as error:
            raise NoKernels(f"the library cannot be loaded: {error}") from None
    for name, kinds in SIGNATURES.items():
        getattr(found, name).argtypes = [KINDS[kind] for kind in kinds]
    return found


def why_none() -> str:
    """Why there are no kernels on this machine, or empty if there are."""
    try:
        library()
    except NoKernels as reason:
        return str(reason)
    return ""


def _compiled(compiler: Sequence[str], work: Path) -> Path:
    """The library, from the cache folder, or built there or in `work`."""
    name = f"kernels-{_key(compiler)}.so"
    try:
        folder = cache_folder()
        path = folder / name
        if path.is_file():
            return path
    except (OSError, RuntimeError):  # the user has no home folder, or one that cannot be read
        return _build(compiler, work)
    built = _build(compiler, work)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Two processes may do this at once: each moves a whole file of its own into place.
        own = folder / f"{name}.{os.getpid()}"
        shutil.copyfile(built, own)
        own.replace(path)
    except OSError:  # a folder that is full or read-only: compiled again the next time
        return built
    return path


def _build(compiler: Sequence[str], work: Path) -> Path:
    """Compile all files side by side, and link them."""
    objects = [work / f"{source.stem}.o" for source in SOURCES]
    running = [
        subprocess.Popen([*compiler, *FLAGS, "-c", str(source), "-o", str(to)], stderr=subprocess.PIPE)
        for source, to in zip(SOURCES, objects, strict=True)
    ]
    said = [process.communicate()[1] for process in running]
    built = work / "kernels.so"
    if not any(process.returncode for process in running):
        link = [*compiler, "-shared", "-fopenmp", *map(str, objects), "-lm", "-o", str(built)]
        said = [subprocess.run(link, stderr=subprocess.PIPE, check=False).stderr]
    if not built.is_file():
        lines = b"".join(said).decode(errors="replace").strip().splitlines()
        raise NoKernels(f"{compiler[0]} failed: {lines[0] if lines else 'it said nothing'}")
    return built


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rlpost"


def _key(compiler: Sequence[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    found = hashlib.sha256()
    for piece in (
        *(p.read_bytes() for p in (*SOURCES, *HEADERS)),
        version,
        " ".join([*compiler, *FLAGS]).encode(),
        _processor(),
    ):
        found.update(piece + b"\0")
    return found.hexdigest()[:16]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "features", "model", "cpu family", "cpu part")
    first = {key: line for line in reversed(lines) if (key := line.partition(":")[0].strip().lower()) in wanted}
    return "\n".join([platform.machine(), *(first[key] for key in sorted(first))]).encode()
