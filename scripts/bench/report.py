"""What was measured as tables, for the terminal and as Markdown, and as a picture."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from growth import exponents
from memory import MEMORY

MARKS = ("<!-- written by scripts/bench.py --docs -->", "<!-- until here -->")
PEERS = ("TRL defaults", "TRL tuned")
COLOURS = {"rlpost": "#2563eb", "TRL defaults": "#d97706", "TRL tuned": "#9ca3af", "vLLM": "#9ca3af"}


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, tuple("---" if i == 0 else "---:" for i in range(len(self.columns))), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def show(self) -> None:
        """Print it."""
        from rich.console import Console
        from rich.table import Table as Rich

        table = Rich(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        # Into a file or a pipe, lines are as wide as they need.
        (console if console.is_terminal else Console(width=160)).print(table)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import torch
    from limit import LARGE, bandwidth, throughput

    speeds = {kind: throughput(LARGE, kind) / 1e9 for kind in ("float32", "bfloat16")}
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "large products": ", ".join(f"{kind} {speed:.0f} GFLOP/s" for kind, speed in speeds.items()),
        "memory is read at": f"{bandwidth() / 1e9:.1f} GB/s",
        "rlpost": f"{version('rlpost')} at {_commit()}",
        "torch, transformers": f"{version('torch')}, {version('transformers')}",
        "Python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "its bfloat16"}
    kinds = [label for flag, label in known.items() if flag in flags]
    cores = sum(line.startswith("processor") for line in lines)
    return f"{cores} cores of {name}" + (f", with {', '.join(kinds)}" if kinds else "")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "?"


def tables(found: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Of everything that was measured."""
    compared = [one for one in found if "seconds" in one and "times" in one]
    if compared:
        columns = ("workload", "in", "rlpost", "TRL at its defaults", "TRL tuned", "tuned is", "of the limit")
        yield Table("How many times as fast as TRL: median (quartiles)", columns, [_compared(one) for one in compared])
    peaks = [one for one in found if "TRL defaults" in one.get("peak_gib", {})]
    if peaks:
        columns = ("workload", "rlpost", "TRL at its defaults", "TRL tuned", "of defaults", "of tuned")
        yield Table("Peak memory of the process, GiB", columns, [_peak(one) for one in peaks])
    for one in found:
        if one["workload"] == "decode":
            yield _decode(one)
        if one["workload"] == "start":
            bars = one["bars"]
            rows = [(name, f"{s:.2f} s", f"{bars[name]:g} s") for name, s in one["seconds"].items()]
            yield Table("Start", ("command", "median", "meant to be below"), rows)
        if one["workload"] == "growth":
            yield Table("Growth", ("what", "sizes", "seconds", "GiB", "largest exponent"), _growth(one))


def _compared(one: dict[str, Any]) -> tuple[str, ...]:
    rate = one["rate"]["rlpost"]
    cells = [f"{t['median']:.2f}× ({t['low']:.2f}–{t['high']:.2f})" for t in (one["times"][peer] for peer in PEERS)]
    share = f"{one['share']:.0%}" if "share" in one else "–"
    return (
        one["workload"],
        one["precision"],
        f"{rate:,.{0 if rate >= 100 else 1}f} {one['unit']}/s",
        *cells,
        one["trl_tuned"],
        share,
    )


def _peak(one: dict[str, Any]) -> tuple[str, ...]:
    own, defaults, tuned = (one["peak_gib"][label] for label in ("rlpost", *PEERS))
    name = one["workload"].removeprefix(MEMORY)
    return (name, *(f"{gib:.2f}" for gib in (own, defaults, tuned)), f"{own / defaults:.2f}×", f"{own / tuned:.2f}×")


def _decode(one: dict[str, Any]) -> Table:
    about, times = one["about"], one.get("times", {})
    rows = [("rlpost", f"{one['rate']['rlpost']:,.0f}", f"{one['share']:.0%}", "")]
    if "vLLM" in times:
        t = times["vLLM"]
        ratio = f"{t['median']:.2f}× ({t['low']:.2f}–{t['high']:.2f})"
        rows.append(("vLLM, CPU build", f"{one['rate']['vllm']:,.0f}", "", ratio))
    title = f"Sampling {about['rows']} rows of the {about['size']} model, context {about['context'][0]} to "
    return Table(title + str(about["context"][1]), ("engine", "tokens/s", "of the limit", "rlpost is"), rows)


