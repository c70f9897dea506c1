"""How the site's source is laid out from notebooks and pages; docs/tests has the built pages."""

import re
import sys

import nbformat
import pytest
from course import ROOT, glossary_address, glossary_terms

sys.path.insert(0, str(ROOT / "docs"))

import stage


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """A maker of what the site reads of a chapter, from its cells."""
    monkeypatch.setattr(stage, "SOURCE", tmp_path / "source")

    def make(*cells):
        path = tmp_path / "99_made_up.ipynb"
        title = nbformat.v4.new_markdown_cell("# 99 Make it up")
        nbformat.write(nbformat.v4.new_notebook(cells=[title, *cells]), path)
        stage.stage_notebook(path)
        return nbformat.read(tmp_path / "source" / "notebooks" / path.name, as_version=4).cells[1:]

    return make


def test_links_to_the_glossary_lead_to_the_sites_own(staged):
    link = f"[divergence]({glossary_address()}#kl-divergence)"
    text, code = staged(
        nbformat.v4.new_markdown_cell(f"A {link}, a [glossary]({glossary_address()})."),
        nbformat.v4.new_code_cell(f"# {link}"),
    )
    assert (
        text.source == "A [divergence](../glossary.md#KL-divergence), a [glossary](../glossary.md)."
    )
    assert link in code.source
    assert stage.to_glossary("[PPO](docs/glossary.md#ppo)") == "[PPO](glossary.md#PPO)"
    other = "[PPO](https://example.org/docs/glossary.md#ppo)"
    assert stage.to_glossary(other) == other


def test_a_link_to_no_term_stops_the_site():
    with pytest.raises(SystemExit, match="docs/glossary.md has no heading #kl"):
        stage.to_glossary(f"[KL]({glossary_address()}#kl)")


def test_the_glossary_of_the_site_has_every_term_and_a_notation_of_its_own():
    page = stage.glossary_page()
    for term in glossary_terms().values():
        assert f"\n## {term}\n" in page
    assert "[Notation](notation.md)" in page
    assert "README" not in page


def test_the_code_of_a_check_is_folded_under_its_claim_and_what_it_prints_is_not(staged):
    source = "# the two gradients agree | 1e-12\nassert 1 < 2"
    plain = nbformat.v4.new_code_cell("x = 1")
    cells = [plain]
    for text in (source, source.replace("1e-12", "exact")):
        output = nbformat.v4.new_output("stream", text="largest error: below 1e-12\n")
        cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["check"]}, outputs=[output])
        cells.append(cell)
    untouched, *checks = staged(*cells)
    assert untouched.metadata == {}
    for cell, given, within in zip(checks, cells[1:], ("within 1e-12", "exactly"), strict=True):
        summary = f"Check: the two gradients agree ({within})"
        assert cell.metadata.tags == ["check", "hide-input"]
        assert set(cell.metadata.mystnb.values()) == {summary}
        assert (cell.source, cell.outputs) == (given.source, given.outputs)


def test_a_check_that_draws_keeps_the_words_for_its_picture(staged):
    data = {"image/png": "aGk=", "text/plain": "A line"}
    output = nbformat.v4.new_output("display_data", data, metadata={"image/png": {"alt": "A line"}})
    source = "# the line is straight | exact"
    (cell,) = staged(
        nbformat.v4.new_code_cell(source, metadata={"tags": ["check"]}, outputs=[output])
    )
    assert cell.metadata.mystnb.image.alt == "A line"
    assert cell.metadata.mystnb.code_prompt_show.startswith("Check: the line")


def test_the_page_of_questions_has_one_row_per_question_of_chapter_17_with_causes_and_a_number():
    chapter = next((ROOT / "notebooks").glob("17_*.ipynb"))
    rows = stage.questions_page(chapter).splitlines()[4:]
    assert all(row.count(" | ") == 3 for row in rows)
    numbered = re.findall(r"\| \[(\d+)\. .+\]\(<notebooks/17_", "\n".join(rows))
    assert numbered == [str(n) for n in range(1, 31)]


def test_a_question_without_a_symptom_stops_the_site(tmp_path):
    cell = nbformat.v4.new_markdown_cell("| a | b | c | 1 |\n\n### 1. Why?\n\n### 2. Why not?")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "17_made_up.ipynb")
    with pytest.raises(SystemExit, match="a question of chapter 17 has no symptom"):
        stage.questions_page(tmp_path / "17_made_up.ipynb")
