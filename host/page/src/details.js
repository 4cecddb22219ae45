// What lies below the charts: remarks, sample examples, answers, data, settings.

import { $, facts, fill, flat, lines, make, page, settings, swatch, view } from "./shared.js";
import { plain, signed } from "./numbers.js";

export function drawDetails(runs) {
  drawConsole(runs);
  drawRemarks(runs);
  drawSamples(runs);
  drawAnswers(runs);
  drawData(runs);
  fill("settings", ...compared(runs.filter((run) => run.files["args.json"]), settings, "settings that are the same", ["output_dir"]));
}

const several = () => page.runs.size > 1;
const named = (run) => (several() ? [make("h3", {}, swatch(run), run.name)] : []);

/** What a run printed that the page has started, until its curves say more, and of one that has failed. */
function drawConsole(runs) {
  const told = runs.filter((run) => run.files["console.log"] && (run.rows.length === 0 || run.ended));
  fill("console", ...told.flatMap((run) => [...named(run), make("pre", { class: "console" }, run.files["console.log"].trim())]));
}

function drawRemarks(runs) {
  const said = runs.flatMap((run) => lines(run, "remarks.jsonl").map((line) => ({ run, ...line })));
  fill("remarks", ...said.map(({ run, global_step, kind, text, help }) => make("p", {},
    make("span", {}, `${several() ? `${run.name} · ` : ""}step ${global_step} · ${kind}`), text, make("i", {}, help ?? ""))));
}

/* Sample examples. */

function drawSamples(runs) {
  const with_samples = runs.filter((run) => lines(run, "samples.jsonl")[0]?.examples);
  const run = with_samples.find((r) => r.name === view.samples) ?? with_samples[0];
  const whose = $("whose").querySelector("select"), when = $("when");
  $("whose").hidden = with_samples.length < 2;
  whose.replaceChildren(...with_samples.map((r) => make("option", { value: r.name }, r.name)));
  if (!run) return fill("samples");
  whose.value = run.name;
  const all = lines(run, "samples.jsonl");
  // The slider stays at the newest step until it is moved.
  const newest = all.length - 1, found = all.findIndex((line) => line.global_step >= view.when);
  const place = view.when === null || found < 0 ? newest : found;
  when.max = newest;
  when.value = place;
  when.disabled = newest === 0;
  when.setAttribute("aria-valuetext", `step ${all[place].global_step}`);
  when.nextElementSibling.textContent = `${all[place].global_step}`;
  fill("samples", ...all[0].examples.map((example, i) => make("article", {},
    make("h3", {}, example.place), make("pre", { class: "prompt" }, example.prompt),
    make("div", { class: "answers" }, ...example.answers.map((texts, a) =>
      answer(texts, all[0].scores[i][a], all[place].scores[i]?.[a]))))));
}

