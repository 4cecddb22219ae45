// Tries every action of the page of runs in a real browser, on runs of the demo: `node page.mjs target/release/dpo-host`.
// With a folder behind it, the pictures of docs/page.md are taken anew: `node page.mjs target/release/dpo-host docs/images`.
//
// CHROMIUM names the browser, /usr/bin/chromium unless it does. An error on the browser's console that no step expects is a failure.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { chromium } from "playwright-core";

const [host, pictures] = process.argv.slice(2).map((path) => resolve(path));
const folder = mkdtempSync(join(tmpdir(), "dpo-host-page-"));
const WIDTHS = [390, 820, 1440], SCHEMES = ["light", "dark"];
const BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

/* What is looked at. */

/** Trains the demo with a few steps. */
function train(name, ...flags) {
  const all = ["train", "--model", "demo", "--output-dir", `runs/${name}`, "--logging-steps", "1", "--batch-size", "8", ...flags];
  const ended = spawnSync(host, all, { cwd: folder, encoding: "utf8" });
  assert.equal(ended.status, 0, ended.stderr);
}

/** A server of the page, with its address. */
async function serve(...flags) {
  const child = spawn(host, ["ui", ...flags, "--listen", "0"], { cwd: folder, stdio: ["ignore", "ignore", "pipe"] });
  const address = await new Promise((found, failed) => {
    let text = "";
    child.stderr.on("data", (part) => {
      text += part;
      const [url] = text.match(/http:\S+(?=\s)/) ?? [];
      if (url) found(url);
    });
    child.on("exit", () => failed(new Error(text)));
  });
  return { address, end: () => child.kill("SIGKILL") };
}

let browser;
const problems = [];

/** A new page of a width and a colour scheme. What the console says is a problem, but for what is expected by now. */
async function open(address, width = 1440, colorScheme = "light", more = {}) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, reducedMotion: "reduce", ...more });
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const page = await context.newPage();
  page.setDefaultTimeout(20000);
  page.expected = /^$/;
  page.on("pageerror", (error) => problems.push(`${error}`));
  page.on("console", (message) => {
    if (message.type() !== "error" && message.type() !== "warning") return;
    if (!page.expected.test(message.text())) problems.push(`${message.text()} (${message.location().url})`);
  });
  await page.goto(address);
  return page;
}

const until = (page, what, ...args) => page.waitForFunction(what, args.length ? args[0] : undefined, { timeout: 60000 });
/** Charts are drawn. */
const drawn = (page) => until(page, () => document.querySelectorAll(".curve").length > 3);
const text = (page, selector) => page.locator(selector).first().innerText();
const names = (page) => page.locator("#runs tbody tr td:first-child").allInnerTexts();
const hash = async (page, pattern) => until(page, (source) => new RegExp(source).test(location.hash), pattern);
/** Where the curves of a chart end, as it is drawn. */
const curve = (page, at = 0) => page.locator(".chart").nth(at).locator(".curve:not(.raw)").first().getAttribute("points");

/** A field of the form that starts runs. */
const field = (page, label) => page.locator("#start").getByLabel(label, { exact: true });

async function saved(page, click) {
  const [download] = await Promise.all([page.waitForEvent("download"), click()]);
  return { name: download.suggestedFilename(), bytes: readFileSync(await download.path()) };
}

/* Steps, in their order. */

const steps = [];
const step = (name, run) => steps.push({ name, run });

