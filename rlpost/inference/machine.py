"""What this machine and this installation offer to training: versions, devices, precision, memory; `rlpost doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from rlpost.kernels.build import why_none
from rlpost.run.environment import versions
from rlpost.sandbox.levels import why_not
from rlpost.sandbox.outcome import Level

NO_EXTRAS = ("dev", "docs")
"""Extras for work on rlpost itself."""
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")
_UNUSABLE = "torch cannot be imported"


@dataclass(frozen=True)
class Package:
    """A package that rlpost, or one of its extras, needs."""

    name: str
    needs: str
    """Versions that will do, like `>=2.10`; empty: any."""
    found: str | None
    """The version installed; None without one."""
    ok: bool


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in bytes."""

    name: str
    total: int
    free: int
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """All that `rlpost doctor` says; memory in bytes, None where the system does not tell."""

    versions: dict[str, str]
    platform: str
    packages: list[Package]
    """Those that rlpost cannot do without."""
    extras: dict[str, list[Package]]
    """Optional ones, by extra."""
    cpus: int
    """Those that this process may use."""
    threads: int | None
    """What torch takes unless a recipe says `threads`."""
    gpus: list[Gpu]
    precision: str | None
    """What `model.precision: auto` is here."""
    no_kernels: str
    """Why layers are not compiled for the CPU; empty where they are."""
    sandbox: dict[str, str]
    """For each level at which programs of a model can be run, why it does not hold; empty where it does."""
    memory: int | None
    """Of the machine, or what its container may take."""
    memory_free: int | None
    disk_free: int
    """In the current folder."""
    problems: list[str] = field(default_factory=list)
    """What keeps rlpost from working, each with its remedy."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def examine() -> Machine:
    """Look at the machine and the installation; nothing is written, and no model is loaded."""
    needed, extras = requirements()
    problems = [f"{p.name}: {_lacks(p)}; pip install '{p.name}{p.needs}'" for p in needed if not p.ok]
    threads: int | None = None
    gpus: list[Gpu] = []
    precision: str | None = None
    try:
        threads, gpus, precision = _by_torch()
    except (ImportError, OSError) as error:  # OSError: a library below torch is missing
        problems.append(f"{_UNUSABLE}: {str(error).splitlines()[0]}; install it again for this machine")
    total, free = memory()
    return Machine(
        versions=versions(),
        platform=platform.platform(),
        packages=needed,
        extras=extras,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        gpus=gpus,
        precision=precision,
        no_kernels=why_none(),
        sandbox={str(level): why_not(level) for level in Level},
        memory=total,
        memory_free=free,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        problems=problems,
    )


def requirements() -> tuple[list[Package], dict[str, list[Package]]]:
    """What rlpost says it needs, and for each extra what that needs; nothing where rlpost is not installed."""
    try:
        said = [Requirement(line) for line in metadata.requires("rlpost") or []]
    except metadata.PackageNotFoundError:
        return [], {}
    named = (re.findall(r"extra == ['\"]([\w-]+)['\"]", str(r.marker or "")) for r in said)
    extras = dict.fromkeys(name for names in named for name in names if name not in NO_EXTRAS)
    needed = [_package(r) for r in said if r.marker is None or r.marker.evaluate({"extra": ""})]
    of_extra = {
        name: [_package(r) for r in said if "extra" in str(r.marker) and _applies(r, name)] for name in sorted(extras)
    }
    return needed, of_extra


def memory() -> tuple[int | None, int | None]:
    """(all, free) memory of the machine in bytes; a container's limit where that is less."""
    if not _MEMINFO.is_file():
        return None, None
    found = {k: int(v) * 1024 for k, v in re.findall(r"(\w+):\s+(\d+) kB", _MEMINFO.read_text("ascii"))}
    total, free = found.get("MemTotal"), found.get("MemAvailable")
    for file in _CGROUP:
        limit = file.read_text("ascii").strip() if file.is_file() else ""
        if limit.isdigit() and total is not None and int(limit) < total:
            total = int(limit)
            free = min(free, total) if free is not None else None
    return total, free


def text(machine: Machine) -> str:
    """The same for a person, in lines."""
    python, own = machine.versions["python"], machine.versions["rlpost"]
    lines = [("rlpost", f"{own}, Python {python}, {machine.platform}")]
    lines.append(("packages", ", ".join(f"{p.name} {p.found or 'missing'}" for p in machine.packages) or "unknown"))
    for gpu in machine.gpus:
        half = "bfloat16" if gpu.bfloat16 else "no bfloat16"
        lines.append(("GPU", f"{gpu.name}, {_size(gpu.total)}, {_size(gpu.free)} free, {half}"))
    if not machine.gpus:
        lines.append(("GPU", "none; training runs on the CPU"))
    threads = f", torch takes {machine.threads} threads" if machine.threads is not None else ""
    lines.append(("CPU", f"{machine.cpus} cores{threads}"))
    lines.append(("precision", f"{machine.precision or 'unknown'} (what `model.precision: auto` is here)"))
    lines.append(
        ("CPU layers", f"not compiled, which is slower: {machine.no_kernels}" if machine.no_kernels else "compiled")
    )
    levels = {level: why for level, why in machine.sandbox.items() if level != Level.rlimits}  # which is none
    lines.append(("sandbox", "; ".join(f"{level}: {why or 'holds'}" for level, why in levels.items())))
    lines.append(("memory", f"{_size(machine.memory)}, {_size(machine.memory_free)} free"))
    lines.append(("disk", f"{_size(machine.disk_free)} free in this folder"))
    for name, packages in machine.extras.items():
        have = ", ".join(f"{p.name} {p.found}" for p in packages)
        lines.append((f"[{name}]", have if all(p.ok for p in packages) else _missing(name, packages)))
    width = max(len(title) for title, _ in lines)
    shown = [f"{title:<{width}}  {said}" for title, said in lines]
    return "\n".join([*shown, *(f"problem: {line}" for line in machine.problems)])


def _by_torch() -> tuple[int, list[Gpu], str]:
    """Threads, GPUs and the precision that a run would decide on."""
    import torch

    from rlpost.policy.load import decide_bfloat16
    from rlpost.policy.params import Precision

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            half = decide_bfloat16(Precision.auto, "cuda")
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free, half))
    half = decide_bfloat16(Precision.auto, "cuda" if gpus else "cpu")
    return torch.get_num_threads(), gpus, "bfloat16" if half else "float32"


def _package(requirement: Requirement) -> Package:
    try:
        found: str | None = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        found = None
    ok = found is not None and requirement.specifier.contains(found, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), found, ok)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _missing(extra: str, packages: list[Package]) -> str:
    old = [f"{p.name} {_lacks(p)}" for p in packages if p.found and not p.ok]
    return f"{'; '.join(old) or 'not installed'}: pip install 'rlpost[{extra}]'"


def _lacks(package: Package) -> str:
    return f"{package.found} is installed, {package.needs} is needed" if package.found else "not installed"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