function answer(texts, before, after = before) {
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

/** What a judge came to, of the answer after training. */
const OUTCOMES = { win: "better", loss: "worse", unclear: "no verdict" };

/** Answers by prompt, so that those of several runs stand side by side; what they said before is the same for many. */
function drawAnswers(runs) {
  const side = (title, text) => make("div", { class: "answer" }, make("h4", {}, make("span", {}, ...title)), make("pre", {}, text));
  const prompts = new Map(), said = [];
  for (const run of runs) {
    for (const { prompt, before, after, outcome } of [...lines(run, "answers.jsonl"), ...generated(run)]) {
      prompts.set(prompt, [...(prompts.get(prompt) ?? []), { run, before, after, outcome }]);
    }
    const [head] = lines(run, "generated.jsonl");
    said.push(...(head?.text ?? []).map((text) => make("p", { class: "muted" }, ...(several() ? [swatch(run), `${run.name}: `] : []), text)));
  }
  const told = ([prompt, all]) => {
    const alike = new Set(all.map(({ before }) => before)).size === 1;
    const sides = all.flatMap(({ run, before, after, outcome }, i) => [
      ...(alike && i ? [] : [side(["before", ...(alike ? [] : of(run))], before)]),
      ...(after === undefined ? [] : [side(["after", ...of(run), ...(outcome ? [` · ${OUTCOMES[outcome] ?? outcome}`] : [])], after)])]);
    const many = all.length > 1 ? "many" : "";
    return make("article", {}, make("pre", { class: "prompt" }, prompt), make("div", { class: `answers ${many}` }, ...sides));
  };
  const of = (run) => (several() ? [" · ", swatch(run), run.name] : []);
  fill("answers", ...said, ...[...prompts].map(told));
}

/** What `eval --generate` had the model say with the adapter and without. */
const generated = (run) => lines(run, "generated.jsonl").filter(({ prompt }) => prompt !== undefined)
  .map(({ prompt, base, tuned, judge }) => ({ prompt, before: base?.text ?? "", after: tuned?.text, outcome: judge?.outcome }));

/* Data. */

/** The data of runs: once where it is the same. */
function drawData(runs) {
  const told = runs.filter((run) => facts(run).data);
  const alike = new Set(told.map((run) => JSON.stringify(facts(run).data))).size === 1;
  fill("data", ...(alike ? told.slice(0, 1) : told).flatMap((run) =>
    [...(alike ? [] : named(run)), ...dataOf(facts(run).data, facts(run).data_line)]));
}

/** What became of the rows, how long they are, and what else the data report says. */
function dataOf({ files = [], parts = [], noun, sample, messages, dropped, ...rest }, line = "") {
  const head = (...titles) => make("tr", {}, ...titles.map((title, i) => make("th", i > 0 && title ? { class: "n" } : {}, title)));
  const number = (value) => make("td", { class: "n" }, String(value));
  const row = (first, ...others) => make("tr", {}, make("td", {}, first), ...others);
  const all = [make("div", { class: "wide" },
    make("table", {}, head("file", "format", "rows", "examples"), ...files.map((file) =>
      row(file.path, ...[file.format, file.rows, file.examples].map(number)))),
    make("table", {}, head("tokens", "shortest", "median", "95%", "longest", ""), ...parts.map(({ name, lengths }) =>
      row(name, ...["min", "median", "p95", "max"].map((one) => number(lengths[one])), make("td", {}, bars(lengths.histogram ?? []))))))];
  all.push(make("p", { class: "pre" }, line.replace(/\n\s+/g, "\n")));
  all.push(list(flat(rest).map(([path, value]) => [path.join(" ").replaceAll("_", " "), value])));
  return all;
}

/** How long the texts are: a histogram in small. */
function bars(counts) {
  const most = Math.max(1, ...counts), width = counts.length * 6;
  return make("svg", { class: "bars", viewBox: `0 0 ${width} 16`, width, role: "img", "aria-label": "lengths" },
    ...counts.map((count, i) => {
      const height = count > 0 ? Math.max(1, (count / most) * 15) : 0;
      return make("rect", { x: i * 6, y: 16 - height, width: 5, height });
    }));
}

/* Names with values. */

const list = (pairs) => make("dl", {}, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));

/** Names and values of a run; of several runs those that differ, side by side, and the others below. */
function compared(runs, of, same, never) {
  const all = runs.map((run) => new Map(of(run)));
  if (runs.length < 2) return all.map((one) => list([...one]));
  const names = [...new Set(all.flatMap((one) => [...one.keys()]))];
  // Where a run is written is what it is named after.
  const differing = names.filter((name) => !never.includes(name) && new Set(all.map((one) => one.get(name))).size > 1);
  const top = make("tr", {}, make("th", {}, ""), ...runs.map((run) => make("th", { class: "n" }, swatch(run), run.name)));
  const rows = differing.map((name) => make("tr", {}, make("td", { class: "muted" }, name),
    ...all.map((one) => make("td", { class: "n" }, one.get(name) ?? "–"))));
  const rest = make("details", {}, make("summary", {}, same),
    list(names.filter((name) => !never.includes(name) && !differing.includes(name)).map((name) => [name, all[0].get(name)])));
  rest.open = Boolean($("settings").querySelector("details")?.open);
  return [make("div", { class: "wide" }, make("table", {}, top, ...rows)), rest];
}