step("runs stand side by side, sorted, filtered and hidden", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  assert.equal(await text(page, "#title"), "3 runs");
  assert.deepEqual(await names(page), ["fast", "slow", "steady"]);
  const by = page.getByRole("button", { name: "loss", exact: true });
  const losses = async () => (await page.locator("#runs tbody tr").evaluateAll((rows) =>
    rows.map((row) => Number(row.children[[...row.parentNode.parentNode.querySelectorAll("th")].findIndex((th) => th.innerText.trim().startsWith("loss"))].innerText.replace("−", "-")))));
  await by.click();
  assert.deepEqual(await losses(), [...await losses()].sort((a, b) => a - b));
  await hash(page, "sort=loss");
  await by.click();
  assert.deepEqual(await losses(), [...await losses()].sort((a, b) => b - a));
  assert.equal(await page.locator("th[aria-sort=descending]").count(), 1);
  await by.click();
  assert.equal(await page.locator("th[aria-sort]").count(), 0);
  await page.fill("#filter", "learning_rate=0.002 fa");
  assert.deepEqual(await names(page), ["fast"]);
  assert.equal(await text(page, "#count"), "1 of 3 runs");
  await page.fill("#filter", "");
  const curves = () => page.locator(".chart").first().locator(".curve").count();
  const before = await curves();
  await page.getByRole("checkbox", { name: "slow" }).uncheck();
  assert.equal(await curves(), before - 1);
  await hash(page, "hide=slow");
  await page.getByRole("checkbox", { name: "show all runs" }).click();
  assert.equal(await curves(), before);
  await page.close();
});

step("notes stay", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  await page.getByRole("textbox", { name: "note on slow" }).fill("too low a rate");
  await page.reload();
  await drawn(page);
  assert.equal(await page.getByRole("textbox", { name: "note on slow" }).inputValue(), "too low a rate");
  await page.fill("#filter", "too low");
  assert.deepEqual(await names(page), ["slow"]);
  await page.close();
});

step("a range is dragged, typed and left again", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  const whole = await curve(page), chart = page.locator(".chart svg").first();
  await chart.scrollIntoViewIfNeeded();
  const box = await chart.boundingBox();
  const drag = async () => {
    await page.mouse.move(box.x + box.width * 0.3, box.y + 60);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width * 0.6, box.y + 70, { steps: 4 });
    assert.equal(await page.locator(".brush").count(), 1);
    await page.mouse.up();
  };
  await drag();
  const [from, to] = [Number(await page.inputValue("#from")), Number(await page.inputValue("#to"))];
  assert.ok(from > 0 && to > from && to < 16, `${from} to ${to}`);
  assert.notEqual(await curve(page), whole);
  await page.keyboard.press("Escape");
  assert.equal(await page.inputValue("#from"), "");
  await drag();
  await chart.dblclick();
  assert.equal(await curve(page), whole);
  await page.fill("#from", "4");
  await page.fill("#to", "9");
  await page.keyboard.press("Tab");
  await hash(page, "from=4&to=9");
  await page.click("#all");
  assert.equal(await page.inputValue("#to"), "");
  assert.equal(await page.evaluate(() => document.activeElement.id), "from");
  await page.close();
});

step("curves are drawn over epochs and time, smoothed, on a log axis", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  const plain = await curve(page), ticks = () => page.locator(".chart").first().locator("text.tick").allTextContents();
  await page.selectOption("#x", "time");
  assert.ok((await ticks()).every((one) => / (s|min|h)$/.test(one)), (await ticks()).join());
  await page.selectOption("#x", "epoch");
  await hash(page, "x=epoch");
  await page.selectOption("#x", "step");
  await page.locator("#smooth").focus();
  for (let i = 0; i < 60; i++) await page.keyboard.press("ArrowRight");
  assert.equal(await text(page, "output[for=smooth]"), "0.60");
  assert.ok(await page.locator(".curve.raw").count() > 0);
  assert.notEqual(await curve(page), plain);
  const smooth = await curve(page);
  await page.check("#log");
  assert.notEqual(await curve(page), smooth);
  await hash(page, "smooth=0.6.*log=1");
  await page.close();
});

