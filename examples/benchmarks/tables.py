"""Markdown from the JSON of ``compare.py``: nothing here measures."""

from __future__ import annotations

from statistics import median
from typing import Any

ARMS = ("eager", "inductor", "effpass")
HEADER = (
    "| | eager | torch.compile | effpass | vs eager | vs torch.compile | largest difference |",
    "|---|--:|--:|--:|--:|--:|--:|",
)
COST_HEADER = (
    "| | arm | first call | resident at the peak | of it added by the call |",
    "|---|---|--:|--:|--:|",
)
LENGTH_HEADER = (
    "| tokens | first call | then | a token | graphs so far |",
    "|--:|--:|--:|--:|--:|",
)
SCAN_GOAL = 0.45  # of the time of one linear
GROWTH_GOAL = 1.25  # time a token, longest over second length: linear


def between(page: str, begin: str, end: str, body: str) -> str:
    """``page`` with ``body`` between two markers; ValueError without them."""
    head, found, rest = page.partition(begin)
    _, also, tail = rest.partition(end)
    if not found or not also:
        raise ValueError(f"expected {begin} and {end} in the page, found them missing")
    return f"{head}{begin}\n{body}\n{end}{tail}"


def table(result: dict[str, Any]) -> str:
    """The rows, with speed-ups, their goals where there are any, and parity with eager."""
    return "\n".join([*HEADER, *(_row(row) for row in result["rows"])])


def summary(result: dict[str, Any]) -> str:
    """One sentence: where and with what the rows were measured."""
    at, rounds = result["setting"], result["settings"]["rounds"]
    versions = at["versions"]
    return (
        f"{at['cpu']}, {at['threads']} threads, float32, medians over {rounds} turns; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"effpass {versions['effpass']} at {at['commit'][:10]}, {at['date'][:10]}."
    )


def page(result: dict[str, Any]) -> str:
    """The whole page: rows, memory, first calls, checks, setting."""
    parts = ["# Measured", summary(result), table(result)]
    if result["settings"]["quick"]:
        parts.insert(1, "**A smoke test with tiny sizes: these numbers mean nothing.**")
    timed = [row for row in result["rows"] if row["unit"] == "median_ms"]
    parts += ["## Memory and first calls", _costs(timed)] if timed else []
    lines = [text(result["checks"][n]) for n, text in _CHECKS.items() if n in result["checks"]]
    parts += ["## effpass with itself", *lines] if lines else []
    return "\n\n".join([*parts, "## Setting", *_setting(result["setting"])]) + "\n"


def _setting(at: dict[str, Any]) -> tuple[str, str]:
    uncommitted = " with uncommitted changes" if at["uncommitted"] else ""
    return (
        f"`{at['command']}`, commit {at['commit']}{uncommitted}, {at['date']}, Python "
        f"{at['versions']['python']}, {at['system']}, {at['cores']} cores, load "
        f"{at['load']:.1f} at the start, {at['compiler']}.",
        "Each arm is a process of its own that starts with empty caches; the arms take turns. "
        "The difference is the largest one over the largest value, against eager (of the cold "
        "compile: against torch.compile); with training, also that of the worst gradient. A cold "
        "compile starts without Inductor's cache, its precompiled header and effpass's kernels.",
    )


def _row(row: dict[str, Any]) -> str:
    cells = [_time(row["arms"].get(arm), row["unit"]) for arm in ARMS]
    speedups = [_speedup(row[f"vs_{arm}"]) for arm in ("eager", "inductor")]
    parity = row["parity"].get("effpass", {})
    differences = ", ".join(
        f"{value:.0e}" + (" (gradients)" if kind == "gradients" else "")
        for kind, value in parity.items()
    )
    return f"| {' | '.join([row['title'], *cells, *speedups, differences])} |"


def _time(arm: dict[str, Any] | None, unit: str) -> str:
    if arm is None:
        return ""
    if unit not in arm:
        return "failed"
    seconds = arm[unit] if unit == "median_s" else arm[unit] / 1e3
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"


def _speedup(found: dict[str, Any]) -> str:
    if found["speedup"] is None:
        return ""
    goal = "" if found["goal"] is None else f" (goal {found['goal']:g}x: {_met(found['met'])})"
    return f"**{found['speedup']:.2f}x**{goal}"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _costs(rows: list[dict[str, Any]]) -> str:
    lines = list(COST_HEADER)
    for row in rows:
        for name, arm in row["arms"].items():
            first = f"{arm['first_call_s']:.1f} s" if "first_call_s" in arm else ""
            if "error" in arm:
                first = f"failed: {arm['error']}".replace("|", "/").replace("\n", " ")
            memory = [_mib(arm.get(key)) for key in ("peak_mib", "added_mib")]
            lines.append(f"| {' | '.join([row['title'], name, first, *memory])} |")
    return "\n".join(lines)


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} MiB"


def _scan_alone(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"`selective_scan` alone: failed: {found['error']}"
    scan, linear = median(found["scan_ms"]), median(found["linear_ms"])
    return (
        f"`selective_scan` alone (1 x 512 x 1536, 16 states): {scan:.2f} ms; one `linear` "
        f"512 x 768 -> 3072: {linear:.2f} ms. {scan / linear:.2f} of it "
        f"(goal {SCAN_GOAL}: {_met(scan / linear <= SCAN_GOAL)})."
    )


def _scan_memory(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"Memory of `selective_scan`: failed: {found['error']}"
    if found["added_mib"] is None:
        return "Memory of `selective_scan`: not measured, /proc/self/clear_refs is not to be had."
    met = found["added_mib"] < found["full_mib"] / 2
    return (
        f"`selective_scan` of 4096 tokens adds {found['added_mib']:.0f} MiB at its peak, "
        f"{found['result_mib']:.0f} MiB of them its results; a tensor (b, t, d, n) would take "
        f"{found['full_mib']:.0f} MiB (goal, never one: {_met(met)})."
    )


def _lengths(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"New lengths: failed: {found['error']}"
    lines = ["Mamba-1, one new length after the other:", "", *LENGTH_HEADER]
    for row in found["rows"]:
        each = 1e3 * row["median_ms"] / row["tokens"]
        lines.append(
            f"| {row['tokens']} | {row['first_call_s']:.2f} s | {row['median_ms']:.1f} ms "
            f"| {each:.0f} us | {row['graphs']} |"
        )
    second, last = found["rows"][1], found["rows"][-1]
    growth = last["median_ms"] / last["tokens"] / (second["median_ms"] / second["tokens"])
    more = last["graphs"] - second["graphs"]
    return "\n".join(lines) + (
        f"\n\nTime a token at {last['tokens']} over that at {second['tokens']}: {growth:.2f} "
        f"(goal, linear: at most {GROWTH_GOAL}: {_met(growth <= GROWTH_GOAL)}). Graphs compiled "
        f"after the second length: {more} (goal 0: {_met(more == 0)})."
    )


_CHECKS = {"scan_alone": _scan_alone, "scan_memory": _scan_memory, "lengths": _lengths}
