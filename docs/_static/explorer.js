// The explorer: a prompt with three or four answers, computed as in dpo_mini. docs/tests compares.
"use strict";

(() => {
  const INSTANCES = { // of dpo_mini.tasks
    four: { reference: [0.4, 0.3, 0.2, 0.1], rewards: [1, 0.2, -0.4, 0.8] },
    three: { reference: [0.5, 0.3, 0.2], rewards: [1, 0, -0.5] },
    flat: { reference: [0.25, 0.25, 0.25, 0.25], rewards: [0, 0, 0, 0] },
  };

  // --- mathematics ---------------------------------------------------------------------------

  const sum = values => values.reduce((total, value) => total + value, 0);
  const dot = (p, q) => sum(p.map((value, i) => value * q[i]));
  const sigmoid = x => 1 / (1 + Math.exp(-x));
  const bump = x => sigmoid(x) * sigmoid(-x); // the slope of sigmoid
  const logSigmoid = x => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));
  const kl = (p, q) => sum(p.map((value, i) => value > 0 ? value * Math.log(value / q[i]) : 0));

  function softmax(logits) {
    const top = Math.max(...logits);
    const weights = logits.map(value => Math.exp(value - top));
    return weights.map(weight => weight / sum(weights));
  }

  function logSumExp(values) {
    const top = Math.max(...values);
    return top + Math.log(sum(values.map(value => Math.exp(value - top))));
  }

  // f' as a function of u = log(pi / pi_ref), its slope, and back: pi / pi_ref where f' is s.
  // `top` is the largest value that f' takes.
  const DIVERGENCES = {
    reverse_kl: () => ({ of: u => u, slope: () => 1 }),
    forward_kl: () => ({
      of: u => 1 - Math.exp(-u), slope: u => Math.exp(-u), back: s => 1 / (1 - s), top: 1,
    }),
    js: () => ({
      of: u => Math.LN2 + logSigmoid(u), slope: u => sigmoid(-u),
      back: s => Math.exp(s) / (2 - Math.exp(s)), top: Math.LN2,
    }),
    alpha: alpha => ({
      of: u => Math.expm1((alpha - 1) * u) / (alpha - 1), slope: u => Math.exp((alpha - 1) * u),
      back: s => (1 + (alpha - 1) * s) ** (1 / (alpha - 1)), top: 1 / (1 - alpha),
    }),
  };

  // The policy that maximises E[r] - beta D_f, and the multiplier that makes it sum to 1.
  function optimum(reference, rewards, beta, f) {
    if (!f.back) { // reverse KL: the exponential comes out of the sum, and the multiplier is beta log Z
      const logits = reference.map((q, i) => Math.log(q) + rewards[i] / beta);
      return { policy: softmax(logits), multiplier: beta * logSumExp(logits) };
    }
    const best = Math.max(...rewards);
    const at = level => reference.map((q, i) => q * f.back((rewards[i] - level) / beta));
    let [low, high] = [best - beta * f.top, best]; // too much mass, and not enough
    for (let step = 0; step < 100; step++) {
      const middle = (low + high) / 2;
      if (sum(at(middle)) > 1) low = middle; else high = middle;
    }
    const policy = at(high);
    return { policy: policy.map(p => p / sum(policy)), multiplier: high };
  }

  // [loss, slope in a, slope in b], where a and b are the log-ratios of the chosen and the rejected.
  const ofMargin = (value, slope) => (a, b, { beta, e }) => {
    const x = beta * (a - b);
    return [value(x, e), beta * slope(x, e), -beta * slope(x, e)];
  };
  const LOSSES = {
    dpo_loss: ["DPO", ofMargin(x => -logSigmoid(x), x => -sigmoid(-x))],
    cdpo_loss: ["cDPO", ofMargin(
      (x, e) => -(1 - e) * logSigmoid(x) - e * logSigmoid(-x),
      (x, e) => -(1 - e) * sigmoid(-x) + e * sigmoid(x))],
    rdpo_loss: ["rDPO", ofMargin(
      (x, e) => (-(1 - e) * logSigmoid(x) + e * logSigmoid(-x)) / (1 - 2 * e),
      (x, e) => (-(1 - e) * sigmoid(-x) - e * sigmoid(x)) / (1 - 2 * e))],
    ipo_loss: ["IPO", (a, b, { beta }) => {
      const miss = a - b - 1 / (2 * beta);
      return [miss ** 2, 2 * miss, -2 * miss];
    }],
    hinge_loss: ["hinge", ofMargin(x => Math.max(0, 1 - x), x => x < 1 ? -1 : 0)],
    exo_loss: ["EXO", ofMargin(
      (x, e) => sigmoid(x) * (logSigmoid(x) - Math.log(1 - e)) + sigmoid(-x) * (logSigmoid(-x) - Math.log(e)),
      (x, e) => bump(x) * (x - Math.log(1 - e) + Math.log(e)))],
    discopop_loss: ["DiscoPOP", ofMargin(
      x => -sigmoid(-x / 0.05) * logSigmoid(x) + sigmoid(x / 0.05) * Math.exp(-x),
      x => bump(x / 0.05) / 0.05 * (logSigmoid(x) + Math.exp(-x))
        - sigmoid(-x / 0.05) * sigmoid(-x) - sigmoid(x / 0.05) * Math.exp(-x))],
    f_dpo_loss: ["f-DPO, with the divergence above", (a, b, { beta, f }) => {
      const x = beta * (f.of(a) - f.of(b));
      return [-logSigmoid(x), -beta * sigmoid(-x) * f.slope(a), beta * sigmoid(-x) * f.slope(b)];
    }],
    nca_loss: ["NCA", (a, b, { beta }) => [
      -logSigmoid(beta * a) - (logSigmoid(-beta * a) + logSigmoid(-beta * b)) / 2,
      beta * (sigmoid(beta * a) / 2 - sigmoid(-beta * a)), beta * sigmoid(beta * b) / 2]],
    bco_loss: ["BCO", (a, b, { beta }) => [
      -logSigmoid(beta * a) - logSigmoid(-beta * b), -beta * sigmoid(-beta * a), beta * sigmoid(beta * b)]],
    sppo_loss: ["SPPO", (a, b, { beta }) => {
      const [miss, other] = [a - 1 / (2 * beta), b + 1 / (2 * beta)];
      return [miss ** 2 + other ** 2, 2 * miss, 2 * other];
    }],
    apo_zero_loss: ["APO-zero", (a, b, { beta }) => [
      sigmoid(-beta * a) + sigmoid(beta * b), -beta * bump(beta * a), beta * bump(beta * b)]],
    apo_down_loss: ["APO-down", (a, b, { beta }) => [
      sigmoid(beta * a) + sigmoid(beta * (b - a)),
      beta * bump(beta * a) - beta * bump(beta * (a - b)), beta * bump(beta * (a - b))]],
  };
  const SMOOTHED = ["cdpo_loss", "rdpo_loss", "exo_loss"];

  const measure = (policy, { reference, rewards, beta }) => {
    const [mean, nats] = [dot(policy, rewards), kl(policy, reference)];
    return { mean, nats, objective: mean - beta * nats };
  };

  // The highest reward at a KL: pi* of the price that spends as much.
  function frontierAt(nats, { reference, rewards }) {
    const at = price => optimum(reference, rewards, price, {}).policy;
    let [low, high] = [-20, 20]; // log of the price; KL falls as it rises
    for (let step = 0; step < 80; step++) {
      const middle = (low + high) / 2;
      if (kl(at(Math.exp(middle)), reference) > nats) low = middle; else high = middle;
    }
    return dot(at(Math.exp(high)), rewards);
  }

  function compute(given) {
    const { beta, way, chosen, rejected, loss, e } = given;
    const total = sum(given.weights);
    const reference = given.weights.map(weight => weight / total);
    const task = { reference, rewards: given.rewards, beta };
    const f = DIVERGENCES[given.divergence](given.alpha);
    const { policy: best, multiplier } = optimum(reference, given.rewards, beta, f);
    const policy = softmax(reference.map((q, i) => Math.log(q) + way * Math.log(best[i] / q)));
    const ratios = policy.map((p, i) => Math.log(p / reference[i]));
    const [value, slopeA, slopeB] = LOSSES[loss][1](ratios[chosen], ratios[rejected], { beta, e, f });
    const step = policy.map((p, i) => // minus the gradient in the logits
      -slopeA * ((i === chosen) - p) - slopeB * ((i === rejected) - p));
    const logZ = logSumExp(reference.map((q, i) => Math.log(q) + given.rewards[i] / beta));
    const at = measure(policy, task);
    const below = { best: frontierAt(measure(best, task).nats, task) - measure(best, task).mean,
      policy: frontierAt(at.nats, task) - at.mean };
    return { reference, best, policy, multiplier, logZ, value, slopeA, slopeB, step, task, below,
      implied: ratios.map(u => beta * u), start: measure(reference, task), top: measure(best, task), at };
  }

  // --- the page ------------------------------------------------------------------------------

  const NAMES = "abcd";
  const VALUE = '<span class="value" aria-hidden="true"></span>'; // a slider says its value itself
  const text = value => (Object.is(+value.toFixed(4), -0) ? 0 : value).toFixed(4).replace("-", "−");
  const cell = (key, value) => `<td data-key="${key}" data-value="${value}">${text(value)}</td>`;

  function bars({ reference, best, policy }) {
    const n = reference.length;
    const height = p => 120 * p;
    const groups = reference.map((_, i) => {
      const x = 30 + i * 280 / n;
      const bar = (k, p, kind) =>
        `<rect class="${kind}" x="${x + k * 16}" y="${135 - height(p)}" width="14" height="${height(p)}"/>`;
      return bar(0, reference[i], "ref") + bar(1, best[i], "best") + bar(2, policy[i], "now")
        + `<text x="${x + 23}" y="150" text-anchor="middle">${NAMES[i]}</text>`;
    });
    const said = `Probabilities of ${n} answers under the reference, the optimum and the policy.`;
    return figure(said, groups.join(""), "probability: reference (dotted), optimum (outlined), π (filled)");
  }

  function figure(said, inner, caption) {
    return `<figure><svg viewBox="0 0 320 160" role="img" aria-label="${said}">${inner}</svg>`
      + `<figcaption>${caption}</figcaption></figure>`;
  }

  function plane({ task, at, top }) {
    const { reference, rewards } = task;
    const points = Array.from({ length: 81 }, (_, i) =>
      measure(optimum(reference, rewards, 10 ** (2 - i / 20), {}).policy, task));
    const widest = Math.max(...points.map(p => p.nats), at.nats, top.nats, 1e-9);
    const [least, most] = [Math.min(...rewards), Math.max(...rewards)];
    const x = point => 30 + 270 * point.nats / widest;
    const y = point => 135 - 120 * (point.mean - least) / (most - least || 1);
    const line = points.map(point => `${x(point).toFixed(2)},${y(point).toFixed(2)}`).join(" ");
    const inner = `<polyline class="frontier" points="${line}"/><path class="axis" d="M30 15V135H300"/>
      <circle class="best" cx="${x(top)}" cy="${y(top)}" r="6"/>
      <circle class="now" cx="${x(at)}" cy="${y(at)}" r="4"/>
      <text x="300" y="152" text-anchor="end">KL, 0 to ${widest.toFixed(2)} nats</text>
      <text x="34" y="12">reward, ${text(least)} to ${text(most)}</text>`;
    return figure(`Reward against KL: the exact frontier; π at ${text(at.nats)} nats and ${text(at.mean)}.`,
      inner, "the exact frontier (dashed), the optimum (ring), π (dot)");
  }

  function mount(root) {
    const [form, results] = [root.querySelector("form"), root.querySelector(".results")];
    const field = name => form.elements[name];
    const number = name => Number(field(name).value);
    let saying;

    field("loss").innerHTML = Object.entries(LOSSES)
      .map(([name, [title]]) => `<option value="${name}">${title}</option>`).join("");

    function load() {
      const { reference, rewards } = INSTANCES[field("instance").value];
      form.querySelector(".answers").innerHTML = "<legend>The answers</legend>" + reference.map((q, i) => `
        <label>reward of ${NAMES[i]} ${VALUE}
          <input type="range" name="reward${i}" min="-2" max="2" step="0.05" value="${rewards[i]}"></label>
        <label>weight of ${NAMES[i]} in π_ref ${VALUE}
          <input type="range" name="weight${i}" min="0.01" max="1" step="0.01" value="${q}"></label>`).join("");
      for (const [name, first] of [["chosen", 0], ["rejected", 1]])
        field(name).innerHTML = reference.map((_, i) =>
          `<option value="${i}" ${i === first ? "selected" : ""}>${NAMES[i]}</option>`).join("");
    }

    function show() {
      const size = INSTANCES[field("instance").value].rewards.length;
      const all = name => Array.from({ length: size }, (_, i) => number(name + i));
      const given = {
        beta: number("beta"), way: number("way"), alpha: number("alpha"), e: number("smoothing"),
        chosen: number("chosen"), rejected: number("rejected"), loss: field("loss").value,
        divergence: field("divergence").value, rewards: all("reward"), weights: all("weight"),
      };
      form.querySelector(".only-alpha").hidden = given.divergence !== "alpha";
      form.querySelector(".only-smoothing").hidden = !SMOOTHED.includes(given.loss);
      for (const range of form.querySelectorAll("input"))
        range.parentElement.querySelector(".value").textContent = range.value.replace("-", "−");
      const got = compute(given);
      results.querySelector(".pictures").innerHTML = bars(got) + plane(got);
      results.querySelector(".per-answer tbody").innerHTML = got.reference.map((_, i) =>
        `<tr><th scope="row">${NAMES[i]}</th>${cell(`reference${i}`, got.reference[i])}
        ${cell(`reward${i}`, given.rewards[i])}${cell(`best${i}`, got.best[i])}${cell(`policy${i}`, got.policy[i])}
        ${cell(`implied${i}`, got.implied[i])}${cell(`step${i}`, got.step[i])}</tr>`).join("");
      const line = (title, key, { mean, nats, objective }, below) =>
        `<tr><th scope="row">${title}</th>${cell(`${key}Mean`, mean)}${cell(`${key}Nats`, nats)}
        ${cell(`${key}Objective`, objective)}${cell(`${key}Below`, below)}</tr>`;
      results.querySelector(".totals tbody").innerHTML = line("reference", "start", got.start, 0)
        + line("optimum", "top", got.top, got.below.best) + line("π", "at", got.at, got.below.policy);
      const row = (title, key, value) => `<tr><th scope="row">${title}</th>${cell(key, value)}</tr>`;
      results.querySelector(".pair tbody").innerHTML =
        row("log Z, nats", "logZ", got.logZ)
        + row("multiplier λ of the divergence (reverse KL: β log Z)", "multiplier", got.multiplier)
        + row("margin of π, implied reward of chosen less rejected", "margin",
          got.implied[given.chosen] - got.implied[given.rejected])
        + row("loss", "loss", got.value)
        + row("∂loss/∂ log π(chosen)", "slopeA", got.slopeA)
        + row("∂loss/∂ log π(rejected)", "slopeB", got.slopeB);
      const same = given.chosen === given.rejected ? " Chosen and rejected are the same answer." : "";
      clearTimeout(saying); // a live region that speaks at every step of a slider is not heard out
      saying = setTimeout(() => {
        results.querySelector(".says").textContent =
          `At β ${given.beta} the optimum has J ${text(got.top.objective)}, and log Z is ${text(got.logZ)}. `
          + `π has J ${text(got.at.objective)} at ${text(got.at.nats)} nats; the ${LOSSES[given.loss][0]} `
          + `loss of ${NAMES[given.chosen]} over ${NAMES[given.rejected]} is ${text(got.value)}.${same}`;
      }, 300);
    }

    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("input", event => {
      if (event.target.name === "instance") load();
      show();
    });
    load();
    show();
    form.hidden = results.hidden = false;
  }

  addEventListener("DOMContentLoaded", () => document.querySelectorAll(".explorer").forEach(mount));
})();