step("the arrow keys and the pointer show a step in all charts", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  const chart = page.locator(".chart svg").first(), here = () => page.locator("text.here").allTextContents();
  await chart.focus();
  await page.keyboard.press("Home");
  assert.equal((await here())[0], "step 1");
  await page.keyboard.press("ArrowRight");
  assert.ok((await here()).length > 3 && (await here()).every((one) => one === "step 2"), (await here()).join());
  await page.keyboard.press("End");
  assert.equal((await here())[0], "step 16");
  await page.keyboard.press("Escape");
  assert.equal((await here()).length, 0);
  await chart.hover();
  assert.match((await here())[0], /^step \d+$/);
  await page.close();
});

step("numbers and charts are saved", async ({ address }) => {
  const page = await open(`${address}`);
  await drawn(page);
  await page.fill("#from", "3");
  await page.fill("#to", "5");
  await page.keyboard.press("Tab");
  const csv = await saved(page, () => page.click("#csv"));
  const rows = csv.bytes.toString().trim().split("\r\n"), head = rows[0].split(",");
  assert.equal(csv.name, "runs.csv");
  assert.ok(["run", "global_step", "loss", "grad_norm"].every((name) => head.includes(name)), rows[0]);
  const shown = rows.slice(1).map((row) => Number(row.split(",")[head.indexOf("global_step")]));
  assert.deepEqual([...new Set(shown)], [3, 4, 5]);
  assert.deepEqual([...new Set(rows.slice(1).map((row) => row.split(",")[0]))], ["fast", "slow", "steady"]);
  await page.locator(".chart").first().hover();
  const svg = await saved(page, () => page.locator(".save button").first().click());
  assert.equal(svg.name, "loss.svg");
  for (const part of ["<svg", "Loss", "steady", "polyline", "stroke"]) assert.ok(svg.bytes.includes(part), part);
  const png = await saved(page, () => page.locator(".save button").nth(1).click());
  assert.equal(png.name, "loss.png");
  assert.deepEqual([...png.bytes.subarray(0, 8)], [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  assert.ok(png.bytes.readUInt32BE(16) > 400 && png.bytes.length > 5000);
  await page.close();
});

step("samples, answers and settings", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  await page.selectOption("#whose select", "steady");
  await page.locator("#when").focus();
  await page.keyboard.press("Home");
  assert.equal(await text(page, "output[for=when]"), "0");
  assert.equal(await page.locator("#samples .token.p4, #samples .token.n4").count(), 0);
  await hash(page, "samples=steady.*when=0");
  await page.keyboard.press("End");
  assert.equal(await text(page, "output[for=when]"), "16");
  assert.ok(await page.locator("#samples .token.p2, #samples .token.p3, #samples .token.p4").count() > 0);
  const now = page.locator("#samples .now").first(), before = await now.innerText();
  await page.locator("#samples .token").first().hover();
  assert.notEqual(await now.innerText(), before);
  assert.ok(await page.locator("#answers article").count() > 0);
  const differing = await page.locator("#settings table td.muted").allInnerTexts();
  assert.ok(differing.includes("learning_rate") && !differing.includes("batch_size"), differing.join());
  await page.locator("#settings summary").click();
  assert.ok(await page.getByText("batch_size", { exact: true }).isVisible());
  await page.close();
});

step("the address keeps the view", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  await page.goto(new URL("#x=epoch&smooth=0.5&log=1&sort=-loss&hide=fast&filter=s&from=0.1", page.url()).href);
  await page.reload();
  await drawn(page);
  assert.equal(await page.inputValue("#x"), "epoch");
  assert.equal(await page.inputValue("#from"), "0.1");
  assert.equal(await page.inputValue("#filter"), "s");
  assert.equal(await text(page, "output[for=smooth]"), "0.50");
  assert.ok(await page.isChecked("#log"));
  assert.equal(await page.getByRole("checkbox", { name: "fast" }).isChecked(), false);
  await page.close();
});

/* Starting. */

step("without the token nobody is let in", async ({ address }) => {
  const page = await open("about:blank");
  page.expected = /403/;
  const answer = await page.goto(address.replace(/\?.*/, ""));
  assert.equal(answer.status(), 403);
  assert.match(await page.innerText("body"), /with its token/);
  await page.close();
});

