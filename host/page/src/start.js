// The form that starts runs, and what stops them: there only where the server lets the page do so.
// The whole command line is shown as it is typed, and what it says is all that is sent.

import { $, args, make, page } from "./shared.js";

/** Fields by what they are about. Every other flag is written below them. */
const FIELDS = [
  ["Model", "model", "plugin", "quantization"],
  ["Data", "dataset", "val_dataset", "max_length"],
  ["Loss", "loss", "beta"],
  ["LoRA", "lora_rank", "lora_alpha", "target_modules"],
  ["Training", "learning_rate", "num_epochs", "batch_size"],
  ["Run", "output_dir", "device", "gpus"],
];
/** What an empty field means, where no flag says so. */
const EMPTY = { model: "demo", plugin: "auto", output_dir: "name of its folder" };
/** What is usual, beside the names of plugins and what the runs on the page have. */
const USUAL = { model: ["demo"], target_modules: ["all-linear", "q_proj v_proj"], device: ["auto", "cpu", "cuda", "cuda:0,1"] };
/** Settings of a run that another one does not take over. */
const OWN = ["output_dir", "resume_from_checkpoint"];

let form = null, named = false;

/** Asks the server to do something; what it refuses is thrown, with its help. */
async function post(path, body) {
  const headers = { "content-type": "application/json", "x-dpo-host": "1" };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  if (answer.ok) return answer.json();
  throw answer.status === 422 ? await answer.json() : { text: await answer.text() };
}

/* Words of a shell. */

/** The words of a text as a shell has them; null where a quote is open. */
function words(text) {
  const all = [];
  let word = null, quote = "";
  for (let i = 0; i < text.length; i++) {
    const letter = text[i], next = text[i + 1];
    if (quote === "'" || (quote === '"' && letter !== "\\")) {
      if (letter === quote) quote = ""; else word += letter;
    } else if (letter === "\\" && next !== undefined && (!quote || '"\\$`\n'.includes(next))) {
      if (next !== "\n") word = (word ?? "") + next;
      i++;
    } else if (quote) word += letter;
    else if (letter === "'" || letter === '"') { quote = letter; word ??= ""; }
    else if (/\s/.test(letter)) { if (word !== null) all.push(word); word = null; }
    else word = (word ?? "") + letter;
  }
  if (quote) return null;
  return word === null ? all : [...all, word];
}

