"""The report of the fuzzers, as Markdown."""

from typing import Any

TITLES = {"core": "The pure core", "sockets": "Real sockets"}
Report = dict[str, dict[str, Any]]


def summary(report: Report) -> str:
    """Return a list item for each kind of fuzzing: inputs, speed, findings."""
    return "\n".join(f"- {_summary(kind, told)}" for kind, told in report.items())


def section(report: Report) -> str:
    """Return the same with tables of the inputs by target and by outcome."""
    parts = []
    for kind, told in report.items():
        parts.append(_summary(kind, told))
        for head, counts in (("target", told["targets"]), ("outcome", told["outcomes"])):
            if counts:
                lines = [f"| {name} | {count:,} |" for name, count in counts.items()]
                parts.append("\n".join([f"| {head} | inputs |", "| --- | ---: |", *lines]))
    return "\n\n".join(parts)


def _summary(kind: str, told: dict[str, Any]) -> str:
    speed = told["inputs"] / told["seconds"] if told["seconds"] else 0
    findings = "1 finding" if told["findings"] == 1 else f"{told['findings'] or 'no'} findings"
    command = f"bin/fuzz {kind} --inputs {told['inputs']} --seed {told['seed']}"
    text = f"**{TITLES[kind]}** (`{command}`): {told['inputs']:,} inputs "
    text += f"in {told['seconds']:,.0f} s, {speed:,.0f} a second; {findings}"
    text += "".join(f"; {told[key]}" for key in ("gserver", "date") if key in told) + "."
    guided = told.get("guided")
    if isinstance(guided, dict):
        text += f" {guided['inputs']:,} more were guided by coverage."
    elif guided:
        text += f" Guided by coverage: {guided}."
    return f"{text} {told.get('note', '')}".strip()
