"""What `gpu_check` found, for people: the verdicts on what must be shown, a table of times, what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .journal import Journal

# What was set out to be shown, before any card had been seen. Eager PyTorch forms the attention matrix; the rate is of
# large matrix products in the same dtype, measured on the same card.
SPEEDUP_OVER_EAGER, SPEEDUP_OVER_UNPRUNED, SHARE_OF_RATE, REBUILD = 5.0, 1.3, 0.45, 3.0
EAGER = "torch full, matrix formed"
SHOWN = ("torch", "tensorrt", "tensorrt_cu13_bindings", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu")


def summarise(journal: Journal) -> dict[str, Any]:
    """{"rows": one for each engine measured, "verdicts": [{what, value, limit, passed}], "left_out": step -> why}.

    passed is None where nothing was measured; in quick mode times mean nothing. Limits: the constants above for times,
    bit-equality for CUDA graphs and threads, no growth of memory, equal first tokens, the tolerances of docs/parity.md.
    """
    rows = [row for entry in journal.steps if entry["status"] == "done" for row in _rows(entry)]
    left_out = {entry["name"]: entry["reason"] for entry in journal.steps if entry["status"] != "done"}
    return {"rows": rows, "verdicts": list(_verdicts(journal, rows)), "left_out": left_out}


def _rows(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    result = entry["result"]
    if "main" not in result:
        return
    parity = (result.get("parity") or [{}])[0]
    for name, time in result["times"].items():
        main = name == result["main"]
        yield {
            "step": entry["name"], "engine": name, **time,
            "times_slower_than_main": 1.0 if main else result["speedup"][name],
            "share_of_matrix_rate": result["share_of_matrix_rate"] if main else None,
            "cosine": parity.get("cosine") if main else None,
            "patches_equal": parity.get("patches_equal") if main else None,
        }


def _verdicts(journal: Journal, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    quick = journal.content["quick"]

    def verdict(what: str, value: float | None, limit: float, *, time: bool = False, most: bool = False) -> Any:
        passed = None if value is None or (time and quick) else (value <= limit if most else value >= limit)
        return {"what": what, "value": value, "limit": limit, "passed": passed}

    main = next((e["name"] for e in journal.steps if e["name"].startswith("tensorrt ")), "")
    engine = journal.result(main) or {}
    over_eager = engine.get("speedup", {}).get(EAGER)
    yield verdict("TensorRT pruned is so many times as fast as eager PyTorch full", over_eager, SPEEDUP_OVER_EAGER,
                  time=True)
    unpruned, rebuild = journal.result("unpruned") or {}, journal.result("rebuild") or {}
    yield verdict("... as TensorRT unpruned", unpruned.get("speedup"), SPEEDUP_OVER_UNPRUNED, time=True)
    yield verdict("... and reaches this share of the card's matrix rate", engine.get("share_of_matrix_rate"),
                  SHARE_OF_RATE, time=True)
    yield verdict("building from the timing cache is so many times as fast as from none", rebuild.get("speedup"),
                  REBUILD, time=True)
    graph = journal.result("graph") or {}
    yield verdict("replay of the CUDA graph is bit-equal to plain execution", _truth(graph.get("bit_equal")), 1)
    yield verdict("two threads at once get the same answers", _truth(graph.get("threads_equal")), 1)
    memory = journal.result("memory") or {}
    yield verdict(f"growth of device memory over {memory.get('runs', 1000)} runs, bytes", memory.get("growth_bytes"), 0,
                  most=True)
    demo = journal.result("demo") or {}
    yield verdict("first token of the demo is equal between engines", _truth(demo.get("equal")), 1)
    for entry in journal.steps:
        if entry["status"] == "done" and entry["name"] != "unpruned":
            yield from _parity_verdicts(entry, verdict)


def _parity_verdicts(entry: dict[str, Any], verdict: Any) -> Iterator[dict[str, Any]]:
    result = entry["result"]
    for hop in result["parity"] if isinstance(result.get("parity"), list) else [result] if "cosine" in result else []:
        where = f"{entry['name']}: {hop['reference']} → {hop['actual']}"
        found = verdict(f"{where}, within the tolerances of its dtype", _truth(hop["passed"]), 1)
        yield found | {"cosine": hop.get("cosine"), "patches_equal": hop.get("patches_equal"),
                       "reasons": hop["reasons"]}


def _truth(value: bool | None) -> float | None:
    return None if value is None else float(value)


def render(content: dict[str, Any]) -> str:
    """The JSON file as a text of tables."""
    machine, summary = content["machine"], content["summary"]
    card, versions = "no CUDA device", machine["versions"]
    if machine["card"]:
        card = f"{machine['card']} ({machine['target']}), driver {machine['driver']}"
    shown = (name for name in SHOWN if name in versions)
    tools = ", ".join(f"{name} {versions[name]}" for name in shown)
    lines = [f"{card}; {tools}; {content['seconds']:.0f} s{'; quick: times mean nothing' if content['quick'] else ''}"]
    before, after = (content["clocks"].get(when, {}) for when in ("before", "after"))
    if before:
        lines.append(f"SM clock {before.get('sm_mhz')} MHz before, {after.get('sm_mhz')} MHz after")
    lines += ["", *_table(summary["rows"])] if summary["rows"] else []
    lines += ["", "shown:"]
    for verdict in summary["verdicts"]:
        mark = {True: "yes", False: "NO ", None: " - "}[verdict["passed"]]
        value = "not measured" if verdict["value"] is None else f"{verdict['value']:.4g} (limit {verdict['limit']:g})"
        lines.append(f"  {mark}  {verdict['what']}: {value}")
        lines += [f"         {reason}" for reason in verdict.get("reasons", [])]
    if summary["left_out"]:
        lines += ["", "left out:"] + [f"  {name}: {why}" for name, why in summary["left_out"].items()]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("step", "engine", "median ms", "min", "max", "against", "of rate", "cosine", "patches")
    cells = [head]
    for row in rows:
        numbers = (row["median_ms"], row["minimum_ms"], row["maximum_ms"])
        rate, cosine, patches = row["share_of_matrix_rate"], row["cosine"], row["patches_equal"]
        cells.append((
            row["step"], row["engine"], *(f"{n:.2f}" for n in numbers), f"{row['times_slower_than_main']:.2f}x",
            "" if rate is None else f"{rate:.0%}", "" if cosine is None else f"{cosine:.6f}",
            "" if patches is None else f"{patches:.2%}",
        ))
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(head))]
    return [
        "  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(cell, widths))).rstrip()
        for cell in cells
    ]