/** A word that a shell reads as this one; `launcher.rs` does the same. */
const quoted = (word) => (/^[A-Za-z0-9_\-./:=,@%+][A-Za-z0-9_\-./:=,@%+#]*$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/* The form and what it says. */

const flagOf = (key) => form.flags.find((flag) => flag.key === key) ?? { key, name: `--${key.replaceAll("_", "-")}`, help: "", values: [] };
const field = (key) => $(`start-${key}`);
const keys = FIELDS.flatMap(([, ...fields]) => fields);

function fieldOf(key) {
  const flag = flagOf(key), id = `start-${key}`;
  const attributes = { id, name: key, title: flag.help, spellcheck: "false" };
  const output = key === "output_dir";
  const input = flag.values.length
    ? make("select", attributes, ...flag.values.map((value) => make("option", { value: value === flag.default ? "" : value }, value)))
    : make("input", { ...attributes, list: `${id}-names`, placeholder: EMPTY[key] ?? (flag.default || usual(flag)) });
  input.addEventListener("focus", () => { $("help").textContent = output ? `The folder inside of ${form.folder} that the run is written into.` : flag.help; });
  const label = key === "output_dir" ? "folder" : key.replaceAll("_", " ").replace("lora ", "").replace("num ", "");
  return make("div", {}, make("label", { for: id }, label), input, make("datalist", { id: `${id}-names` }));
}

/** What a flag's help says of its default. */
const usual = (flag) => flag.help.match(/\[default: (?:the loss's own, )?([^\];]{1,40})[\];]/)?.[1] ?? "";

/** The arguments of the run; null where a quote is open. */
function written() {
  const all = [];
  for (const key of keys) {
    const value = field(key).value.trim();
    if (value === "") continue;
    const flag = flagOf(key), several = flag.many ? words(value) : [value];
    if (several === null) return null;
    all.push(flag.name, ...(key === "output_dir" ? [`${form.folder.replace(/\/+$/, "")}/${value}`] : several.map(atHome)));
  }
  const more = words($("more").value);
  if (more === null) return null;
  // What was copied from a terminal begins with the command.
  return [...all, ...more.slice(more.indexOf("train") === 1 ? 2 : 0).map(atHome)];
}

/** A path in the user's folder, as a shell would have it. */
const atHome = (word) => (form.home ? word.replace(/^~(?=\/|$)/, () => form.home) : word);

/** A command line that breaks between flags, not within. */
function commandLine(all) {
  const parts = [["dpo-host"]];
  for (const word of all) {
    if (word.startsWith("--")) parts.push([word]); else parts.at(-1).push(word);
  }
  return parts.flatMap((part, i) => [...(i ? [" "] : []), make("span", {}, part.map(quoted).join(" "))]);
}

function tell() {
  if (!named) field("output_dir").value = freeName();
  const all = written();
  $("command").replaceChildren(...(all ? commandLine([...form.common, "train", ...all]) : ["a quote is open"]));
  for (const button of [$("check"), $("copy"), $("go")]) button.disabled = !all;
}

/** A name after the model that no run has yet. */
function freeName() {
  const model = field("model").value.trim().split("@")[0].split("/").filter(Boolean).at(-1) ?? "run";
  const name = model.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[.-]+/, "") || "run";
  const taken = new Set([...page.runs.values()].map((run) => run.folder.split("/").at(-1)));
  let n = 1;
  while (taken.has(`${name}-${n}`)) n++;
  return `${name}-${n}`;
}

const same = (a, b) => a === b || (a !== "" && b !== "" && Number(a) === Number(b));
const texts = (value) => (value === null || value === undefined ? [] : [value].flat().map((one) => (typeof one === "object" ? JSON.stringify(one) : String(one))));

/** Fills the form with the settings of a run: what has no field and is not as usual becomes a flag below. One that goes on has its
 * own folder, too. */
function like(run, goesOn = false) {
  const settings = run ? args(run) : {}, more = [];
  $("start").querySelector("form").reset();
  for (const flag of form.flags.filter(({ key }) => !OWN.includes(key))) {
    const values = texts(settings[flag.key]), value = flag.many ? values.map(quoted).join(" ") : values.join(" ");
    if (values.length === 0 || same(value, flag.default)) continue;
    if (keys.includes(flag.key)) field(flag.key).value = value;
    else more.push([flag.name, ...values.map(quoted)].join(" "));
  }
  if (goesOn) {
    field("output_dir").value = run.folder.split("/").at(-1);
    more.push("--resume-from-checkpoint latest");
  }
  $("more").value = more.join(" ");
  $("like").value = run ? run.id : "";
  named = goesOn;
  tell();
}

/** Names to choose from: of plugins, and what runs on the page were made of. */
function names() {
  const runs = [...page.runs.values()];
  $("like").replaceChildren(make("option", { value: "" }, "no run, all as usual"), ...runs.filter((run) => run.files["args.json"])
    .map((run) => make("option", { value: run.id }, run.name)));
  for (const key of keys) {
    const of = runs.map((run) => texts(args(run)[key]).map(quoted).join(" ")).filter(Boolean);
    const known = new Map([...(USUAL[key] ?? []), ...(["model", "dataset", "val_dataset"].includes(key) ? of : [])].map((name) => [name, ""]));
    for (const [name, summary] of form[key] ?? []) known.set(name, summary);
    field(key).nextElementSibling.replaceChildren(...[...known].map(([value, label]) => make("option", { value, label })));
  }
}

/** Every flag with its help; a click writes it into the field above. */
function allFlags() {
  const headings = [...new Set(form.flags.map(({ heading }) => heading))];
  $("flags").replaceChildren(...headings.flatMap((heading) => [make("h4", {}, heading),
    ...form.flags.filter((flag) => flag.heading === heading).map((flag) => {
      const button = make("button", { type: "button" }, `${flag.name}${flag.switch || !flag.value ? "" : ` ${flag.value}`}`);
      button.addEventListener("click", () => {
        $("more").value = `${$("more").value.trim()} ${flag.name} `.trimStart();
        $("more").focus();
        tell();
      });
      return make("p", {}, button, flag.help, flag.default && !flag.help.includes("[default") ? ` [default: ${flag.default}]` : "");
    })]));
}

/** Shows the form, with the settings of a run where one is named, or hides it. */
export async function open(wanted = true, run = null, goesOn = false) {
  if (wanted && !form) {
    form = await (await fetch("/start")).json();
    $("fields").replaceChildren(...FIELDS.map(([title, ...fields]) => make("fieldset", {}, make("legend", {}, title), ...fields.map(fieldOf))));
    allFlags();
    names();
    like(run, goesOn);
  } else if (wanted) {
    names();
    if (run) like(run, goesOn); else tell();
  }
  $("start").hidden = !wanted;
  $("new").setAttribute("aria-expanded", wanted);
  // A form that says what was asked for needs a start, not a model.
  if (wanted && goesOn) $("go").focus();
  else if (wanted) field("model").focus(); else $("new").focus();
}

/* What the server says. */

const said = (...parts) => $("told").replaceChildren(...parts);
const refused = ({ text, place, help }) => make("div", { class: "remarks" },
  make("p", {}, place ? make("span", {}, place) : "", text, make("i", {}, help ?? "")));

/** Has the server do something with the arguments, while nothing else can be asked. */
async function ask(path, waiting, then) {
  const buttons = $("start").querySelectorAll(".actions button"), focused = document.activeElement;
  buttons.forEach((button) => { button.disabled = true; });
  said(make("p", { class: "muted" }, waiting));
  try {
    then(await post(path, { args: written() }));
  } catch (error) {
    said(refused(error.text ? error : { text: "The server does not answer.", help: "is it still there?" }));
  }
  buttons.forEach((button) => { button.disabled = false; });
  // What is disabled loses the focus.
  if (document.activeElement === document.body && !$("start").hidden) focused.focus();
}

const check = () => ask("/check", "reading rows and planning memory", ({ checks }) =>
  said(...checks.flatMap(({ command, ok, output }) => [make("h3", {}, `${ok ? "✓" : "✗"} ${command}`),
    make("pre", { class: ok ? "console" : "console failed" }, output.trim())])));

const start = () => ask("/start", "starting", () => {
  said();
  named = false;
  open(false);
  page.again();
});

/* Stopping, and going on. */

const stops = new Map();

/** What can be done with a run: it is stopped, or it goes on from its last checkpoint; null for nothing. */
export function actOf(run) {
  if (run.stoppable) return stopOf(run);
  if (!run.resumable || run.saved === null) return null;
  stops.delete(run.id);
  const button = make("button", { type: "button", class: "act", "data-key": `act ${run.name}`, "aria-label": `resume ${run.name}` }, "resume");
  button.addEventListener("click", () => open(true, run, true));
  return button;
}

/** The second click stops a run, so that the first may be an error. */
function stopOf(run) {
  const [step, problem] = stops.get(run.id) ?? ["stop"];
  const button = make("button", { type: "button", class: "act stop", "data-key": `act ${run.name}`, "aria-label": `${step} ${run.name}`,
    title: problem ?? "as Ctrl-C does: it saves a checkpoint" }, step);
  button.disabled = step === "stopping";
  const to = (...said) => { stops.set(run.id, said); page.head(); };
  button.addEventListener("click", async () => {
    if (step !== "stop and save?") {
      to("stop and save?");
      setTimeout(() => { if (stops.get(run.id)?.[0] === "stop and save?") to("stop"); }, 5000);
      return;
    }
    to("stopping");
    try { await post("/stop", { run: run.id }); page.again(); } catch (error) { to("stop", error.text); }
  });
  return button;
}

$("more").addEventListener("focus", () => { $("help").textContent = "Flags that have no field, written as on a command line."; });
$("new").addEventListener("click", () => open($("start").hidden));
$("close").addEventListener("click", () => open(false));
$("go").addEventListener("click", start);
$("like").addEventListener("change", ({ target }) => like(page.runs.get(Number(target.value || NaN))));
$("start").addEventListener("input", ({ target }) => {
  if (target.id === "like") return;
  named ||= target.id === "start-output_dir";
  tell();
});
// The Enter key checks, and starts nothing.
$("start").querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); check(); });
$("start").addEventListener("keydown", (event) => { if (event.key === "Escape" && event.target.tagName !== "SELECT") open(false); });
$("copy").addEventListener("click", async () => {
  // Where it is no address of this machine, a browser lets nothing be copied but by hand.
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "copied";
    setTimeout(() => { $("copy").textContent = "copy"; }, 2000);
  } catch { getSelection().selectAllChildren($("command")); }
});