step("the form shows the command line and what is wrong with it", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  await page.getByRole("button", { name: "Start a run" }).click();
  await until(page, () => document.activeElement?.name === "model");
  const command = () => page.textContent("#command");
  await field(page, "model").fill("demo");
  assert.equal(await command(), "dpo-host train --model demo --output-dir runs/demo-1");
  await field(page, "beta").fill("0.2");
  await field(page, "quantization").selectOption("nf4");
  await field(page, "target modules").fill("q_proj 'v proj'");
  await field(page, "other flags").fill("--system \"it's $(x)\"");
  assert.equal(await command(), "dpo-host train --model demo --quantization nf4 --beta 0.2 --target-modules q_proj 'v proj' --output-dir runs/demo-1 " +
    "--system 'it'\\''s $(x)'");
  await page.click("#copy");
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), await command());
  await field(page, "other flags").fill("--init-adapter ~/a");
  assert.ok((await command()).endsWith(` --init-adapter ${process.env.HOME}/a`), await command());
  await field(page, "other flags").fill("--system 'open");
  assert.ok(await page.getByRole("button", { name: "Check" }).isDisabled());
  await page.getByText("all flags", { exact: true }).click();
  await field(page, "other flags").fill("");
  await page.getByRole("button", { name: "--warmup-ratio 0..1" }).click();
  assert.equal(await field(page, "other flags").inputValue(), "--warmup-ratio ");
  // What is refused is said with its help.
  page.expected = /422/;
  for (const [flags, said] of [["--warmup-ratio 7", /--warmup-ratio\s*should be from 0 to 1/], ["--modle x", /did you mean '--model'/],
    ["--plugin-dir /tmp", /not for a page to give/], ["--config x.toml", /not for a page to give/], ["--output-dir /tmp/x", /right inside of runs/]]) {
    await field(page, "other flags").fill(flags);
    await page.getByRole("button", { name: "Start", exact: true }).click();
    await until(page, (source) => new RegExp(source).test(document.querySelector("#told").innerText), said.source);
  }
  await page.keyboard.press("Escape");
  assert.equal(await page.locator("#start").isVisible(), false);
  assert.equal(await page.evaluate(() => document.activeElement.id), "new");
  await page.close();
});

