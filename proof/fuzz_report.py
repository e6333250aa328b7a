"""What the fuzzers have found, in words: the section "Fuzzing" of a page, from their reports."""

from typing import Any

TITLES = {"core": "The pure core", "sockets": "Real sockets"}
Report = dict[str, dict[str, Any]]


def section(report: Report) -> str:
    """Return the figures as tables in Markdown, from what --report has written."""
    parts = []
    for kind, told in report.items():
        speed = told["inputs"] / told["seconds"] if told["seconds"] else 0
        findings = f"{told['findings'] or 'no'} finding{'s' * (told['findings'] != 1)}"
        text = f"**{TITLES[kind]}** (`bin/fuzz {kind} --inputs {told['inputs']} --seed {told['seed']}`):"
        text += f" {told['inputs']:,} inputs in {told['seconds']:,.0f} s, {speed:,.0f} a second; {findings}."
        guided = told.get("guided")
        if isinstance(guided, dict):
            text += f" {guided['inputs']:,} more were guided by coverage."
        elif guided:
            text += f" Guided by coverage: {guided}."
        parts.append(f"{text} {told.get('note', '')}".strip())
        for head, counts in (("target", told["targets"]), ("outcome", told["outcomes"])):
            if counts:
                lines = [f"| {name} | {count:,} |" for name, count in counts.items()]
                parts.append("\n".join([f"| {head} | inputs |", "| --- | ---: |", *lines]))
    return "\n\n".join(parts)
