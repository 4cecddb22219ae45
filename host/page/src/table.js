// Runs side by side: the legend, which are shown, and where each of them stands.

import { $, best, choose, evaluations, facts, keepNote, last, listed, make, note, page, points, swatch, view } from "./shared.js";
import { duration, short } from "./numbers.js";
import { actOf } from "./start.js";

export function state(run) {
  const total = facts(run).total_steps, logged = last(run, "global_step") ?? 0;
  // A run that was told to end is saved after a step that may have no line of the log.
  const step = run.ended ? Math.max(logged, run.saved ?? 0) : logged;
  const silent = (run.silent ?? 0) + (Date.now() - run.told) / 1000;
  if (run.done) return { step, total, text: "finished" };
  if (run.ended) {
    const saved = run.saved === null ? "nothing saved" : run.saved === step ? "saved" : `saved at step ${run.saved}`;
    const brief = step ? `stopped, ${saved}` : `${run.exit ? "failed" : "stopped"} before the first step`;
    return { step, total, ended: true, brief, text: step ? `stopped after step ${step}${total ? ` of ${total}` : ""}, ${saved}` : brief };
  }
  if (step === 0) return { step, total, text: silent > 600 ? `silent for ${duration(silent)}` : "waiting for the first step" };
  const all = points(run, "elapsed_s");
  const [a, b] = [all[Math.max(0, all.length - 20)], all.at(-1)];
  const pace = b && b.step > a.step ? (b.time - a.time) / (b.step - a.step) : undefined;
  const interval = pace ? pace * (b.step - all.at(-2).step) : 60;
  if (silent > Math.max(60, 5 * interval)) return { step, total, text: `silent for ${duration(silent)}` };
  const seconds = pace * (total - step) - Math.min(silent, interval);
  const rough = seconds > 120 && seconds < 3600 ? `${Math.round(seconds / 60)} min` : duration(seconds);
  return { step, total, text: `running${pace && total ? `, about ${rough} left` : ""}` };
}

/** The columns of numbers: title, value of a run, text of it. */
function columns(runs) {
  const number = (title, name) => [title, (run) => last(run, name), short];
  const held = (title, name) => evaluations(runs, name).map(([set, key]) => number(`eval ${set ? `${set} ` : ""}${title}`, key));
  const at = (run) => { const { step, value } = best(run); return `${short(value)} at ${step}`; };
  const all = [
    ["step", (run) => state(run).step, (step, run) => (state(run).total ? `${step} of ${state(run).total}` : String(step))],
    number("loss", "loss"), ...held("loss", "loss"), ["best eval loss", (run) => best(run)?.value, (_, run) => at(run)],
    number("margin", "rewards/margins"), number("accuracy", "rewards/accuracies"), ...held("accuracy", "rewards/accuracies").slice(0, 1),
    number("tokens/s", "tokens_per_second"), number("GiB", "memory_gib"),
  ];
  return all.filter(([, value]) => runs.some((run) => value(run) !== undefined));
}

export function drawTable() {
  const box = $("runs"), runs = listed(), many = [...page.runs.values()];
  $("count").textContent = runs.length < many.length ? `${runs.length} of ${many.length} runs` : "";
  // A note that is being written is not taken away.
  if (document.activeElement?.matches("#runs .note")) return;
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const used = columns(many), [by, down] = view.sort.startsWith("-") ? [view.sort.slice(1), true] : [view.sort, false];
  const values = new Map([["run", (run) => run.name], ["note", note], ["state", told], ...used]);
  const value = values.get(by);
  if (value) runs.sort((a, b) => compare(value(a), value(b), down));
  const top = ["run", "state", ...used.map(([title]) => title), "note"].map((title) => {
    const button = make("button", { type: "button", "data-key": `sort ${title}` }, title);
    button.addEventListener("click", () => choose({ sort: by !== title ? title : down ? "" : `-${title}` }));
    const sort = value && by === title ? { "aria-sort": down ? "descending" : "ascending" } : {};
    const number = used.some(([name]) => name === title) ? { class: "n" } : {};
    return make("th", { ...sort, ...number }, ...(title === "run" ? [everyOne(runs)] : []), button);
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...top)), make("tbody", {}, ...runs.map((run) => row(run, used))));
  // One that says the same stays, and with it a click that has begun.
  if (box.firstChild?.outerHTML === table.outerHTML) return;
  box.replaceChildren(table);
  if (focused) box.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function row(run, used) {
  const hidden = view.hide.includes(run.name), tick = make("input", { type: "checkbox", "data-key": run.name });
  tick.checked = !hidden;
  tick.addEventListener("change", () => hide([run.name], !tick.checked));
  const cell = ([, value, text]) => make("td", { class: "n" }, value(run) === undefined ? "" : text(value(run), run));
  return make("tr", { class: hidden ? "off" : "" },
    make("td", { title: run.folder }, make("label", {}, tick, swatch(run), run.name)), make("td", { class: "state" }, told(run), ...[actOf(run)].filter(Boolean)),
    ...used.map(cell), make("td", {}, noteOf(run)));
}

const told = (run) => state(run).brief ?? state(run).text;

const hide = (names, hidden) => choose({ hide: [...view.hide.filter((name) => !names.includes(name)), ...(hidden ? names : [])] });

/** Shows or hides all runs of the list. */
function everyOne(runs) {
  const names = runs.map(({ name }) => name), hidden = names.filter((name) => view.hide.includes(name));
  const tick = make("input", { type: "checkbox", "aria-label": "show all runs", "data-key": "every one" });
  tick.checked = hidden.length === 0;
  tick.indeterminate = hidden.length > 0 && hidden.length < names.length;
  tick.addEventListener("change", () => hide(names, !tick.checked));
  return tick;
}

/** A field for what the reader wants to remember of a run. */
export function noteOf(run) {
  const field = make("input", { class: "note", placeholder: "note", "aria-label": `note on ${run.name}`, "data-key": `note ${run.name}` });
  field.value = note(run);
  field.addEventListener("input", () => keepNote(run, field.value.trim()));
  return field;
}

/** Numbers by size, texts by their numbers and letters; what is not there comes last. */
function compare(a, b, down) {
  const none = (value) => value === undefined || value === "";
  if (none(a) || none(b)) return none(a) - none(b);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return down ? -order : order;
}
