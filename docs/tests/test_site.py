"""Every page of the built site as a browser shows it: at a desk, on a phone, in the dark."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import axe_playwright_python
import pytest
from course import glossary_terms

SITE = Path(__file__).resolve().parents[2] / "_build" / "site"
CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
DRAWN = "() => window.MathJax?.startup?.promise.then(() => true) ?? true"
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
# The rules of WCAG 2.1 at levels A and AA: what is broken, and where first.
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
BROKEN = """runOnly => axe.run({runOnly, resultTypes: ["violations"]})
  .then(({violations}) => violations.map(({id, nodes}) => `${id}: ${nodes[0].html}`))"""
# Text and what lies behind it: the lowest contrast of a page, by the formula of WCAG 2.
CONTRAST = """() => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = c => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => .2126 * light(r) + .7152 * light(g) + .0722 * light(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > .5) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [21, ""];
  const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility({opacityProperty: true})) continue;
    if (node.closest("mjx-assistive-mml, noscript, .headerlink, option")) continue;
    const pair = [luminance(rgb(getComputedStyle(node).color)), luminance(behind(node))];
    const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    if (ratio < worst[0]) worst = [ratio, `${node.className}: ${walker.currentNode.data}`];
  }
  return worst;
}"""
# What is wider than the window and stands in no box of its own that scrolls.
STICKS_OUT = """() => [...document.querySelectorAll("article *")].filter(node => {
  if (node.getBoundingClientRect().right <= innerWidth + 1 || !node.checkVisibility()) return false;
  if (node.closest("mjx-assistive-mml")) return false;
  for (let box = node; !box.matches("article"); box = box.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(box).overflowX)) return false;
  return true;
}).map(node => `${node.tagName}.${node.className}: ${node.textContent.slice(0, 60)}`)"""


class Page(HTMLParser):
    """Anchors and links of a page as it was written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


def test_there_is_a_page_for_all_of_it():
    wanted = ["index", "explorer", "questions", "losses", "notation", "glossary", "bibliography"]
    wanted += [f"notebooks/{path.stem}" for path in CHAPTERS]
    assert {f"{name}.html" for name in [*wanted, "api/index", "search"]} <= set(PAGES)


def test_every_link_within_the_site_leads_somewhere():
    read = {name: Page(SITE / name) for name in PAGES}
    for name, page in read.items():
        for link in page.links:
            target, fragment = urldefrag(urljoin(name, link))
            if target.startswith(("http", "mailto")):
                continue
            path = unquote(target)
            assert (SITE / path).exists(), f"{name}: {link}"
            if fragment and path in read:
                assert unquote(fragment) in read[path].ids, f"{name}: {link}"


def test_a_term_of_the_glossary_has_the_anchor_that_github_gives_it():
    assert set(glossary_terms()) <= Page(SITE / "glossary.html").ids


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_at_a_desk_and_on_a_phone(name, tab, site):
    page = tab()
    page.goto(site + name)
    page.evaluate(DRAWN)
    assert page.locator("h1").count() == (name != "search.html")  # Sphinx gives that one none
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5", "all => all.map(h => +h.tagName[1])")
    if name.startswith(("notebooks/", "explorer")):
        assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    formulas = page.locator(".math").count()
    assert page.locator("mjx-container").count() >= formulas
    assert page.locator("mjx-merror").count() == 0
    pictures = page.eval_on_selector_all(
        "article img", "all => all.map(i => [i.src, i.naturalWidth, i.alt])"
    )
    for source, width, alt in pictures:
        assert width > 0, source
        assert len(alt) > 20, source
        assert not alt.endswith(".png"), source
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, f"{scheme}: {ratio:.2f} at {where}"
    page.evaluate(AXE)
    assert page.evaluate(BROKEN, WCAG) == []
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert page.evaluate(STICKS_OUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(BROKEN, ["scrollable-region-focusable"]) == []


def test_dark_is_dark_by_wish_and_by_button(tab, site):
    behind = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    page = tab(color_scheme="dark")
    page.goto(site)
    assert max(page.evaluate(behind)) < 60
    page = tab()
    page.goto(site)
    assert min(page.evaluate(behind)) > 240
    page.locator(".theme-toggle:visible").first.click()
    page.wait_for_function(f"Math.max(...{behind}) < 60")


def test_search_finds_the_partition_function(tab, site):
    page = tab()
    page.goto(site)
    page.get_by_role("searchbox").or_(page.get_by_placeholder("Search")).first.fill(
        "partition function"
    )
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=partition*")
    for title in ("03 Count the partition function", "dpo_mini.closed_form.log_partition"):
        page.locator("#search-results li a", has_text=title).first.wait_for()


def test_previous_and_next_walk_through_the_chapters(tab, site):
    page = tab()
    page.goto(f"{site}notebooks/{CHAPTERS[0].stem}.html")
    for path in CHAPTERS[1:]:
        page.locator("a.next-page").click()
        page.wait_for_url(f"**/{path.stem}.html")
    assert page.locator("a.prev-page").get_attribute("href") == f"{CHAPTERS[-2].stem}.html"
