"""What the other tools share: where the course stands, its address, and notebooks as files."""

import json
import re
import sys
from pathlib import Path

from dpo_mini._files import write_whole

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def chapters() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def sheets() -> list[Path]:
    return sorted((NOTEBOOKS / "homework").glob("*.ipynb"))


def project() -> dict:
    """The table `[project]` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def address() -> str:
    """The repository's address: `Repository` in pyproject.toml, and nowhere else by hand.

    Raises:
      ValueError: there is none, or it is not on GitHub.
    """
    given = project().get("urls", {}).get("Repository", "nothing")
    # Colab opens notebooks from GitHub and from no other host.
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", given):
        raise ValueError(
            f"Repository in pyproject.toml must be https://github.com/OWNER/NAME, got {given}"
        )
    return given


def glossary_address() -> str:
    """Where GitHub shows the glossary; `#` and the anchor of a term follow it in a link."""
    return f"{address()}/blob/main/docs/glossary.md"


def glossary_terms() -> dict[str, str]:
    """The terms of the glossary, each a heading, by the anchors that GitHub gives them."""
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return {github_anchor(term): term for term in re.findall(r"^## (.+)$", page, re.M)}


def github_anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def claim_of(source: str) -> tuple[str, str] | None:
    """The claim and the tolerance in the comment that begins a cell tagged `check`.

    The comment is `# claim | tolerance`, such as `# the two gradients agree | 1e-12`; the tolerance
    is a number > 0 or the word `exact`. None where a cell begins otherwise.
    """
    found = re.match(r"# (\S.*) \| (exact|\d[\d.]*(?:e-?\d+)?)$", source, re.M)
    if not found or (found[2] != "exact" and not float(found[2]) > 0):
        return None
    return found[1], found[2]


def text_of(notebook: dict) -> str:
    """A notebook in the one form that is committed: a change shows as a small difference."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write(path: Path, text: str) -> bool:
    """Write a file whole, and only where it would change; whether it did."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_whole(path, text.encode())
    return True
