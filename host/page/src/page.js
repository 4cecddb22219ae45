// The live page: asks what has changed, reads that, draws. Texts come from data and are only ever set as text.
"use strict";

const COLOURS = 8, POLL_MS = 2000, REST_MS = 10000;
const MARGIN = { left: 46, right: 56, top: 8, bottom: 22 }, HEIGHT = 180, LABEL = 13;
const LINES = ["logging.jsonl", "remarks.jsonl", "samples.jsonl", "answers.jsonl"];
const page = { charts: [], runs: new Map(), step: null, lost: "", whose: null, when: null };

const $ = (id) => document.getElementById(id);
const shown = () => [...page.runs.values()].filter((run) => !run.hidden);
const lines = (run, name) => run.files[name] ?? [];
const facts = (run) => run.files["run.json"] ?? {};

/** An element with attributes and children, which are elements or texts. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "polyline", "circle", "text", "line"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Fills a section's body, and hides the section where there is nothing. */
function fill(id, ...children) {
  $(id).replaceChildren(...children);
  $(id).closest("section").hidden = children.length === 0;
}

function short(value) {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "–";
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replaceAll("-", "−");
  const text = value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.01 ? 3 : 5);
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text).replace("-", "−");
}

/** A tick with the digits that set it apart from the next. */
function tick(value, all) {
  const step = Math.abs(all.length > 1 ? all[1] - all[0] : value), size = Math.abs(value);
  if (size < step / 2) return "0";
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replaceAll("-", "−");
  return value.toFixed(Math.min(7, Math.max(0, Math.ceil(-Math.log10(step) + 1e-9)))).replace("-", "−");
}

const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const plain = (value, digits) => value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");

