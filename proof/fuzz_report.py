"""The report of the fuzzers, as Markdown."""

from typing import Any

from lab.machine import shown_source

TITLES = {"core": "The pure core", "sockets": "Real sockets"}
Report = dict[str, dict[str, Any]]


def summary(report: Report) -> str:
    """Return a list item for each kind of fuzzing: inputs, speed, findings."""
    return "\n".join(f"- {_summary(kind, results)}" for kind, results in report.items())


def section(report: Report) -> str:
    """Return the same with tables of the inputs by target and by outcome."""
    parts = []
    for kind, results in report.items():
        parts.append(_summary(kind, results))
        for head, counts in (("target", results["targets"]), ("outcome", results["outcomes"])):
            if counts:
                lines = [f"| {name} | {count:,} |" for name, count in counts.items()]
                parts.append("\n".join([f"| {head} | inputs |", "| --- | ---: |", *lines]))
    return "\n\n".join(parts)


def _summary(kind: str, results: dict[str, Any]) -> str:
    speed = results["inputs"] / results["seconds"] if results["seconds"] else 0
    findings = (
        "1 finding" if results["findings"] == 1 else f"{results['findings'] or 'no'} findings"
    )
    command = f"bin/fuzz {kind} --inputs {results['inputs']} --seed {results['seed']}"
    text = f"**{TITLES[kind]}** (`{command}`): {results['inputs']:,} inputs "
    text += f"in {results['seconds']:,.0f} s, {speed:,.0f} a second; "
    text += "; ".join([findings, *shown_source(results)]) + "."
    guided = results.get("guided")
    if isinstance(guided, dict):
        text += f" {guided['inputs']:,} more were guided by coverage."
    elif guided:
        text += f" Guided by coverage: {guided}."
    return f"{text} {results.get('note', '')}".strip()
