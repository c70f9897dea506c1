// One prompt and its answers, computed as `closed_form` and `losses` do; docs/tests compares every number.
(() => {
  "use strict";
  const STYLE = "explorer.css"; // dpo_mini.explorer puts the file's text here

  // --- mathematics ---------------------------------------------------------------------------

  const sum = values => values.reduce((total, value) => total + value, 0);
  const dot = (p, q) => sum(p.map((value, i) => value * q[i]));
  const sigmoid = x => 1 / (1 + Math.exp(-x));
  const bump = x => sigmoid(x) * sigmoid(-x); // the slope of sigmoid
  const logSigmoid = x => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
  const logOdds = m => m - Math.log(-Math.expm1(m)); // of a log-probability

  function logSumExp(values) {
    const top = Math.max(...values);
    return top + Math.log(sum(values.map(value => Math.exp(value - top))));
  }

  function logSoftmax(logits) {
    const total = logSumExp(logits);
    return logits.map(value => value - total);
  }

  // f' as a function of u = log(pi / pi_ref), its slope, and back: pi / pi_ref where f' is s.
  // `top` is the largest value that f' takes.
  const DIVERGENCES = {
    reverse_kl: ["reverse KL", () => ({ of: u => u, slope: () => 1 })],
    forward_kl: ["forward KL", () => ({
      of: u => 1 - Math.exp(-u), slope: u => Math.exp(-u), back: s => 1 / (1 - s), top: 1,
    })],
    js: ["Jensen-Shannon", () => ({
      of: u => Math.LN2 + logSigmoid(u), slope: u => sigmoid(-u),
      back: s => Math.exp(s) / (2 - Math.exp(s)), top: Math.LN2,
    })],
    alpha: ["α-divergence", alpha => ({
      of: u => Math.expm1((alpha - 1) * u) / (alpha - 1), slope: u => Math.exp((alpha - 1) * u),
      back: s => (1 + (alpha - 1) * s) ** (1 / (alpha - 1)), top: 1 / (1 - alpha),
    })],
  };

  // The policy that maximises E[r] - beta D_f, and the multiplier that makes it sum to 1.
  function optimum(refLogps, rewards, beta, f) {
    if (!f.back) { // reverse KL: the exponential comes out of the sum, and the multiplier is beta log Z
      const logits = refLogps.map((q, i) => q + rewards[i] / beta);
      return { logps: logSoftmax(logits), multiplier: beta * logSumExp(logits) };
    }
    const best = Math.max(...rewards);
    const at = level => refLogps.map((q, i) => Math.exp(q) * f.back((rewards[i] - level) / beta));
    let [low, high] = [best - beta * f.top, best]; // too much mass, and not enough
    for (let step = 0; step < 100; step++) {
      const middle = (low + high) / 2;
      if (sum(at(middle)) > 1) low = middle; else high = middle;
    }
    return { logps: logSoftmax(at(high).map(Math.log)), multiplier: high };
  }

  // [loss, slope in log pi(chosen), slope in log pi(rejected)]. a and b are the log-ratios of the
  // chosen and the rejected answer, p and q their log-probabilities.
  const ofMargin = (value, slope) => ({ a, b, beta, e }) => {
    const x = beta * (a - b);
    return [value(x, e), beta * slope(x, e), -beta * slope(x, e)];
  };
  const LOSSES = {
    dpo_loss: ["DPO", ofMargin(x => -logSigmoid(x), x => -sigmoid(-x))],
    cdpo_loss: ["cDPO", ofMargin(
      (x, e) => -(1 - e) * logSigmoid(x) - e * logSigmoid(-x),
      (x, e) => -(1 - e) * sigmoid(-x) + e * sigmoid(x)), "smoothing"],
    rdpo_loss: ["rDPO", ofMargin(
      (x, e) => (-(1 - e) * logSigmoid(x) + e * logSigmoid(-x)) / (1 - 2 * e),
      (x, e) => (-(1 - e) * sigmoid(-x) - e * sigmoid(x)) / (1 - 2 * e)), "smoothing"],
    ipo_loss: ["IPO", ({ a, b, beta }) => {
      const miss = a - b - 1 / (2 * beta);
      return [miss ** 2, 2 * miss, -2 * miss];
    }],
    hinge_loss: ["hinge", ofMargin(x => Math.max(0, 1 - x), x => x < 1 ? -1 : 0)],
    exo_loss: ["EXO", ofMargin(
      (x, e) => sigmoid(x) * (logSigmoid(x) - Math.log(1 - e)) + sigmoid(-x) * (logSigmoid(-x) - Math.log(e)),
      (x, e) => bump(x) * (x - Math.log(1 - e) + Math.log(e))), "smoothing"],
    discopop_loss: ["DiscoPOP", ofMargin(
      x => -sigmoid(-x / 0.05) * logSigmoid(x) + sigmoid(x / 0.05) * Math.exp(-x),
      x => bump(x / 0.05) / 0.05 * (logSigmoid(x) + Math.exp(-x))
        - sigmoid(-x / 0.05) * sigmoid(-x) - sigmoid(x / 0.05) * Math.exp(-x))],
    f_dpo_loss: ["f-DPO, of the divergence above", ({ a, b, beta, f }) => {
      const x = beta * (f.of(a) - f.of(b));
      return [-logSigmoid(x), -beta * sigmoid(-x) * f.slope(a), beta * sigmoid(-x) * f.slope(b)];
    }],
    nca_loss: ["NCA", ({ a, b, beta }) => [
      -logSigmoid(beta * a) - (logSigmoid(-beta * a) + logSigmoid(-beta * b)) / 2,
      beta * (sigmoid(beta * a) / 2 - sigmoid(-beta * a)), beta * sigmoid(beta * b) / 2]],
    bco_loss: ["BCO", ({ a, b, beta }) => [
      -logSigmoid(beta * a) - logSigmoid(-beta * b), -beta * sigmoid(-beta * a), beta * sigmoid(beta * b)]],
    sppo_loss: ["SPPO", ({ a, b, beta }) => {
      const [miss, other] = [a - 1 / (2 * beta), b + 1 / (2 * beta)];
      return [miss ** 2 + other ** 2, 2 * miss, 2 * other];
    }],
    apo_zero_loss: ["APO-zero", ({ a, b, beta }) => [
      sigmoid(-beta * a) + sigmoid(beta * b), -beta * bump(beta * a), beta * bump(beta * b)]],
    apo_down_loss: ["APO-down", ({ a, b, beta }) => [
      sigmoid(beta * a) + sigmoid(beta * (b - a)),
      beta * bump(beta * a) - beta * bump(beta * (a - b)), beta * bump(beta * (a - b))]],
    simpo_loss: ["SimPO, no reference", ({ p, q, beta, gamma }) => {
      const x = beta * (p - q) - gamma;
      return [-logSigmoid(x), -beta * sigmoid(-x), beta * sigmoid(-x)];
    }, "gamma"],
    cpo_loss: ["CPO, no reference", ({ p, q, beta }) => {
      const x = beta * (p - q);
      return [-logSigmoid(x) - p, -beta * sigmoid(-x) - 1, beta * sigmoid(-x)];
    }],
    orpo_loss: ["ORPO, no reference", ({ p, q, beta }) => {
      const x = logOdds(p) - logOdds(q);
      const slope = m => -beta * sigmoid(-x) / -Math.expm1(m);
      return [-beta * logSigmoid(x) - p, slope(p) - 1, -slope(q)];
    }],
  };

  function measure(logps, { refLogps, rewards, beta }) {
    const policy = logps.map(Math.exp);
    const mean = dot(policy, rewards);
    const nats = dot(policy, logps.map((value, i) => value - refLogps[i]));
    return { mean, nats, objective: mean - beta * nats };
  }

  // The highest reward at a KL: that of the optimum whose price spends as much.
  function frontierAt(nats, task) {
    const at = logPrice => measure(optimum(task.refLogps, task.rewards, Math.exp(logPrice), {}).logps, task);
    let [low, high] = [-20, 20]; // KL falls as the price rises
    for (let step = 0; step < 80; step++) {
      const middle = (low + high) / 2;
      if (at(middle).nats > nats) low = middle; else high = middle;
    }
    return at(high).mean;
  }

  function compute(given) {
    const { beta, chosen, rejected } = given;
    const refLogps = logSoftmax(given.weights.map(Math.log));
    const rewards = given.rewards.map(reward => reward + given.shift);
    const task = { refLogps, rewards, beta };
    const f = DIVERGENCES[given.divergence][1](given.alpha);
    const { logps: best, multiplier } = optimum(refLogps, rewards, beta, f);
    const logps = logSoftmax(refLogps.map((q, i) => q + given.way * (best[i] - q) + given.moved[i]));
    const ratios = logps.map((value, i) => value - refLogps[i]);
    const [loss, slopeA, slopeB] = LOSSES[given.loss][1]({
      a: ratios[chosen], b: ratios[rejected], p: logps[chosen], q: logps[rejected],
      beta, e: given.smoothing, gamma: given.gamma, f,
    });
    const push = logps.map((value, i) => // minus the gradient in the logits
      -slopeA * ((i === chosen) - Math.exp(value)) - slopeB * ((i === rejected) - Math.exp(value)));
    const [start, top, at] = [refLogps, best, logps].map(policy => measure(policy, task));
    const below = policy => frontierAt(policy.nats, task) - policy.mean;
    const implied = ratios.map(u => beta * u);
    return {
      task, rewards, multiplier, loss, slopeA, slopeB, push, start, top, at, implied,
      logZ: logSumExp(refLogps.map((q, i) => q + rewards[i] / beta)),
      reference: refLogps.map(Math.exp), best: best.map(Math.exp), policy: logps.map(Math.exp),
      topBelow: below(top), atBelow: below(at),
      trueMargin: rewards[chosen] - rewards[rejected], margin: implied[chosen] - implied[rejected],
    };
  }

  // --- what is shown -------------------------------------------------------------------------

  const text = value => (Math.abs(value) < 5e-5 ? 0 : value).toFixed(4).replace("-", "−");
  const short = value => String(+value.toFixed(4)).replace("-", "−");
  const safe = words => words.replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
  const row = (title, cells) => `<tr><th scope="row">${title}</th>${cells.map(([key, value]) =>
    `<td data-key="${key}" data-value="${value}">${text(value)}</td>`).join("")}</tr>`;
  const options = entries => entries.map(([value, title]) =>
    `<option value="${value}">${safe(title)}</option>`).join("");
  const range = (name, title, low, high, step) => `<label class="of-${name}">${title}
    <span class="value" aria-hidden="true"></span>
    <input type="range" name="${name}" min="${low}" max="${high}" step="${step}"></label>`;
  const select = (name, title, inner) =>
    `<label class="of-${name}">${title} <select name="${name}">${inner}</select></label>`;
  const table = (name, title, heads) => `<div class="scroll"><table class="${name}"><caption>${title}</caption>
    ${heads.length ? `<thead><tr>${heads.map(head => `<th scope="col">${head}</th>`).join("")}</tr></thead>` : ""}
    <tbody></tbody></table></div>`;

  const PAGE = instances => `<style>${STYLE}</style><div class="explorer" lang="en">
    <form>
      <fieldset><legend>The task</legend>
        ${select("instance", "Start from", options(instances.map(({ title }, i) => [i, title])))}
        ${range("beta", "β, reward per nat", 0.05, 3, 0.01)}
        ${range("shift", "added to every reward", -2, 2, 0.05)}
        ${select("divergence", "divergence of the penalty", options(
          Object.entries(DIVERGENCES).map(([name, [title]]) => [name, title])))}
        ${range("alpha", "α of the divergence", 0.05, 0.95, 0.05)}
      </fieldset>
      <fieldset class="answers"></fieldset>
      <fieldset><legend>A policy π, a pair and a loss</legend>
        ${range("way", "π, from the reference (0) to the optimum (1)", 0, 2, 0.01)}
        ${select("chosen", "chosen", "")}${select("rejected", "rejected", "")}
        ${select("loss", "loss", options(Object.entries(LOSSES).map(([name, [title]]) => [name, title])))}
        ${range("smoothing", "label smoothing e", 0.01, 0.45, 0.01)}
        ${range("gamma", "target margin γ", 0, 2, 0.05)}
        <div class="steps">
          <button type="button" data-steps="1">One step on this pair</button>
          <button type="button" data-steps="10">Ten steps</button>
          <button type="button" data-steps="0">Undo them</button>
        </div>
      </fieldset>
    </form>
    <div class="seen">
      <div class="pictures"></div>
      <p class="says" role="status"></p>
    </div>
    <div class="tables">
      ${table("per-answer", "Every answer", ["answer", "π_ref", "reward", "optimum", "π",
        "implied reward β log(π/π_ref)", "… + β log Z", "push on the logit"])}
      ${table("totals", "The whole prompt", ["policy", "E[r]", "KL to π_ref, nats", "J = E[r] − β KL",
        "below the frontier by"])}
      ${table("pair", "The pair", [])}
    </div></div>`;

  function figure(said, inner, caption) {
    return `<figure><svg viewBox="0 0 320 160" role="img" aria-label="${safe(said)}">${inner}</svg>
      <figcaption>${caption}</figcaption></figure>`;
  }

  function bars(names, { reference, best, policy }) {
    const place = 280 / names.length;
    const width = Math.min(16, place / 4);
    const groups = names.map((name, i) => {
      const x = 25 + (i + 0.5) * place - 1.5 * width;
      const bar = (k, p, kind) => `<rect class="${kind}" x="${x + k * width}" y="${135 - 120 * p}"
        width="${width - 2}" height="${120 * p}"/>`;
      return bar(0, reference[i], "ref") + bar(1, best[i], "best") + bar(2, policy[i], "now")
        + `<text x="${x + 1.5 * width}" y="150" text-anchor="middle">${safe(name)}</text>`;
    });
    const said = names.map((name, i) =>
      `${name}: reference ${text(reference[i])}, optimum ${text(best[i])}, π ${text(policy[i])}`);
    return figure(`Probabilities. ${said.join("; ")}.`, `<path class="axis" d="M22 135H308"/>${groups.join("")}`,
      "probability: reference (dotted), optimum (outlined), π (filled)");
  }

  function plane({ task, start, at, top }) {
    const { refLogps, rewards } = task;
    const points = Array.from({ length: 81 }, (_, i) =>
      measure(optimum(refLogps, rewards, 10 ** (2 - i / 20), {}).logps, task));
    const widest = Math.max(...points.map(point => point.nats), at.nats, top.nats, 1e-9);
    const [least, most] = [Math.min(...rewards), Math.max(...rewards)];
    const x = point => (30 + 270 * point.nats / widest).toFixed(2);
    const y = point => (135 - 115 * (point.mean - least) / (most - least || 1)).toFixed(2);
    const line = points.map(point => `${x(point)},${y(point)}`).join(" ");
    const inner = `<polyline class="frontier" points="${line}"/><path class="axis" d="M30 15V135H300"/>
      <path class="ref" d="M${x(start) - 4} ${y(start) - 4}l8 8m0 -8l-8 8"/>
      <circle class="best" cx="${x(top)}" cy="${y(top)}" r="6"/>
      <circle class="now" cx="${x(at)}" cy="${y(at)}" r="4"/>
      <text x="300" y="151" text-anchor="end">KL, 0 to ${widest.toFixed(2)} nats</text>
      <text x="34" y="10">reward, ${short(least)} to ${short(most)}</text>`;
    const said = [["the reference", start], ["the optimum", top], ["π", at]].map(([name, point]) =>
      `${name} at ${text(point.nats)} nats and reward ${text(point.mean)}`);
    return figure(`Reward against KL, with the exact frontier: ${said.join("; ")}.`, inner,
      "the exact frontier (dashed), π_ref (cross), the optimum (ring), π (dot)");
  }

  function pushes(names, { push }, { chosen, rejected }) {
    const largest = Math.max(...push.map(Math.abs), 1e-9);
    const inner = names.map((name, i) => {
      const [x, height] = [25 + (i + 0.5) * 280 / names.length, 55 * push[i] / largest];
      return `<rect class="now" x="${x - 9}" y="${75 - Math.max(height, 0)}" width="18" height="${Math.abs(height)}"/>
        <text x="${x}" y="150" text-anchor="middle">${safe(name)}</text>
        <text x="${x}" y="${height < 0 ? 68 : 88}" text-anchor="middle">${short(push[i])}</text>`;
    });
    const said = names.map((name, i) => `${name} ${text(push[i])}`).join(", ");
    return figure(`One step's push on each logit: ${said}.`, `<path class="axis" d="M22 75H308"/>${inner.join("")}`,
      `push on each logit, −∂loss/∂logit: ${safe(names[chosen])} over ${safe(names[rejected])}`);
  }

  // What the status line compares with what it said last.
  const SPOKEN = [
    ["log Z", "nats", got => got.logZ],
    ["J of the optimum", "", got => got.top.objective],
    ["optimum", "", (got, names) => names.map((name, i) => `${name} ${text(got.best[i])}`).join(" ")],
    ["J of π", "", got => got.at.objective],
    ["KL of π", "nats", got => got.at.nats],
    ["π below the frontier by", "", got => got.atBelow],
    ["margin of π", "", got => got.margin],
    ["loss", "nats", got => got.loss],
  ];

  function compared(before, after) {
    const changed = SPOKEN.filter((_, i) => before[i] !== after[i]);
    if (!changed.length) return "No number changed.";
    const now = changed.map(spoken => {
      const i = SPOKEN.indexOf(spoken);
      return `${spoken[0]} ${before[i]} → ${after[i]}${spoken[1] && ` ${spoken[1]}`}`;
    });
    const same = SPOKEN.filter(spoken => !changed.includes(spoken)).map(([name]) => name);
    return `Changed: ${now.join("; ")}.${same.length ? ` Unchanged: ${same.join(", ")}.` : ""}`;
  }

  function mount(host) {
    const { instances, start } = JSON.parse(host.dataset.given);
    const shadow = host.attachShadow({ mode: "open" }); // its styles stay in, those of the page stay out
    shadow.innerHTML = PAGE(instances);
    host.dataset.lmSuppressShortcuts = "true"; // JupyterLab: arrow keys move sliders, not cells
    shadow.addEventListener("keydown", event => event.stopPropagation()); // likewise elsewhere
    const form = shadow.querySelector("form");
    const find = selector => shadow.querySelector(selector);
    const state = { ...start };
    let names, said, waiting;

    function load() {
      const { answers, reference, rewards } = instances[state.instance];
      names = answers;
      Object.assign(state, { rewards: [...rewards], weights: [...reference], moved: answers.map(() => 0), steps: 0 });
      const [low, high] = [Math.floor(Math.min(-2, ...rewards)), Math.ceil(Math.max(2, ...rewards))];
      find(".answers").innerHTML = "<legend>The answers</legend>" + names.map((name, i) =>
        range(`reward${i}`, `reward of ${safe(name)}`, low, high, 0.05)
        + range(`weight${i}`, `weight of ${safe(name)} in π_ref`, 0.01, 1, 0.01)).join("");
      for (const name of ["chosen", "rejected"]) {
        form.elements[name].innerHTML = options(names.map((answer, i) => [i, answer]));
        if (state[name] >= names.length) state[name] = name === "chosen" ? 0 : 1;
      }
      form.elements.beta.min = Math.min(0.05, state.beta);
      form.elements.beta.max = Math.max(3, state.beta);
      for (const control of form.elements) if (control.name) control.value = valueOf(control.name);
    }

    function valueOf(name) {
      const [, list, i] = /^(reward|weight)(\d)$/.exec(name) ?? [];
      return list ? state[`${list}s`][i] : state[name];
    }

    function take({ name, value }) {
      const [, list, i] = /^(reward|weight)(\d)$/.exec(name) ?? [];
      if (list) state[`${list}s`][i] = Number(value);
      else state[name] = ["divergence", "loss"].includes(name) ? value : Number(value);
      if (name === "instance") load();
    }

    function step(times) {
      if (!times) Object.assign(state, { moved: names.map(() => 0), steps: 0 });
      for (let i = 0; i < times; i++) {
        const { push } = compute(state);
        const scale = 1 / Math.max(1, ...push.map(Math.abs)); // no logit moves by more than 1 nat
        state.moved = state.moved.map((value, k) => Math.max(-30, Math.min(30, value + scale * push[k])));
        state.steps++;
      }
    }

    const UNITS = {
      beta: () => `${short(state.beta)} reward per nat`,
      shift: () => `${short(state.shift)} reward`,
      alpha: () => short(state.alpha),
      smoothing: () => `${short(state.smoothing)}, the share of flipped labels`,
      gamma: () => `${short(state.gamma)} reward`,
      way: () => short(state.way) + ({ 0: ", the reference", 1: ", the optimum" }[state.way] ?? ""),
    };

    function label(input, got) {
      const [, list, i] = /^(reward|weight)(\d)$/.exec(input.name) ?? [];
      const value = short(valueOf(input.name));
      const said = list === "weight" ? `${value}, probability ${text(got.reference[i])}`
        : list === "reward" ? `${value} reward` : UNITS[input.name]();
      input.setAttribute("aria-valuetext", said);
      input.parentElement.querySelector(".value").textContent = value;
    }

    function show() {
      const got = compute(state);
      find(".of-alpha").hidden = state.divergence !== "alpha";
      for (const name of ["smoothing", "gamma"]) find(`.of-${name}`).hidden = LOSSES[state.loss][2] !== name;
      for (const input of form.querySelectorAll("input")) label(input, got);
      find("[data-steps='0']").disabled = !state.steps;
      find("[data-steps='0']").textContent = state.steps ? `Undo ${state.steps}` : "Undo them";
      find(".pictures").innerHTML = bars(names, got) + plane(got) + pushes(names, got, state);
      find(".per-answer tbody").innerHTML = names.map((name, i) => row(safe(name), [
        [`reference${i}`, got.reference[i]], [`reward${i}`, got.rewards[i]], [`best${i}`, got.best[i]],
        [`policy${i}`, got.policy[i]], [`implied${i}`, got.implied[i]],
        [`withZ${i}`, got.implied[i] + state.beta * got.logZ], [`push${i}`, got.push[i]]])).join("");
      const line = (title, key, { mean, nats, objective }, below) => row(title, [
        [`${key}Mean`, mean], [`${key}Nats`, nats], [`${key}Objective`, objective], [`${key}Below`, below]]);
      find(".totals tbody").innerHTML = line("reference", "start", got.start, 0)
        + line("optimum", "top", got.top, got.topBelow) + line("π", "at", got.at, got.atBelow);
      find(".pair tbody").innerHTML = [
        ["log Z, nats", "logZ", got.logZ],
        ["shift that makes the optimum sum to 1 (reverse KL: β log Z)", "multiplier", got.multiplier],
        ["true margin, reward of chosen less rejected", "trueMargin", got.trueMargin],
        ["margin of π, implied reward of chosen less rejected", "margin", got.margin],
        ["loss, nats", "loss", got.loss],
        ["∂loss/∂log π(chosen)", "slopeA", got.slopeA],
        ["∂loss/∂log π(rejected)", "slopeB", got.slopeB],
      ].map(([title, key, value]) => row(title, [[key, value]])).join("");
      const now = SPOKEN.map(([, , of]) => of(got, names)).map(value =>
        typeof value === "number" ? text(value) : value);
      clearTimeout(waiting); // a status that speaks at every step of a slider is not heard out
      if (said) waiting = setTimeout(() => {
        const same = state.chosen === state.rejected ? " Chosen and rejected are the same answer." : "";
        find(".says").textContent = compared(said, now) + same;
        said = now;
      }, 500);
      else [said, find(".says").textContent] = [now, "Move a slider: this line says which numbers change."];
    }

    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("input", event => { take(event.target); show(); });
    form.addEventListener("click", event => {
      const { steps } = event.target.dataset;
      if (steps) { step(Number(steps)); show(); }
    });
    new ResizeObserver(() => { // what scrolls is reached by keyboard
      for (const box of shadow.querySelectorAll(".scroll")) {
        const wide = box.scrollWidth > box.clientWidth;
        for (const [name, value] of [["tabindex", 0], ["role", "region"],
          ["aria-label", box.querySelector("caption").textContent]])
          if (wide) box.setAttribute(name, value); else box.removeAttribute(name);
      }
    }).observe(find(".explorer"));
    load();
    show();
  }

  for (const host of document.querySelectorAll("[data-dpo-explorer]")) if (!host.shadowRoot) mount(host);
})();
