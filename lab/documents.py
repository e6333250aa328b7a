"""The pages that tests compare with the code, and their chapters and tables."""

import re

from lab.running import ROOT

OPERATIONS = (ROOT / "docs/operations.md").read_text()
DEPLOYING = (ROOT / "docs/deploying.md").read_text()
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
README = (ROOT / "README.md").read_text()


def section(title: str, text: str = OPERATIONS) -> str:
    """One chapter of a page."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no chapter {title}"
    return found[1]


def rows(title: str, text: str = OPERATIONS) -> dict[str, list[str]]:
    """The table of a chapter: the other columns by the name in the first."""
    table: dict[str, list[str]] = {}
    for line in section(title, text).splitlines():
        first, *rest = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first) if line.startswith("| `") else []:
            assert name not in table, f"{name} is listed twice"
            table[name] = rest
    return table
