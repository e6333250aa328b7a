"""What the fuzzers have found, in words: the section "Fuzzing" of a page, from their reports."""

from typing import Any

TITLES = {"core": "The pure core", "sockets": "Real sockets"}
Report = dict[str, dict[str, Any]]


def section(report: Report) -> str:
    """Return the figures as tables in Markdown, from what --report has written."""
    parts = []
    for kind, told in report.items():
        speed = told["inputs"] / told["seconds"] if told["seconds"] else 0
        findings = "1 finding" if told["findings"] == 1 else f"{told['findings'] or 'no'} findings"
        command = f"bin/fuzz {kind} --inputs {told['inputs']} --seed {told['seed']}"
        text = f"**{TITLES[kind]}** (`{command}`): {told['inputs']:,} inputs "
        text += f"in {told['seconds']:,.0f} s, {speed:,.0f} a second; {findings}."
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
