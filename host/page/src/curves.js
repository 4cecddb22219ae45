// The charts: curves of runs over steps, epochs or time, with one cursor and one range for all of them.

import { $, choose, evaluations, fill, make, page, points, view } from "./shared.js";
import { extent, labels, short, ticks, widened } from "./numbers.js";
import { savePicture } from "./download.js";

const HEIGHT = 180, LABEL = 13, LEFT = 46, RIGHT = 56, TOP = 8, BOTTOM = 22, FLOOR = HEIGHT - BOTTOM;
/** Evaluations that are drawn each by itself; more of them are a line. */
const DOTS = 60;
/** Marks of evaluation sets, in the order of their names. */
const MARKS = ["○", "□", "△", "◇"];

export function drawCurves(runs) {
  // Charts stay the same elements, so that focus and the pointer stay with them.
  const figures = $("curves").children.length === page.charts.length ? [...$("curves").children] : page.charts.map(figure);
  const any = runs.some((run) => run.rows.length);
  fill("curves", ...(any ? figures : []));
  if (any) page.charts.forEach((chart, i) => draw(figures[i], chart, runs));
  mark();
}

/* One chart. */

function figure(chart, i) {
  const button = (kind) => {
    const element = make("button", { type: "button", "aria-label": `save ${chart.title} as ${kind}` }, kind);
    element.addEventListener("click", () => savePicture(box.querySelector("svg"), chart.title, box.drawn.curves, kind));
    return element;
  };
  const svg = make("svg", { tabindex: 0, role: "img", height: HEIGHT });
  const box = make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, chart.title), make("span", { class: "now" })),
    svg, make("div", { class: "save" }, button("SVG"), button("PNG")));
  box.clip = `clip${i}`;
  const place = (event) => box.drawn.back(event.clientX - svg.getBoundingClientRect().left);
  let from = null;
  const end = () => { from = null; svg.querySelector(".brush")?.remove(); };
  svg.addEventListener("pointerdown", (event) => {
    // A finger moves the cursor; a range is typed there.
    if (event.pointerType === "touch" || event.button !== 0 || !box.drawn) return;
    from = place(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!box.drawn) return;
    const { x, xs } = box.drawn, to = place(event);
    if (from !== null) {
      const [a, b] = [x(from), x(to)].sort((a, b) => a - b), brush = svg.querySelector(".brush") ?? make("rect", { class: "brush" });
      for (const [name, value] of Object.entries({ x: a, width: b - a, y: TOP, height: FLOOR - TOP })) brush.setAttribute(name, value);
      if (!brush.parentNode) svg.append(brush);
    }
    if (xs.length) point(xs.reduce((near, one) => (Math.abs(one - to) < Math.abs(near - to) ? one : near), xs[0]));
  });
  svg.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const range = [from, place(event)].sort((a, b) => a - b), { x } = box.drawn;
    end();
    if (x(range[1]) - x(range[0]) > 6) zoom(...range);
  });
  svg.addEventListener("pointercancel", end);
  svg.addEventListener("dblclick", () => zoom(null, null));
  svg.addEventListener("pointerleave", () => point(null));
  svg.addEventListener("blur", () => point(null));
  svg.addEventListener("keydown", (event) => {
    const xs = box.drawn?.xs ?? [], at = page.at === null ? xs.length : xs.indexOf(page.at);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") { end(); point(null); }
    if (to === undefined || !xs.length) return;
    event.preventDefault();
    point(xs[Math.max(0, Math.min(xs.length - 1, to))]);
  });
  return box;
}

/** Shows a range of all charts; `null` is their end. */
export function zoom(from, to) {
  const digits = { step: 0, epoch: 3, time: 1 }[view.x], round = (value) => value === null ? null : Number(value.toFixed(digits));
  point(null);
  choose({ from: round(from), to: round(to) });
}

function point(at) {
  if (at !== page.at) { page.at = at; mark(); }
}

/** The exponential moving average, without the pull of its start. */
function smoothed(curve) {
  let [sum, weight] = [0, 0];
  return curve.map(({ x, value }) => {
    sum = view.smooth * sum + (1 - view.smooth) * value;
    weight = view.smooth * weight + (1 - view.smooth);
    return { x, value: sum / weight };
  });
}

