// An inline formula wider than its column scrolls in a box of its own; the others stay on their line.
const mark = () => {
  for (const formula of document.querySelectorAll("span.math")) {
    formula.classList.remove("wide");
    const box = formula.parentElement.closest("p, li, dd, td, dt") ?? document.body;
    const most = Math.min(box.clientWidth, document.documentElement.clientWidth);
    formula.classList.toggle("wide", formula.offsetWidth > most);
  }
  // What scrolls must be reached from the keyboard, and what does not should not.
  for (const box of document.querySelectorAll("pre, .table-wrapper, span.math, div.math, mjx-container")) {
    const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "visible";
    scrolls ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex");
  }
};

addEventListener("load", () => {
  // The theme calls these headings and does not say of which level.
  for (const caption of document.querySelectorAll('[role="heading"]:not([aria-level])')) {
    caption.setAttribute("aria-level", "2");
  }
  (window.MathJax?.startup?.promise ?? Promise.resolve()).then(mark);
  addEventListener("resize", mark);
});