def _growth(one: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for line in one["lines"]:
        steepest = max(exponents(line["values"], line["seconds"]))
        shown = ("values", "{:,}"), ("seconds", "{:.3g}"), ("peak_gib", "{:.2f}")
        cells = (", ".join(form.format(x) for x in line[key]) for key, form in shown)
        rows.append((line["axis"], *cells, f"{steepest:.2f}"))
    return rows


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """A picture: ratios with their quartiles, memory, and growth."""
    from matplotlib.figure import Figure

    compared = [one for one in found if "times" in one and "seconds" in one]
    lines = next((one["lines"] for one in found if one["workload"] == "growth"), [])
    panels = 2 * bool(compared) + 2 * bool(lines)
    if not panels:
        return
    rows = panels // 2
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    if compared:
        _draw_ratios(axes[0][0], compared)
        _draw_peaks(axes[0][1], compared)
    if lines:
        _draw_growth(axes[-1][0], axes[-1][1], lines)
    figure.savefig(file, dpi=110)


def _draw_ratios(ax: Any, compared: Sequence[dict[str, Any]]) -> None:
    for offset, peer in ((-0.2, PEERS[0]), (0.2, PEERS[1])):
        times = [one["times"][peer] for one in compared]
        medians = [t["median"] for t in times]
        spread = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
        places = [i + offset for i in range(len(compared))]
        ax.barh(places, medians, 0.38, xerr=spread, label=f"against {peer}", color=COLOURS[peer])
        for place, t in zip(places, times, strict=True):
            ax.text(t["high"], place, f"  {t['median']:.1f}×", va="center", fontsize=9)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(compared)), [f"{one['workload']}\n{one['precision']}" for one in compared], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("times as fast (median, quartiles)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, frameon=False)
    ax.margins(x=0.15)


def _draw_peaks(ax: Any, compared: Sequence[dict[str, Any]]) -> None:
    labels = ("rlpost", *PEERS)
    for i, label in enumerate(labels):
        places = [n + 0.27 * (i - 1) for n in range(len(compared))]
        ax.barh(places, [one["peak_gib"][label] for one in compared], 0.25, label=label, color=COLOURS[label])
    ax.set_yticks(range(len(compared)), [f"{one['workload']}\n{one['precision']}" for one in compared], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("peak memory of the process, GiB")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)


def _draw_growth(seconds: Any, memory: Any, lines: Sequence[dict[str, Any]]) -> None:
    """All sizes from the same point, so that slopes can be compared."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    styles = {"update": "-", "sampling": "--"}
    for i, line in enumerate(lines):
        sizes = [value / line["values"][0] for value in line["values"]]
        drawn = {"marker": "o", "markersize": 3, "color": f"C{i}", "label": line["axis"]}
        drawn["linestyle"] = styles.get(line["axis"].partition(",")[0], ":")
        seconds.plot(sizes, [s / line["seconds"][0] for s in line["seconds"]], **drawn)
        memory.plot(sizes, line["peak_gib"], **drawn)
    seconds.plot([1, 100], [1, 100], color="black", linewidth=0.6, label="in proportion")
    seconds.set(yscale="log", ylabel="seconds, as multiples of the first")
    memory.set(ylabel="peak memory, GiB", ylim=(0, None))
    for ax in (seconds, memory):
        ax.set(xscale="log", xlabel="size, as multiples of the first")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.grid(True, alpha=0.3)
    seconds.yaxis.set_major_formatter(ScalarFormatter())
    seconds.yaxis.set_minor_formatter(NullFormatter())
    seconds.figure.legend(*seconds.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def write(found: Sequence[dict[str, Any]], about: dict[str, str], folder: Path) -> None:
    """bench.json, bench.md and bench.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"machine": about, "measured": list(found)}, indent=1) + "\n")
    head = "".join(f"- {name}: {value}\n" for name, value in about.items())
    parts = [f"{head}\n", *(f"{table.markdown()}\n" for table in tables(found))]
    (folder / "bench.md").write_text("".join(parts))
    draw(found, folder / "bench.png")


def publish(folder: Path, page: Path) -> None:
    """Put bench.md between the page's two marks, and bench.png beside its pictures."""
    text = page.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    results = (folder / "bench.md").read_text()
    page.write_text(f"{text[: begin + len(MARKS[0])]}\n\n{results}{text[end:]}")
    if (folder / "bench.png").exists():
        (page.parent / "images/benchmarks.png").write_bytes((folder / "bench.png").read_bytes())