/** The curves of a chart: of every run its series, and the evaluations of each by their set. */
function curvesOf(chart, runs) {
  const sets = chart.series.map(({ name }) => evaluations(runs, name));
  const names = [...new Set(sets.flat().map(([set]) => set))].sort();
  const of = (run, name) => points(run, name).map((one) => ({ x: one[view.x], value: one.value }))
    .filter(({ x }) => Number.isFinite(x));
  const curves = runs.flatMap((run) => chart.series.map(({ name, label }, i) => {
    const raw = of(run, name);
    const held = sets[i].map(([set, key]) => ({ set, mark: names.indexOf(set) % MARKS.length, points: of(run, key) }));
    return { run, label, kind: `${run.look} ${i > 0 ? "second" : ""}`, raw, curve: view.smooth > 0 ? smoothed(raw) : raw, held };
  }));
  return { curves, names };
}

/** Where things are: the range that is shown, places of its values, and which of them there are. */
function frame(all, width) {
  const roomy = widened(extent(all.map(({ x }) => x)));
  const x0 = view.from ?? roomy[0], x1 = (view.to ?? roomy[1]) > x0 ? view.to ?? roomy[1] : x0 + 1;
  const inside = all.filter(({ x }) => x >= x0 && x <= x1);
  const values = extent((inside.length ? inside : all).map(({ value }) => value));
  const log = view.log && values[0] > 0, [v0, v1] = widened(values, log);
  const marks = ticks(v0, v1, 4, log), texts = labels(marks, log);
  const left = Math.max(LEFT, 13 + 6.2 * Math.max(...texts.map((text) => text.length))), right = width - RIGHT;
  const part = (value) => (log ? Math.log(value / v0) / Math.log(v1 / v0) : (value - v0) / (v1 - v0));
  return {
    left, right, x0, x1, v0, v1, marks, texts,
    x: (at) => left + ((at - x0) / (x1 - x0)) * (right - left),
    y: (value) => FLOOR - part(value) * (FLOOR - TOP),
    back: (place) => Math.max(x0, Math.min(x1, x0 + ((place - left) / (right - left)) * (x1 - x0))),
    // What is not above 0 has no place on a logarithmic axis.
    drawable: (points) => (log ? points.filter(({ value }) => value > 0) : points),
    unit: view.x !== "time" ? [1, ""] : x1 - x0 <= 180 ? [1, " s"] : x1 - x0 <= 10800 ? [60, " min"] : [3600, " h"],
    xs: [...new Set(inside.map((one) => one.x))].sort((a, b) => a - b),
  };
}

