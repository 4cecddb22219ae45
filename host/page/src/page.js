// The live page: asks what has changed, reads that, draws.

import { $, best, choose, facts, last, lines, look, make, page, placed, points, series, shown, view } from "./shared.js";
import { duration, short } from "./numbers.js";
import { drawCurves, zoom } from "./curves.js";
import { drawDetails } from "./details.js";
import { drawTable, noteOf, state } from "./table.js";
import { saveNumbers } from "./download.js";
import { actOf, open } from "./start.js";

const POLL_MS = 2000, REST_MS = 10000;
const TEXTS = ["console.log"];
const LINES = ["logging.jsonl", "remarks.jsonl", "samples.jsonl", "answers.jsonl", "generated.jsonl"];

/* Reading. */

let asked;
async function poll() {
  let wait = POLL_MS;
  if (!document.hidden) {
    try {
      const { charts, runs, starts } = await (await ask("/runs")).json();
      const first = page.charts.length === 0;
      page.starts = starts;
      const changed = await Promise.all(runs.map(refresh));
      const again = page.lost || first;
      page.charts = charts;
      page.lost = "";
      if (again || changed.some(Boolean)) draw();
      else head();
      if (first && starts && runs.length === 0) open();
      if (runs.every((run) => run.done || run.ended || run.silent_s > 600)) wait = REST_MS;
    } catch (error) {
      page.lost = error.status ? error.message : "The server has ended; this is what it said last.";
      head();
    }
  }
  clearTimeout(asked);
  asked = setTimeout(poll, wait);
}
page.again = () => { clearTimeout(asked); poll(); };

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return answer;
}

/** Reads what has changed of a run; answers whether anything has. */
async function refresh(told) {
  if (!page.runs.has(told.id)) {
    page.runs.set(told.id, { id: told.id, look: look(told.id), stamps: {}, files: {}, rows: [], series: new Map() });
  }
  const run = page.runs.get(told.id);
  const before = states(run);
  Object.assign(run, { name: told.name, folder: told.folder, done: told.done, ended: told.ended, saved: told.saved_step });
  Object.assign(run, { silent: told.silent_s, told: Date.now(), leftOut: told.left_out, exit: told.exit });
  Object.assign(run, { stoppable: told.stoppable, resumable: told.resumable });
  const stale = Object.keys(told.files).filter((name) => told.files[name] !== run.stamps[name]);
  await Promise.all(stale.map(async (name) => {
    const text = await (await ask(`/runs/${told.id}/${name}`)).text();
    run.files[name] = TEXTS.includes(name) ? text : LINES.includes(name) ? text.split("\n").flatMap(parsed) : parsed(text)[0];
    run.stamps[name] = told.files[name];
    if (name === "logging.jsonl") {
      run.rows = placed(run.files[name]);
      run.series = series(run.rows);
    }
  }));
  return stale.length > 0 || before !== states(run);
}
const states = ({ name, done, ended, stoppable }) => `${name} ${done} ${ended} ${stoppable}`;

/** A line that was cut, or of a file that is being replaced, is none. */
function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" && !Array.isArray(value) ? [value] : [];
  } catch { return []; }
}

/* What comes first. */

function head() {
  const runs = [...page.runs.values()], one = runs.length === 1 ? runs[0] : null;
  const title = one ? one.name : runs.length ? `${runs.length} runs` : "No runs yet";
  $("title").textContent = title;
  document.title = `${one ? `${state(one).text} · ` : ""}${title} – dpo-host`;
  $("about").textContent = one ? about(one) : "";
  $("about").hidden = !one || about(one) === "";
  $("state").textContent = page.lost || (one ? summary(state(one)) : "");
  if (one && !$("note").children.length) $("note").replaceChildren(noteOf(one));
  $("figures").hidden = $("note").hidden = !one;
  actions(one);
  $("progress").hidden = !one || one.done || !state(one).total;
  $("runs").hidden = $("search").hidden = Boolean(one) || runs.length === 0;
  if (one) figures(one); else drawTable();
}

page.head = head;

/** What can be done: a run started, and the one that is shown stopped or resumed. */
function actions(one) {
  $("actions").hidden = !page.starts;
  const now = $("actions").querySelector(".act"), next = one && actOf(one);
  if (now?.outerHTML === next?.outerHTML) return;
  const focused = now !== null && now === document.activeElement;
  now?.remove();
  if (next) $("actions").append(next);
  if (next && focused) next.focus();
}

