"""Print _build/print/index.html, the course on one page, as _build/dpo_mini.pdf."""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BUILD = Path(__file__).resolve().parent.parent / "_build"
FOOTER = """<div style="width: 100%; font: 8px sans-serif; text-align: center">
<span class="pageNumber"></span> / <span class="totalPages"></span></div>"""
NO_LIBRARY = (
    """document.getElementById("document-api/index").closest(".toctree-wrapper").remove()"""
)


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("make pdf needs Chromium: apt install chromium, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(offline=True)
        page.set_default_timeout(300_000)
        print("Setting the mathematics ...", flush=True)
        page.goto((BUILD / "print" / "index.html").as_uri())
        page.evaluate("MathJax.startup.promise.then(() => true)")
        page.evaluate(NO_LIBRARY)
        print("Printing about 300 pages ...", flush=True)
        page.pdf(
            path=BUILD / "dpo_mini.pdf",
            format="A4",
            scale=0.8,
            margin={"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            outline=True,
            tagged=True,
        )
        browser.close()


if __name__ == "__main__":
    main()