step("a run is checked, started, shown and stopped", async ({ address }) => {
  const page = await open(address);
  await drawn(page);
  await page.click("#new");
  // With the settings of another run.
  await until(page, () => document.querySelectorAll("#like option").length === 4);
  await page.selectOption("#like", { label: "fast" });
  assert.equal(await field(page, "learning rate").inputValue(), "0.002");
  assert.match(await field(page, "other flags").inputValue(), /--max-steps 16/);
  await page.selectOption("#like", { label: "no run, all as usual" });
  await field(page, "model").fill("demo");
  await field(page, "folder").fill("by-form");
  await field(page, "epochs").fill("500");
  await field(page, "batch size").fill("8");
  await field(page, "other flags").fill("--logging-steps 1 --system \"it's #é $x\"");
  // The Enter key checks.
  await field(page, "epochs").press("Enter");
  await until(page, () => document.querySelectorAll("#told pre").length === 2);
  assert.match(await text(page, "#told"), /✓ dpo-host data[^]*320 pairs[^]*✓ dpo-host plan[^]*planned/);
  const command = await page.textContent("#command");
  await page.getByRole("button", { name: "Start", exact: true }).click();
  await until(page, () => /by-form/.test(document.querySelector("#runs").innerText));
  assert.equal(readFileSync(join(folder, "runs/by-form/console.log"), "utf8").split("\n")[0], `$ ${command}`);
  await until(page, () => /by-form\s+running/.test(document.querySelector("#runs").innerText));
  await page.getByRole("button", { name: "stop by-form" }).click();
  await page.getByRole("button", { name: "stop and save? by-form" }).click();
  await until(page, () => /by-form\s+stopped, saved/.test(document.querySelector("#runs").innerText));
  assert.match(await text(page, "#console"), /ended by SIGINT after step \d+, which is saved/);
  // It goes on from there.
  await page.getByRole("button", { name: "resume by-form" }).click();
  await until(page, () => document.activeElement?.id === "go");
  assert.match(await page.textContent("#command"), /--output-dir runs\/by-form --system 'it'\\''s #é \$x' .*--resume-from-checkpoint latest$/);
  await page.getByRole("button", { name: "Start", exact: true }).click();
  await until(page, () => /by-form\s+running/.test(document.querySelector("#runs").innerText));
  await page.getByRole("button", { name: "stop by-form" }).click();
  await page.getByRole("button", { name: "stop and save? by-form" }).click();
  await until(page, () => /by-form\s+stopped, saved/.test(document.querySelector("#runs").innerText));
  // One that fails says why.
  await page.click("#new");
  await field(page, "model").fill("/nowhere");
  await field(page, "dataset").fill("/nothing");
  await field(page, "folder").fill("failing");
  await page.getByRole("button", { name: "Start", exact: true }).click();
  await until(page, () => /failing\s+failed before the first step/.test(document.querySelector("#runs").innerText));
  assert.match(await text(page, "#console"), /error: [^]*\/nowhere/);
  await page.close();
});

step("a page of one run, and of none", async () => {
  const one = await serve("runs/steady"), page = await open(one.address);
  await drawn(page);
  assert.equal(await text(page, "#title"), "steady");
  assert.match(await text(page, "#state"), /finished/);
  assert.match(await text(page, "#figures"), /Best eval loss/);
  assert.equal(await page.locator("#actions").isVisible(), false);
  // What `eval --generate` writes comes to the answers.
  writeFileSync(join(folder, "prompts.txt"), "Do you like tea?\nMy dog died\n");
  assert.equal(spawnSync(host, ["eval", "--adapter", "runs/steady", "--generate", "prompts.txt"], { cwd: folder }).status, 0);
  await page.reload();
  await until(page, () => /2 prompts, base/.test(document.querySelector("#answers").innerText));
  assert.ok(await page.locator("#answers .prompt").getByText("Do you like tea?").isVisible());
  await page.getByRole("textbox", { name: "note on steady" }).fill("mine");
  await page.close();
  one.end();
  const none = await serve("--allow-start", "none"), empty = await open(none.address);
  await until(empty, () => document.activeElement?.name === "model");
  assert.equal(await text(empty, "#title"), "No runs yet");
  await empty.close();
  none.end();
});

/* How it looks at every width, in both schemes. */

/** Elements that are too wide, have no name, or are too pale, as the page itself finds them. */
const faults = () => {
  const found = [], root = document.documentElement, visible = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  if (root.scrollWidth > innerWidth) found.push(`the page is ${root.scrollWidth} wide in ${innerWidth}`);
  const named = (e) => e.labels?.length || e.getAttribute("aria-label") || e.innerText?.trim();
  for (const e of document.querySelectorAll("input, select, textarea, button")) if (visible(e) && !named(e)) found.push(`no name: ${e.outerHTML.slice(0, 80)}`);
  const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const stack = [];
    for (let at = e; at; at = at.parentElement) stack.push(channels(getComputedStyle(at).backgroundColor));
    return stack.reverse().reduce((under, [r, g, b, a = 1]) => under.map((v, i) => v * (1 - a) + [r, g, b][i] * a), [255, 255, 255]);
  };
  const pale = (e, colour, opacity, text) => {
    const under = behind(e), over = channels(colour).slice(0, 3).map((v, i) => v * opacity + under[i] * (1 - opacity));
    const [a, b] = [light(over), light(under)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${text.trim().slice(0, 40)} (${e.getAttribute("class") || e.tagName})`);
  };
  for (const e of document.querySelectorAll("input[placeholder], textarea[placeholder]")) {
    const style = getComputedStyle(e, "::placeholder");
    if (visible(e) && e.value === "") pale(e, style.color, Number(style.opacity), e.placeholder);
  }
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest("script, [disabled], option") || !visible(e)) continue;
    pale(e, e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color, 1, walk.currentNode.data);
  }
  return [...new Set(found)];
};

step("no page is too wide, too pale, or nameless", async ({ address }) => {
  for (const width of WIDTHS) for (const scheme of SCHEMES) {
    const page = await open(address, width, scheme);
    await drawn(page);
    assert.deepEqual(await page.evaluate(faults), [], `${width} ${scheme}`);
    await page.click("#new");
    await until(page, () => document.activeElement?.name === "model");
    await field(page, "model").fill("a-name-that-is-very-long/".repeat(6));
    await page.getByText("all flags", { exact: true }).click();
    assert.deepEqual(await page.evaluate(faults), [], `${width} ${scheme}, with the form`);
    await page.close();
  }
});

/* The pictures of the documentation, with the fonts of this machine: they were taken with Inter as system-ui. */

async function picture(name, address, width, scheme, height, prepare = async () => {}) {
  const page = await open(address, width, scheme, width < 500 ? { deviceScaleFactor: 1.5 } : {});
  await drawn(page);
  await prepare(page);
  await page.setViewportSize({ width, height });
  await page.waitForTimeout(400);
  await page.screenshot({ path: join(pictures, name) });
  await page.close();
}

async function takePictures() {
  const rates = { "rate-1e-3": "1e-3", "rate-2e-3": "2e-3", "rate-5e-3": "5e-3" };
  for (const [name, rate] of Object.entries(rates)) {
    train(`../shown/${name}`, "--learning-rate", rate, "--max-steps", "80", "--eval-steps", "10", "--batch-size", "16");
  }
  train("../shown/beta-0.2", "--learning-rate", "1e-3", "--beta", "0.2", "--max-steps", "80", "--eval-steps", "10", "--batch-size", "16");
  const many = await serve("shown"), one = await serve("shown/rate-2e-3"), starting = await serve("--allow-start", "shown");
  const form = async (page) => {
    await page.click("#new");
    await until(page, () => document.activeElement?.name === "model");
    await field(page, "model").fill("Qwen/Qwen2.5-7B-Instruct");
    await field(page, "dataset").fill("prefs.jsonl");
    await field(page, "beta").fill("0.1");
    await field(page, "quantization").selectOption("nf4");
    await field(page, "learning rate").fill("5e-5");
    await field(page, "other flags").fill("--split-dataset-ratio 0.02 --eval-steps 50");
    await field(page, "learning rate").focus();
    await page.evaluate(() => scrollTo(0, 0));
  };
  await picture("page.png", many.address, 1180, "light", 900);
  await picture("page-dark.png", one.address, 1180, "dark", 900);
  await picture("page-narrow.png", one.address, 390, "light", 760);
  await picture("report.png", `file://${folder}/shown/rate-1e-3/report.html`, 1180, "light", 1300);
  await picture("start.png", starting.address, 1180, "light", 830, form);
  await picture("start-narrow-dark.png", starting.address, 390, "dark", 844, form);
  [many, one, starting].forEach((server) => server.end());
}

/* All of it. */

try {
  for (const [name, rate] of [["fast", "2e-3"], ["slow", "1e-4"], ["steady", "1e-3"]]) {
    train(name, "--learning-rate", rate, "--max-steps", "16", "--eval-steps", "8");
  }
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: BROWSER });
  const server = await serve("--allow-start", "runs");
  for (const { name, run } of steps) {
    const start = Date.now();
    await run(server);
    assert.deepEqual(problems, [], name);
    console.log(`${name} (${((Date.now() - start) / 1000).toFixed(1)} s)`);
  }
  server.end();
  if (pictures) await takePictures();
} finally {
  await browser?.close();
  rmSync(folder, { recursive: true, force: true });
}
