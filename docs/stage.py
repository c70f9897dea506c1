"""Lay out the site's source in _build/source from README, the committed notebooks and docs/.

Paths stay as they are in the repository, so that every link between them holds. Three pages are
made from what stands elsewhere: the losses from docstrings, the questions from chapter 17, and who
cites what from the chapters.
"""

import inspect
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tools"))

from course import claim_of, glossary_address, glossary_terms  # noqa: E402
from public_names import GATHERING, MODULES  # noqa: E402

DOCS = ROOT / "docs"
SOURCE = ROOT / "_build" / "source"
CITED = re.compile(r"arXiv:((?:[a-z-]+/)?\d+(?:\.\d+)?)")
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")
GLOSSARY = re.compile(rf"\]\((?:{re.escape(glossary_address())}|docs/glossary\.md)(#[^)\s]+)?\)")
API = {
    "On exact tables": ["closed_form", "preferences", "losses"],
    "Gradients through samples": ["policy_gradient", "relaxations"],
    "Models and tasks": ["logps", "tasks", "policies", "rollout", "train", "real"],
}
_placed = {name for names in API.values() for name in names}
_others = (name.removeprefix("dpo_mini.") for name in MODULES[1:])
API["Around it"] = [name for name in _others if name not in _placed]


def anchor(title: str) -> str:
    """Anchors as Jupyter makes them, so that the links of README and chapters hold here too."""
    return title.replace(" ", "-")


def to_glossary(text: str, page: str = "glossary.md") -> str:
    """The text with its links to the glossary on GitHub leading to the site's own, at `page`."""
    return GLOSSARY.sub(lambda found: f"]({page}{term_anchor(found[1] or '')})", text)


def term_anchor(fragment: str) -> str:
    """From `#kl-divergence`, GitHub's anchor of a term, to the one that stands for it here."""
    terms = glossary_terms()
    if fragment and fragment[1:] not in terms:
        raise SystemExit(f"docs/glossary.md has no heading {fragment}")
    return f"#{anchor(terms[fragment[1:]])}" if fragment else ""


