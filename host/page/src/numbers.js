// Numbers as texts, and the places of ticks.

const minus = (text) => text.replaceAll("-", "−");

/** A number in the few digits that can be told apart in a chart. */
export function short(value) {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "–";
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return minus(value.toExponential(1));
  const text = value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.01 ? 3 : 5);
  return minus(text.includes(".") ? text.replace(/\.?0+$/, "") : text);
}

/** Ticks as texts, each with the digits that set it apart from the next. */
export function labels(all, log = false) {
  if (log && all.at(-1) / all[0] >= 3) return all.map(short);
  const gaps = all.slice(1).map((value, i) => value - all[i]);
  const step = gaps.length ? Math.min(...gaps) : Math.abs(all[0]), power = Math.floor(Math.log10(step) + 1e-9);
  // One way to write them for all of an axis.
  const sizes = all.map(Math.abs), largest = Math.max(...sizes);
  const exponents = largest >= 1e5 || largest < 1e-3;
  return all.map((value, i) => {
    if (sizes[i] < step / 2) return "0";
    const digits = exponents ? Math.floor(Math.log10(sizes[i]) + 1e-9) - power : -power;
    const text = exponents ? value.toExponential(Math.min(12, Math.max(0, digits))) : value.toFixed(Math.min(12, Math.max(0, digits)));
    return minus(text);
  });
}

export const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
export const plain = (value, digits) => minus(value.toFixed(digits).replace(/^-(?=[0.]*$)/, ""));

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s / 60) % 60)} min`;
  return `${Math.floor(s / 86400)} days`;
}

export function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

/** With room at both ends; a flat curve is drawn in the middle. */
export function widened([low, high], log = false) {
  if (log) return widened([Math.log10(low), Math.log10(high)]).map((power) => 10 ** power);
  const room = high > low ? (high - low) * 0.04 : Math.max(Math.abs(low) * 0.1, 1e-12);
  return [low - room, high + room];
}

/** Round values within a range, about so many. */
export function ticks(low, high, about, log = false) {
  // Within less than a decade, the ticks of a linear axis tell more.
  if (log && high / low >= 10) {
    const wide = high / low > 1000, all = [];
    const every = Math.ceil(Math.log10(high / low) / (about + 1));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += wide ? every : 1) {
      for (const m of wide ? [1] : [1, 3]) all.push(Number((m * 10 ** power).toPrecision(12)));
    }
    return all.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
  const all = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9 && all.length < 12; n++) all.push(Number((n * step).toPrecision(12)));
  return all;
}
