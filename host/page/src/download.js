// Downloads: the numbers that are shown as CSV, a chart as SVG or PNG.

import { make, view } from "./shared.js";

/** What has to stand in a picture itself, since no style comes with it. */
const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font-family", "font-size",
  "font-weight", "visibility"];
const ROW = 17, TITLE = 26, EDGE = 10;

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const field = (value) => {
  const text = value === undefined || value === null ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

/** The numbers of runs within the range that is shown, a row for each line of the log. */
export function saveNumbers(runs) {
  const inside = runs.flatMap((run) => run.rows.filter((row) =>
    (view.from === null || row[view.x] >= view.from) && (view.to === null || row[view.x] <= view.to))
    .map(({ line }) => ({ run: run.name, ...line })));
  const names = [...new Set(inside.flatMap(Object.keys))];
  const text = [names, ...inside.map((row) => names.map((name) => row[name]))].map((row) => row.map(field).join(",")).join("\r\n");
  save(new Blob([`${text}\r\n`], { type: "text/csv" }), "runs.csv");
}

/** A chart with its title and the names of its runs. */
export function savePicture(svg, title, curves, kind) {
  const runs = [...new Set(curves.map(({ run }) => run))], name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const width = Math.round(svg.getBoundingClientRect().width) + 2 * EDGE, under = TITLE + svg.getBoundingClientRect().height + 8;
  const height = Math.round(under + (runs.length > 1 ? runs.length * ROW : 0) + EDGE);
  const chart = svg.cloneNode(true), style = getComputedStyle(document.body);
  chart.querySelectorAll(".brush").forEach((element) => element.remove());
  const group = make("g", { transform: `translate(${EDGE} ${TITLE})` }, ...chart.childNodes);
  const names = runs.length > 1 ? runs.flatMap((run, i) => [
    make("path", { class: `curve ${run.look}`, d: `M${EDGE} ${under + i * ROW}h24` }),
    make("text", { x: EDGE + 32, y: under + i * ROW + 4 }, run.name)]) : [];
  const whole = make("svg", { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, class: "away" },
    make("rect", { class: "paper", width, height }), make("text", { class: "title", x: EDGE, y: 18 }, title), group, ...names);
  // Styles are known of what is on the page only.
  const holder = make("div", { class: "chart away" }, whole);
  document.body.append(holder);
  for (const element of whole.querySelectorAll("*")) {
    const own = getComputedStyle(element);
    for (const property of STYLES) element.setAttribute(property, own.getPropertyValue(property));
  }
  holder.remove();
  whole.querySelectorAll("[class]").forEach((element) => element.removeAttribute("class"));
  whole.removeAttribute("class");
  const text = new XMLSerializer().serializeToString(whole);
  if (kind === "SVG") return save(new Blob([text], { type: "image/svg+xml" }), `${name}.svg`);
  const image = new Image(), canvas = make("canvas", { width: 2 * width, height: 2 * height });
  image.addEventListener("load", () => {
    const paper = canvas.getContext("2d");
    paper.fillStyle = style.backgroundColor;
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, `${name}.png`));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}