def glossary_page() -> str:
    """docs/glossary.md, whose links are such as GitHub follows."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<=\]\()#[^)\s]+", lambda found: term_anchor(found[0]), text)
    return text.replace("](../README.md#notation)", "](notation.md)")


def write(name: str, text: str) -> None:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def toctree(caption: str, entries: list[str]) -> str:
    lines = "\n".join(entries)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"


def explorer() -> str:
    """The explorer of every instance of the course, as a page takes it."""
    from dpo_mini.explorer import Explorer

    return f"```{{raw}} html\n{Explorer().html()}\n```\n"


def stage_notebook(path: Path) -> None:
    """A chapter as the site reads it: alt text where Sphinx looks for it, no empty outputs.

    Its badge becomes words, for no page asks another host for a picture, and its links to the
    glossary lead to the site's own. The cell that installs the package has a tag by which myst-nb
    leaves it out: nothing runs here. Of a cell tagged `check` the code is folded, under what it
    claims.
    """
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0]
    title.source = BADGE.sub(r"[Open in Colab](\1)", title.source)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            cell.source = to_glossary(cell.source, "../glossary.md")
            continue
        cell.outputs = [out for out in cell.outputs if out.get("data", {}).get("text/html") != ""]
        for output in cell.outputs:
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": " ".join(alt.split())}}
        if "check" in cell.metadata.get("tags", []):
            claim, tolerance = claim_of(cell.source)
            within = "exactly" if tolerance == "exact" else f"within {tolerance}"
            summary = f"Check: {claim} ({within})"
            prompts = {"code_prompt_show": summary, "code_prompt_hide": summary}
            cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), **prompts}
            cell.metadata["tags"] = [*cell.metadata["tags"], "hide-input"]
    write(f"notebooks/{path.name}", nbformat.writes(notebook))


def losses_page() -> str:
    from dpo_mini import losses

    rows = []
    for name, function in inspect.getmembers(losses, inspect.isfunction):
        if name.startswith("_") or function.__module__ != losses.__name__ or "_loss" not in name:
            continue
        doc = inspect.getdoc(function)
        line = inspect.getsourcelines(function)[1]
        what = " ".join(doc.split("\n\n")[0].split()).rstrip(".")
        source = " ".join(re.search(r"Source: (.*)", doc, re.S)[1].split()).rstrip(".")
        source = CITED.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", source)
        cells = f"{{py:func}}`{name} <dpo_mini.losses.{name}>`", what, source
        rows.append((line, "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"))
    heads = ["| function | loss of a row | source |", "|---|---|---|"]
    table = "\n".join(heads + [row for _, row in sorted(rows)])
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    return text.replace("<!-- table -->", table)


def questions_page(chapter: Path) -> str:
    prose = "\n".join(c.source for c in nbformat.read(chapter, as_version=4).cells)
    titles = {n: f"{n}. {text}" for n, text in re.findall(r"^### (\d+)\. (.+)$", prose, re.M)}
    rows = re.findall(r"^\| (.+ \| .+ \| .+) \| (\d+|chapter .+) \|$", prose, re.M)
    table = []
    for symptom_causes_number, target in rows:
        if target in titles:
            title = titles[target]
            anchor = title.replace(" ", "-").replace("`", "")
            link = f"[{title}](<notebooks/{chapter.name}#{anchor}>)"
        else:
            number = re.match(r"chapter (\d\d)", target)[1]
            (other,) = chapter.parent.glob(f"{number}_*.ipynb")
            link = f"[{target}](notebooks/{other.name})"
        table.append(f"| {symptom_causes_number} | {link} |")
    if not set(titles) <= {target for _, target in rows}:
        raise SystemExit("a question of chapter 17 has no symptom")
    heads = "| what you see | likely causes | the number that tells them apart | what answers it |"
    lines = "\n".join([heads, "|---|---|---|---|", *table])
    return f"# Questions by symptom\n\n{lines}\n"


def bibliography_page(chapters: list[Path]) -> str:
    """docs/bibliography.md, with the chapters that cite each entry."""
    citing = {}
    for path in chapters:
        for number in CITED.findall(path.read_text(encoding="utf-8")):
            citing.setdefault(number, set()).add(path)
    for path in sorted((ROOT / "dpo_mini").rglob("*.py")):
        for number in CITED.findall(path.read_text(encoding="utf-8")):
            citing.setdefault(number, set())
    text = (DOCS / "bibliography.md").read_text(encoding="utf-8")
    missing = set(citing) - set(CITED.findall(text))
    if missing:
        raise SystemExit(f"docs/bibliography.md lacks arXiv {', '.join(sorted(missing))}")

    def cited(found: re.Match) -> str:
        number = found[1]
        links = [f"[{p.name[:2]}](notebooks/{p.name})" for p in sorted(citing.get(number, ()))]
        where = " · chapter " + ", ".join(links) if links else " · the library"
        return f"[arXiv:{number}](https://arxiv.org/abs/{number}){where}"

    return CITED.sub(cited, text)


def api_pages() -> list[str]:
    index = (DOCS / "api.md").read_text(encoding="utf-8")
    for part, modules in API.items():
        index += toctree(part, modules).replace(":hidden:\n", "")
        for name in modules:
            title = f"dpo_mini.{name}"
            options = "   :imported-members:\n" if title in GATHERING else ""
            write(
                f"api/{name}.rst",
                f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n{options}",
            )
    write("api/index.md", index)


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in chapters:
        stage_notebook(path)
    shutil.copytree(ROOT / "figures", SOURCE / "figures")
    examples = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]
    for name in ("CONTRIBUTING.md", "benchmarks/RESULTS.md", *examples):
        (SOURCE / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, SOURCE / name)
    teaching = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8")
    # The sheets hold their solutions: they are named here, and no pages.
    teaching = to_glossary(teaching)
    write("INSTRUCTORS.md", re.sub(r"\[([^\]]+)\]\(notebooks/homework/[^)]+\)", r"`\1`", teaching))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = to_glossary(readme)
    readme = re.sub(r"(?<=\.ipynb#)[^)]+", lambda found: unquote(found[0]), readme)
    for folder in ("configs/", "benchmarks/"):  # a folder is no page
        readme = readme.replace(f"[{folder}]({folder})", f"`{folder}`")
    shutil.copy(ROOT / "CITATION.cff", SOURCE / "CITATION.cff")
    pages = ["explorer", "questions", "losses", "notation", "glossary", "bibliography"]
    more = ["api/index", "INSTRUCTORS", "CONTRIBUTING", "benchmarks/RESULTS"]
    readme += toctree("The course", [f"notebooks/{path.stem}" for path in chapters])
    readme += toctree("Look up", pages) + toctree("The library", more)
    write("index.md", readme)
    notation = re.search(r"^## Notation\n(.*?)^## ", readme, re.M | re.S)[1]
    write("notation.md", "# Notation\n" + notation)
    write("losses.md", losses_page())
    write("questions.md", questions_page(chapters[-1]))
    write("bibliography.md", bibliography_page(chapters))
    write("glossary.md", glossary_page())
    text = (DOCS / "explorer.md").read_text(encoding="utf-8")
    write("explorer.md", text + "\n" + explorer())
    api_pages()


if __name__ == "__main__":
    main()
