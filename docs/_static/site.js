// An inline formula wider than its column scrolls in a box of its own; the others stay on their line.
const mark = () => {
  for (const formula of document.querySelectorAll("span.math")) {
    formula.classList.remove("wide");
    const box = formula.parentElement.closest("p, li, dd, td, dt") ?? document.body;
    const most = Math.min(box.clientWidth, document.documentElement.clientWidth);
    formula.classList.toggle("wide", formula.offsetWidth > most);
  }
};

addEventListener("load", () => {
  window.MathJax?.startup?.promise.then(mark);
  addEventListener("resize", mark);
});