function axes({ x, y, left, right, x0, x1, v0, v1, marks, texts, unit }, guide) {
  const across = (kind, value) => make("path", { class: kind, d: `M${left} ${y(value)}H${right}` });
  const parts = marks.flatMap((value, i) =>
    [across("grid", value), make("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, texts[i])]);
  const below = ticks(x0 / unit[0], x1 / unit[0], 4).filter((at) => view.x !== "step" || Number.isInteger(at)), words = labels(below);
  below.forEach((at, i) => parts.push(
    make("text", { x: x(at * unit[0]), y: HEIGHT - 6, "text-anchor": "middle", class: "tick" }, words[i] + unit[1])));
  return guide !== null && guide > v0 && guide < v1 ? [...parts, across("guide", guide)] : parts;
}

/** A curve with its evaluations, and a mark at the lowest of those of the set `best`. */
function curveParts({ x, y, x0, x1, drawable }, { kind, raw, curve, held }, best) {
  const line = (name, all) => make("polyline", { class: `${name} ${kind}`,
    points: drawable(all).map((one) => `${x(one.x).toFixed(1)},${y(one.value).toFixed(1)}`).join(" ") });
  const at = (name, mark, one, size) => make("path", { class: `${name} ${kind}`, d: shape(mark, x(one.x), y(one.value), size) });
  const parts = curve === raw ? [] : [line("curve raw", raw)];
  parts.push(line("curve", curve));
  if (curve.length === 1) parts.push(at("mark", 0, curve[0], 3));
  for (const { set, mark, points } of held) {
    const there = drawable(points).filter((one) => one.x >= x0 && one.x <= x1);
    if (points.length > 1) parts.push(line("held", points));
    if (there.length <= DOTS) parts.push(...there.map((one) => at("dot", mark, one, 3)));
    if (set === best && points.length > 1) parts.push(at("best", mark, points.reduce((a, b) => (b.value < a.value ? b : a)), 4));
  }
  return parts;
}

function draw(box, chart, runs) {
  const { curves, names } = curvesOf(chart, runs), svg = box.querySelector("svg");
  const all = curves.flatMap(({ raw, held }) => [...raw, ...held.flatMap(({ points }) => points)]);
  box.hidden = all.length === 0;
  box.drawn = null;
  if (box.hidden) return;
  const drawn = frame(all, svg.getBoundingClientRect().width || 340), { left, right } = drawn;
  const best = chart.series[0].name === "loss" ? names[0] : undefined;
  const clip = make("clipPath", { id: box.clip }, make("rect", { x: left - 5, y: 0, width: right - left + 10, height: FLOOR + 5 }));
  const inner = make("g", { "clip-path": `url(#${box.clip})` }, ...curves.flatMap((one) => curveParts(drawn, one, best)));
  svg.replaceChildren(clip, ...axes(drawn, chart.guide), inner);
  svg.setAttribute("aria-label", `${chart.title}: ${curves.slice(0, 20).map(({ run, label, curve }) =>
    `${run.name} ${label} ${curve.length ? short(curve.at(-1).value) : ""}`).join(", ")}`);
  box.drawn = { ...drawn, curves, names };
}

/** A mark of an evaluation: circle, square, triangle, diamond. */
function shape(kind, x, y, r) {
  const at = (dx, dy) => `${(x + dx * r).toFixed(1)} ${(y + dy * r).toFixed(1)}`;
  if (kind === 0) return `M${at(-1, 0)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
  const corners = [[[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]], [[0, -1.2], [1.2, 0.9], [-1.2, 0.9]],
    [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]][kind - 1];
  return `M${corners.map((corner) => at(...corner)).join("L")}Z`;
}

/* The cursor. */

/** Labels moved apart, where they would lie on each other. */
function spread(all) {
  all.sort((a, b) => a.at - b.at);
  all.forEach((label, i) => { if (i) label.at = Math.max(label.at, all[i - 1].at + LABEL); });
  const over = all.length ? Math.max(0, all.at(-1).at - FLOOR) : 0;
  return all.map((label) => ({ ...label, at: label.at - over }));
}

/** The cursor in every chart. Labels at the curves' ends are the last values; with a cursor they are those at it. */
function mark() {
  const there = page.at !== null;
  for (const box of $("curves").children) {
    if (!box.drawn) continue;
    const { x, y, x1, right, curves, names, unit } = box.drawn, svg = box.querySelector("svg");
    svg.querySelectorAll(".at").forEach((element) => element.remove());
    if (there) {
      const at = x(page.at), round = Number((page.at / unit[0]).toFixed(view.x === "time" ? 1 : 3));
      const says = view.x === "time" ? `${round}${unit[1]}` : `${view.x} ${round}`;
      svg.append(make("line", { class: "cursor at", x1: at, x2: at, y1: TOP, y2: FLOOR }),
        make("text", { class: "here at", x: at, y: HEIGHT - 6, "text-anchor": "middle" }, says));
    }
    svg.querySelectorAll(".tick").forEach((tick) => {
      tick.setAttribute("visibility", there && Math.abs(tick.getAttribute("x") - x(page.at)) < 48 ? "hidden" : "visible");
    });
    const ends = [], held = [];
    for (const curve of curves) {
      for (const { set, mark, points } of curve.held) {
        const now = there ? points.findLast((one) => one.x === page.at) : points.findLast((one) => one.x <= x1);
        const alike = held.find((one) => one.run === curve.run && one.set === set);
        if (now && alike) alike.text += ` / ${short(now.value)}`;
        else if (now) held.push({ run: curve.run, set, text: [MARKS[mark], set, short(now.value)].filter(Boolean).join(" ") });
      }
      const now = curve.curve.findLast((one) => one.x <= (there ? page.at : x1));
      if (!now) continue;
      if (there) svg.append(make("circle", { class: `mark at ${curve.run.look}`, cx: x(now.x), cy: y(now.value), r: 3.5 }));
      const place = Math.max(TOP, Math.min(FLOOR, y(now.value)));
      ends.push({ at: place, text: (!there && curve.label) || short(now.value), look: curve.run.look });
    }
    // Beside many runs the table says more.
    const told = ends.length <= 6 || (there && ends.length <= 11) ? spread(ends) : [];
    svg.append(...told.map(({ at, text, look }) => make("text", { class: `label at ${look}`, x: right + 7, y: at + 4 }, text)));
    box.querySelector(".now").replaceChildren(...legend(held, names));
  }
}

/** What evaluations say, or, where those would be too many numbers, which mark is of which set. */
function legend(held, names) {
  const few = held.length > 0 && held.length <= 4;
  if (!few) return names.some(Boolean) ? [names.map((set, i) => `${MARKS[i % MARKS.length]} ${set || "all"}`).join(" ")] : [];
  return ["eval", ...held.map(({ run, text }) => make("span", { class: `key ${run.look}` }, ` ${text}`))];
}

addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
  if (event.key === "Escape" && !typing && (view.from !== null || view.to !== null)) zoom(null, null);
});