const summary = ({ step, total, text, ended }) => [text, total && !ended ? `step ${step} of ${total}` : ""].filter(Boolean).join(" · ");

function about(run) {
  const f = facts(run);
  if (!f.model) return run.leftOut.join(" · ");
  const parts = [f.family, f.model.split("/").slice(-2).join("/"), f.device];
  if (f.ranks > 1) parts.push(`${f.ranks} ranks`);
  parts.push(`${f.examples} examples`);
  if (f.validation_examples) parts.push(`${f.validation_examples} to evaluate on`);
  if (f.parameters) parts.push(`${f.parameters.toLocaleString("en")} adapter parameters`);
  return [...parts, ...run.leftOut].join(" · ");
}

function figures(run) {
  const { step, total } = state(run), low = best(run);
  $("progress").firstElementChild.style.width = `${total ? (100 * step) / total : 0}%`;
  const learned = (title, name) => {
    if (last(run, name) === undefined) return [];
    const held = last(run, `eval_${name}`), from = `from ${short(points(run, name)[0].value)}`;
    return [[title, short(last(run, name)), held === undefined ? from : `${from}, eval ${short(held)}`]];
  };
  const figure = (title, name, note) => (last(run, name) === undefined ? [] : [[title, short(last(run, name)), note]]);
  const all = [
    ...learned("Loss", "loss"),
    ...(low ? [["Best eval loss", short(low.value), `at step ${low.step}`]] : []),
    ...learned("Margin", "rewards/margins"),
    ...learned("Accuracy", "rewards/accuracies"),
    ...figure("Tokens per second", "tokens_per_second", ""),
    ...figure("Memory, GiB", "memory_gib", "at most"),
    ...(last(run, "elapsed_s") === undefined ? [] : [["Time", duration(points(run, "elapsed_s").at(-1).time), "since it began"]]),
  ];
  const cells = all.map(([title, value, note]) => make("div", {}, make("span", {}, title), make("b", {}, value), make("i", {}, note)));
  $("figures").hidden = cells.length === 0;
  $("figures").replaceChildren(...cells);
}

function draw() {
  head();
  const runs = shown();
  toolbar();
  drawCurves(runs);
  drawDetails(runs);
}
page.draw = draw;

/* What the reader chooses. */

/** The controls as the view says; one that is being used is left alone. */
function toolbar() {
  const set = (id, value) => { if (document.activeElement !== $(id)) $(id).value = value; };
  set("filter", view.filter);
  set("x", view.x);
  set("from", view.from ?? "");
  set("to", view.to ?? "");
  $("smooth").value = view.smooth;
  $("smooth").nextElementSibling.textContent = view.smooth ? view.smooth.toFixed(2) : "off";
  $("log").checked = view.log;
  $("unit").textContent = view.x === "time" ? "s" : "";
  $("all").hidden = view.from === null && view.to === null;
}

const on = (id, event, chosen) => $(id).addEventListener(event, (e) => choose(chosen(e.target)));
const number = (text) => (text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text));
on("filter", "input", ({ value }) => ({ filter: value }));
// A range in steps is none in seconds.
on("x", "change", ({ value }) => ({ x: value, from: null, to: null }));
on("from", "change", ({ value }) => ({ from: number(value) }));
on("to", "change", ({ value }) => ({ to: number(value) }));
on("smooth", "input", ({ value }) => ({ smooth: Number(value) }));
on("log", "change", ({ checked }) => ({ log: checked }));
$("all").addEventListener("click", () => { zoom(null, null); $("from").focus(); });
$("csv").addEventListener("click", () => saveNumbers(shown()));
on("when", "input", ({ value, max }) => {
  const whose = shown().filter((run) => lines(run, "samples.jsonl").length), run = whose.find((r) => r.name === view.samples) ?? whose[0];
  return { when: value === max ? null : lines(run, "samples.jsonl")[value].global_step };
});
$("whose").querySelector("select").addEventListener("change", (event) => choose({ samples: event.target.value, when: null }));
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 100); });
addEventListener("visibilitychange", () => { if (!document.hidden) head(); });
poll();
