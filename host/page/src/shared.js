// What the parts of the page share: the runs as they were read, what the reader chose, and elements.
// Texts come from data and are only ever set as text.

const COLOURS = 8, DASHES = 5, PER_DASH = 4;

/** Runs by id; the charts; where the cursor is; whether runs can be started. `draw` draws all of it again, `head` what stands above
 * the charts; `again` asks the server at once. */
export const page = { charts: [], runs: new Map(), at: null, lost: "", starts: false, draw: () => {}, head: () => {}, again: () => {} };

export const $ = (id) => document.getElementById(id);
export const lines = (run, name) => run.files[name] ?? [];
export const facts = (run) => run.files["run.json"] ?? {};
export const args = (run) => run.files["args.json"] ?? {};

/** Colour and dashes of a run: together they are of no other one of the first forty. */
export const look = (id) => `r${id % COLOURS} d${Math.floor(id / PER_DASH) % DASHES}`;

/** An element with attributes and children, which are elements or texts. */
export function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "polyline", "circle", "text", "line", "rect", "clipPath", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Fills a section's body, and hides the section where there is nothing. */
export function fill(id, ...children) {
  $(id).replaceChildren(...children);
  $(id).closest("section").hidden = children.length === 0;
}

/** The curve of a run in small, beside its name. */
export const swatch = (run) => make("svg", { class: `swatch ${run.look}`, "aria-hidden": "true" },
  make("path", { class: "curve", d: "M0 5H24" }));

/* What the reader chose. It stands in the address, so that a link shows the same. */

const DEFAULTS = { x: "step", smooth: 0, log: false, from: null, to: null, filter: "", sort: "", hide: [], samples: "", when: null };
export const view = {};

function readView() {
  const told = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (told.get(name) !== null && Number.isFinite(Number(told.get(name))) ? Number(told.get(name)) : null);
  Object.assign(view, DEFAULTS, {
    x: ["step", "epoch", "time"].includes(told.get("x")) ? told.get("x") : "step",
    smooth: Math.min(0.99, Math.max(0, number("smooth") ?? 0)), log: told.get("log") === "1", from: number("from"), to: number("to"),
    filter: told.get("filter") ?? "", sort: told.get("sort") ?? "", hide: told.getAll("hide"),
    samples: told.get("samples") ?? "", when: number("when"),
  });
}

/** Takes what has been chosen, and draws. */
export function choose(change) {
  Object.assign(view, change);
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (Array.isArray(value)) value.forEach((one) => told.append(name, one));
    else if (value !== DEFAULTS[name]) told.set(name, value === true ? "1" : value);
  }
  // Browsers refuse what changes the address too often.
  clearTimeout(addressed);
  addressed = setTimeout(() => history.replaceState(null, "", told.size ? `#${told}` : location.pathname), 150);
  page.draw();
}
let addressed;

readView();
addEventListener("hashchange", () => { readView(); page.draw(); });

/** Runs that the filter lets through, and those of them that are shown. */
export function listed() {
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return [...page.runs.values()].filter((run) => {
    const text = `${run.name} ${note(run)} ${settings(run).map(([name, value]) => `${name}=${value}`).join(" ")}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
}
export const shown = () => listed().filter((run) => !view.hide.includes(run.name));

/* Notes on runs: kept by this browser. The page writes nothing into a run's folder. */

export const note = (run) => { try { return localStorage.getItem(`note ${run.folder}`) ?? ""; } catch { return ""; } };
export function keepNote(run, text) {
  try {
    if (text) localStorage.setItem(`note ${run.folder}`, text); else localStorage.removeItem(`note ${run.folder}`);
  } catch { /* A browser that keeps nothing. */ }
}

/* Numbers of a run. */

/** The lines of a log with their places. A resumed run counts its seconds anew: here they go on. An evaluation has the time of
 * the line before. */
export function placed(log) {
  let [before, last] = [0, 0];
  return log.filter((line) => typeof line.global_step === "number").map((line) => {
    if (typeof line.elapsed_s === "number") {
      if (line.elapsed_s < last) before += last;
      last = line.elapsed_s;
    }
    return { step: line.global_step, epoch: line.epoch ?? NaN, time: before + last, line };
  });
}

/** The points of every number in these lines. */
export function series(rows) {
  const all = new Map();
  for (const { line, ...place } of rows) {
    for (const [name, value] of Object.entries(line)) {
      if (typeof value !== "number") continue;
      if (!all.has(name)) all.set(name, []);
      all.get(name).push({ ...place, value });
    }
  }
  return all;
}

export const points = (run, name) => run.series.get(name) ?? [];
export const last = (run, name) => points(run, name).at(-1)?.value;

/** Evaluations of a number: `eval_NAME`, and of evaluation sets with names `eval_SET_NAME`. Answers [set, name of the series]. */
export function evaluations(runs, name) {
  const known = new Set(page.charts.flatMap((chart) => chart.series.map((one) => one.name)));
  for (const run of runs) for (const key of run.series.keys()) if (!key.startsWith("eval_")) known.add(key);
  const longest = [...known].sort((a, b) => b.length - a.length), found = new Map();
  for (const key of runs.flatMap((run) => [...run.series.keys()])) {
    if (!key.startsWith("eval_") || !key.endsWith(name)) continue;
    const rest = key.slice(5), of = known.has(rest) ? rest : longest.find((one) => rest.endsWith(`_${one}`));
    if (of === name) found.set(rest === name ? "" : rest.slice(0, -name.length - 1), key);
  }
  return [...found].sort(([a], [b]) => (a < b ? -1 : 1));
}

/** The evaluation with the lowest loss, of the first set where the sets have names. */
export function best(run) {
  const [first] = evaluations([run], "loss");
  return first && points(run, first[1]).reduce((low, point) => (point.value < low.value ? point : low));
}

/* Settings of a run. */

const text = (value) => (value === null || value === undefined || (Array.isArray(value) && !value.length) ? "–"
  : Array.isArray(value) ? value.map(text).join(" ") : typeof value === "object" ? JSON.stringify(value) : String(value));

/** An object's values by the names that lead to them; objects in a list by their `name`. */
export function flat(value, path = []) {
  const objects = Array.isArray(value) && value.some((one) => one !== null && typeof one === "object");
  if (value === null || typeof value !== "object" || (Array.isArray(value) && !objects)) return [[path, text(value)]];
  return Object.entries(value).flatMap(([key, inner]) => {
    if (!objects || inner?.name === undefined) return flat(inner, [...path, key]);
    const { name, ...rest } = inner;
    return flat(rest, [...path, name]);
  });
}

/** Objects in `resolved` whose names are flags' names. */
const OF_FLAGS = ["settings", "packing"];

/** Every setting with its value. Where a flag left it open, what it came to stands behind an arrow. */
export function settings(run) {
  const { resolved, ...flags } = args(run), came = new Map(), others = [];
  for (const [path, value] of flat(resolved ?? {})) {
    const flag = path.at(-1).replace(/^--/, "").replaceAll("-", "_");
    if (flag in flags && (path.length === 1 || (path.length === 2 && OF_FLAGS.includes(path[0])))) came.set(flag, value);
    else others.push([path.filter((part) => part !== "settings").join(" "), value]);
  }
  const flag = ([name, value]) => {
    const [was, is] = [text(value), came.get(name) ?? text(value)];
    return [name, was === is ? was : `${was} → ${is}`];
  };
  return [...Object.entries(flags).map(flag), ...others];
}