function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s / 60) % 60)} min`;
  return `${Math.floor(s / 86400)} days`;
}

/* Reading. */

async function poll() {
  let wait = POLL_MS;
  if (!document.hidden) {
    try {
      const { charts, runs } = await (await ask("/runs")).json();
      const changed = await Promise.all(runs.map(refresh));
      const again = page.lost || page.charts.length === 0;
      page.charts = charts;
      page.lost = "";
      if (again || changed.some(Boolean)) draw();
      else head();
      if (runs.every((run) => run.done || run.silent_s > 600)) wait = REST_MS;
    } catch (error) {
      page.lost = error.status ? error.message : "The server has ended; this is what it said last.";
      head();
    }
  }
  setTimeout(poll, wait);
}

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return answer;
}

/** Reads what has changed of a run; answers whether anything has. */
async function refresh(told) {
  if (!page.runs.has(told.id)) {
    page.runs.set(told.id, { id: told.id, colour: `r${told.id % COLOURS}`, hidden: false, stamps: {}, files: {} });
  }
  const run = page.runs.get(told.id);
  const before = `${run.name} ${run.done}`;
  Object.assign(run, { name: told.name, folder: told.folder, done: told.done, silent: told.silent_s, told: Date.now() });
  run.leftOut = told.left_out;
  const stale = Object.keys(told.files).filter((name) => told.files[name] !== run.stamps[name]);
  await Promise.all(stale.map(async (name) => {
    const text = await (await ask(`/runs/${told.id}/${name}`)).text();
    run.files[name] = LINES.includes(name) ? text.split("\n").flatMap(parsed) : parsed(text)[0];
    run.stamps[name] = told.files[name];
  }));
  return stale.length > 0 || before !== `${run.name} ${run.done}`;
}

/** A line that was cut, or of a file that is being replaced, is none. */
function parsed(text) {
  try { return [JSON.parse(text)]; } catch { return []; }
}

/* What comes first. */

function last(run, name) {
  const all = lines(run, "logging.jsonl");
  for (let i = all.length - 1; i >= 0; i--) if (typeof all[i][name] === "number") return all[i][name];
  return undefined;
}

function state(run) {
  const step = last(run, "global_step") ?? 0, total = facts(run).total_steps;
  const silent = (run.silent ?? 0) + (Date.now() - run.told) / 1000;
  if (run.done) return { step, total, text: "finished" };
  if (step === 0) return { step, total, text: silent > 600 ? `silent for ${duration(silent)}` : "waiting for the first step" };
  const all = lines(run, "logging.jsonl").filter((line) => line.elapsed_s !== undefined);
  // A resumed run counts its seconds anew.
  let first = all.length - 1;
  while (first > 0 && all.length - first < 20 && all[first - 1].elapsed_s < all[first].elapsed_s) first--;
  const [a, b] = [all[first], all.at(-1)];
  const pace = b && a !== b ? (b.elapsed_s - a.elapsed_s) / (b.global_step - a.global_step) : undefined;
  const interval = pace ? pace * (b.global_step - all.at(-2).global_step) : 60;
  if (silent > Math.max(60, 5 * interval)) return { step, total, text: `silent for ${duration(silent)}` };
  const seconds = pace * (total - step) - Math.min(silent, interval);
  const rough = seconds > 120 && seconds < 3600 ? `${Math.round(seconds / 60)} min` : duration(seconds);
  const left = pace && total ? `, about ${rough} left` : "";
  return { step, total, text: `running${left}` };
}

function head() {
  const runs = [...page.runs.values()], one = runs.length === 1 ? runs[0] : null;
  if (runs.length) $("title").textContent = one ? one.name : `${runs.length} runs`;
  document.title = `${one ? `${state(one).text} · ${one.name}` : `${runs.length} runs`} – dpo-host`;
  $("about").textContent = one ? about(one) : "";
  $("about").hidden = !one || about(one) === "";
  $("state").textContent = page.lost || (one ? summary(state(one)) : "");
  $("figures").hidden = !one;
  $("progress").hidden = !one || one.done;
  $("runs").hidden = Boolean(one) || runs.length === 0;
  if (one) figures(one); else table(runs);
}

const summary = ({ step, total, text }) => [text, total ? `step ${step} of ${total}` : ""].filter(Boolean).join(" · ");

function about(run) {
  const f = facts(run);
  if (!f.model) return run.leftOut.join(" · ");
  const parts = [f.family, f.model.split("/").slice(-2).join("/"), f.device];
  if (f.ranks > 1) parts.push(`${f.ranks} ranks`);
  parts.push(`${f.examples} examples`);
  if (f.validation_examples) parts.push(`${f.validation_examples} to evaluate on`);
  parts.push(`${f.parameters.toLocaleString("en")} adapter parameters`);
  return [...parts, ...run.leftOut].join(" · ");
}

function figures(run) {
  const { step, total } = state(run);
  $("progress").firstElementChild.style.width = `${total ? (100 * step) / total : 0}%`;
  const first = (name) => lines(run, "logging.jsonl").find((line) => typeof line[name] === "number")?.[name];
  const learned = (title, name) => {
    if (last(run, name) === undefined) return [];
    const held = last(run, `eval_${name}`);
    return [[title, short(last(run, name)), `from ${short(first(name))}${held === undefined ? "" : `, eval ${short(held)}`}`]];
  };
  const figure = (title, name, note) => (last(run, name) === undefined ? [] : [[title, short(last(run, name)), note]]);
  const all = [
    ...learned("Loss", "loss"),
    ...learned("Margin", "rewards/margins"),
    ...learned("Accuracy", "rewards/accuracies"),
    ...figure("Tokens per second", "tokens_per_second", ""),
    ...figure("Memory, GiB", "memory_gib", "at most"),
    ...(last(run, "elapsed_s") === undefined ? [] : [["Time", duration(last(run, "elapsed_s")), "since it began"]]),
  ];
  const cells = all.map(([title, value, note]) => make("div", {}, make("span", {}, title), make("b", {}, value), make("i", {}, note)));
  $("figures").replaceChildren(...cells);
}

/** Runs side by side: the legend, what is shown, and where each of them stands. */
function table(runs) {
  const focused = document.activeElement?.dataset?.run;
  const numbers = [["loss", "loss"], ["eval loss", "eval_loss"], ["margin", "rewards/margins"], ["accuracy", "rewards/accuracies"],
    ["eval accuracy", "eval_rewards/accuracies"], ["tokens/s", "tokens_per_second"], ["GiB", "memory_gib"]];
  const used = numbers.filter(([, name]) => runs.some((run) => last(run, name) !== undefined));
  const row = (run) => {
    const box = make("input", { type: "checkbox", "data-run": run.id });
    box.checked = !run.hidden;
    box.addEventListener("change", () => { run.hidden = !box.checked; draw(); });
    const at = state(run);
    return make("tr", { class: `${run.colour} ${run.hidden ? "off" : ""}` },
      make("td", { title: run.folder }, make("label", {}, box, run.name)),
      make("td", { class: "n" }, at.total ? `${at.step} of ${at.total}` : `${at.step}`),
      ...used.map(([, name]) => make("td", { class: "n" }, last(run, name) === undefined ? "" : short(last(run, name)))),
      make("td", { class: "state" }, at.text));
  };
  const titles = ["run", "step", ...used.map(([title]) => title), ""];
  const top = titles.map((title, i) => make("th", i > 0 && i < titles.length - 1 ? { class: "n" } : {}, title));
  $("runs").replaceChildren(make("table", {}, make("tr", {}, ...top), ...runs.map(row)));
  $("runs").querySelector(`[data-run="${focused}"]`)?.focus();
}

/* Curves. */

function draw() {
  head();
  const runs = shown(), several = page.runs.size > 1;
  const said = runs.flatMap((run) => lines(run, "remarks.jsonl").map((line) => ({ run, ...line })));
  fill("remarks", ...said.map(({ run, global_step, kind, text, help }) => make("p", {},
    make("span", {}, `${several ? `${run.name} · ` : ""}step ${global_step} · ${kind}`), text, make("i", {}, help ?? ""))));
  // Charts stay the same elements, so that focus and the pointer stay with them.
  const figures = $("curves").children.length ? [...$("curves").children] : page.charts.map(figure);
  fill("curves", ...(runs.length && page.charts.length ? figures : []));
  page.charts.forEach((chart, i) => figures[i] && chartOf(figures[i], chart, runs));
  mark();
  drawSamples(runs);
  const data = runs.filter((run) => facts(run).data_line), alike = new Set(data.map((run) => facts(run).data_line)).size === 1;
  fill("data", ...(alike ? data.slice(0, 1) : data).map((run) => make("p", { class: "pre" },
    alike ? "" : `${run.name}: `, facts(run).data_line.replace(/\n\s+/g, "\n"))));
  drawSettings(runs);
}

function figure(chart) {
  const box = make("figure", { class: "chart" },
    make("figcaption", {}, make("b", {}, chart.title), make("span", { class: "now" })),
    make("svg", { tabindex: 0, role: "img", height: HEIGHT }));
  const svg = box.querySelector("svg");
  svg.addEventListener("pointermove", (event) => {
    const { x, steps } = box.drawn ?? {};
    if (!x) return;
    const at = event.clientX - svg.getBoundingClientRect().left;
    point(steps.reduce((best, step) => (Math.abs(x(step) - at) < Math.abs(x(best) - at) ? step : best), steps[0]));
  });
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("blur", () => point(null));
  svg.addEventListener("keydown", (event) => {
    const steps = box.drawn?.steps ?? [], at = page.step === null ? steps.length : steps.indexOf(page.step);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") point(null);
    if (to === undefined || !steps.length) return;
    event.preventDefault();
    point(steps[Math.max(0, Math.min(steps.length - 1, to))]);
  });
  return box;
}

function point(step) {
  if (step !== page.step) { page.step = step; mark(); }
}

/** The curves of a chart: of every run its series, and points of evaluations. */
function chartOf(box, chart, runs) {
  const points = (run, name) => lines(run, "logging.jsonl").flatMap((line) =>
    (typeof line[name] === "number" ? [[line.global_step, line[name]]] : []));
  const curves = runs.flatMap((run) => chart.series.map(({ name, label }, i) =>
    ({ run, label, dashed: i > 0, curve: points(run, name), held: points(run, `eval_${name}`) })));
  const all = curves.flatMap(({ curve, held }) => [...curve, ...held]);
  const svg = box.querySelector("svg");
  box.hidden = all.length === 0;
  box.drawn = null;
  if (box.hidden) return;
  const width = svg.getBoundingClientRect().width || 340, right = width - MARGIN.right;
  const [s0, s1] = widened(extent(all, 0)), [v0, v1] = widened(extent(all, 1));
  const x = (step) => MARGIN.left + ((step - s0) / (s1 - s0)) * (right - MARGIN.left);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - v0) / (v1 - v0)) * (HEIGHT - MARGIN.bottom - MARGIN.top);
  const parts = ticks(v0, v1, 4).flatMap((value, _, all) => [
    make("path", { class: "grid", d: `M${MARGIN.left} ${y(value)}H${right}` }),
    make("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, tick(value, all))]);
  for (const step of ticks(s0, s1, 4).filter(Number.isInteger)) {
    parts.push(make("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle", class: "tick" }, String(step)));
  }
  if (chart.guide !== null && chart.guide > v0 && chart.guide < v1) {
    parts.push(make("path", { class: "guide", d: `M${MARGIN.left} ${y(chart.guide)}H${right}` }));
  }
  for (const { run, dashed, curve, held } of curves) {
    const path = curve.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    parts.push(make("polyline", { class: `curve ${run.colour} ${dashed ? "dashed" : ""}`, points: path }));
    if (curve.length === 1) parts.push(make("circle", { class: `mark ${run.colour}`, cx: x(curve[0][0]), cy: y(curve[0][1]), r: 3 }));
    for (const [step, value] of held) parts.push(make("circle", { class: `dot ${run.colour}`, cx: x(step), cy: y(value), r: 2.5 }));
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", `${chart.title}: ${curves.map(({ run, label, curve }) =>
    `${run.name} ${label} ${curve.length ? short(curve.at(-1)[1]) : ""}`).join(", ")}`);
  box.drawn = { x, y, right, curves, steps: [...new Set(all.map(([step]) => step))].sort((a, b) => a - b) };
}

/** Labels moved apart, where they would lie on each other. */
function spread(labels) {
  labels.sort((a, b) => a.at - b.at);
  labels.forEach((label, i) => { if (i) label.at = Math.max(label.at, labels[i - 1].at + LABEL); });
  const over = labels.length ? Math.max(0, labels.at(-1).at - (HEIGHT - MARGIN.bottom)) : 0;
  return labels.map((label) => ({ ...label, at: label.at - over }));
}

/** The cursor in every chart. Labels at the curves' ends are the last values; with a cursor they are those at it. */
function mark() {
  const there = page.step !== null;
  for (const box of $("curves").children) {
    if (!box.drawn) continue;
    const { x, y, right, curves } = box.drawn, svg = box.querySelector("svg");
    svg.querySelectorAll(".at").forEach((element) => element.remove());
    if (there) {
      svg.append(make("line", { class: "cursor at", x1: x(page.step), x2: x(page.step), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
        make("text", { class: "here at", x: x(page.step), y: HEIGHT - 6, "text-anchor": "middle" }, `step ${page.step}`));
    }
    svg.querySelectorAll(".tick").forEach((tick) => {
      tick.setAttribute("visibility", there && Math.abs(tick.getAttribute("x") - x(page.step)) < 44 ? "hidden" : "visible");
    });
    const labels = [], held = new Map();
    for (const curve of curves) {
      const [now, evaluated] = [at(curve.curve), at(curve.held, there)];
      if (evaluated) held.set(curve.run, [...(held.get(curve.run) ?? []), short(evaluated[1])]);
      if (!now) continue;
      if (there) svg.append(make("circle", { class: `mark at ${curve.run.colour}`, cx: x(now[0]), cy: y(now[1]), r: 3.5 }));
      labels.push({ at: y(now[1]), text: (!there && curve.label) || short(now[1]), colour: curve.run.colour });
    }
    // Beside many runs the table says more.
    const told = labels.length <= 6 || (there && labels.length <= 11) ? spread(labels) : [];
    svg.append(...told.map(({ at, text, colour }) => make("text", { class: `label at ${colour}`, x: right + 7, y: at + 4 }, text)));
    // Many numbers in a row are no longer read.
    const few = [...held.values()].flat().length <= 4;
    const words = (few ? [...held] : []).map(([run, values]) => make("span", { class: `key ${run.colour}` }, ` ○ ${values.join(" / ")}`));
    box.querySelector(".now").replaceChildren(...(words.length ? ["eval", ...words] : []));
  }
}

/** A curve's point at the cursor, or the one before it; of evaluations only the one there. */
function at(curve, exact = false) {
  if (page.step === null) return curve.at(-1);
  const before = curve.filter(([step]) => (exact ? step === page.step : step <= page.step));
  return before.at(-1);
}

function extent(points, axis) {
  let [low, high] = [Infinity, -Infinity];
  for (const point of points) { low = Math.min(low, point[axis]); high = Math.max(high, point[axis]); }
  return [low, high];
}

/** A flat curve is drawn in the middle. */
function widened([low, high]) {
  const room = high > low ? (high - low) * 0.04 : Math.max(Math.abs(low) * 0.1, 1e-12);
  return [low - room, high + room];
}

function ticks(low, high, about) {
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
  const all = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9 && all.length < 12; n++) all.push(Number((n * step).toPrecision(12)));
  return all;
}

/* Sample examples. */

function drawSamples(runs) {
  const with_samples = runs.filter((run) => lines(run, "samples.jsonl")[0]?.examples);
  const run = with_samples.find((r) => r.id === page.whose) ?? with_samples[0];
  const whose = $("whose").querySelector("select"), when = $("when");
  $("whose").hidden = with_samples.length < 2;
  whose.replaceChildren(...with_samples.map((r) => make("option", { value: r.id }, r.name)));
  if (!run) return fill("samples");
  whose.value = run.id;
  const all = lines(run, "samples.jsonl");
  // The slider stays at the newest step until it is moved.
  const newest = all.length - 1, place = page.when === null ? newest : Math.min(page.when, newest);
  when.max = newest;
  when.value = place;
  when.disabled = newest === 0;
  when.setAttribute("aria-valuetext", `step ${all[place].global_step}`);
  when.nextElementSibling.textContent = `${all[place].global_step}`;
  fill("samples", ...all[0].examples.map((example, i) => make("article", {},
    make("h3", {}, example.place), make("pre", { class: "prompt" }, example.prompt),
    make("div", { class: "answers" }, ...example.answers.map((texts, a) => answer(texts, all[0].scores[i][a], all[place].scores[i]?.[a]))))));
  const told = runs.flatMap((r) => lines(r, "answers.jsonl"));
  fill("answers", ...told.map(({ prompt, before, after }) => make("article", {}, make("pre", { class: "prompt" }, prompt),
    make("div", { class: "answers" }, ...[["before", before], ["after", after]].map(([name, text]) =>
      make("div", { class: "answer" }, make("h4", {}, name), make("pre", {}, text)))))));
}

function answer(texts, before, after) {
  const now = make("span", { class: "now" }), change = after.sum - before.sum;
  const whole = () => now.replaceChildren(`log-prob ${plain(before.sum, 1)} → ${plain(after.sum, 1)} `,
    make("b", { class: change < 0 ? "less" : "more" }, signed(change, 1)));
  whole();
  const tokens = texts.tokens.map((text, i) => {
    const [a, b] = [before.logps[i], after.logps[i]];
    if (a === undefined || b === undefined) return text;
    const token = make("span", { class: `token ${tint(b - a)}` }, text);
    token.addEventListener("pointerenter", () => now.replaceChildren(`${plain(a, 2)} → ${plain(b, 2)} `,
      make("b", { class: b < a ? "less" : "more" }, signed(b - a, 2))));
    token.addEventListener("pointerleave", whole);
    return token;
  });
  if (texts.more) tokens.push(make("i", {}, ` … ${texts.more} tokens more`));
  return make("div", { class: "answer" }, make("h4", {}, texts.name, now), make("pre", {}, ...tokens));
}

/** The class of a token whose log-prob changed by so much, as in report.html. */
function tint(change) {
  const steps = [0.05, 0.2, 0.8, 3.2].filter((step) => Math.abs(change) >= step).length;
  return steps ? (change < 0 ? "n" : "p") + steps : "";
}

/* Settings. */

const setting = (value) => (value === null || value === undefined ? "" : Array.isArray(value) ? value.join(" ") : String(value));

function drawSettings(runs) {
  const told = runs.filter((run) => run.files["args.json"]);
  // What the flags came to stands beside them, as an object.
  const isFlag = ([, value]) => value === null || typeof value !== "object" || Array.isArray(value);
  const names = [...new Set(told.flatMap((run) => Object.entries(run.files["args.json"]).filter(isFlag).map(([name]) => name)))];
  const row = (name) => told.map((run) => setting(run.files["args.json"][name]));
  const list = (some) => make("dl", {}, ...some.filter((name) => row(name)[0]).map((name) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, row(name)[0]))));
  if (told.length < 2) return fill("settings", ...(told.length ? [list(names)] : []));
  // Where a run is written is what it is named after.
  const differing = names.filter((name) => name !== "output_dir" && new Set(row(name)).size > 1);
  const top = make("tr", {}, make("th", {}, ""), ...told.map((run) => make("th", { class: `n ${run.colour}` }, run.name)));
  const rows = differing.map((name) => make("tr", {}, make("td", { class: "muted" }, name), ...row(name).map((v) => make("td", { class: "n" }, v || "–"))));
  const rest = names.filter((name) => name !== "output_dir" && !differing.includes(name));
  const open = $("settings").querySelector("details")?.open;
  const same = make("details", {}, make("summary", {}, "settings that are the same"), list(rest));
  same.open = Boolean(open);
  fill("settings", make("div", { class: "wide" }, make("table", {}, top, ...rows)), same);
}

$("when").addEventListener("input", (event) => {
  page.when = event.target.value === event.target.max ? null : Number(event.target.value);
  drawSamples(shown());
});
$("whose").querySelector("select").addEventListener("change", (event) => {
  page.whose = Number(event.target.value);
  page.when = null;
  drawSamples(shown());
});
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 100); });
addEventListener("visibilitychange", () => { if (!document.hidden) head(); });
poll();
