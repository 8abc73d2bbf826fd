// A chart of one curve: axes, band, line, a mark, and the value under the pointer.

const HEIGHT = 190, TOP = 14, RIGHT = 12, BOTTOM = 24;
const FEW = 32; // maximum number of points that are drawn as dots
const NOISY = 24; // number of points from which on a training curve is smoothed
const UNITS = [["seconds", 1], ["minutes", 60], ["hours", 3600], ["days", 86400]];

// Ticks at multiples of 1, 2 or 5 times a power of ten.
function ticks(low, high, most) {
  const least = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999) * power;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    const value = i * step + 0; // avoids negative zero
    result.push([value, step >= 1000 ? `${grouped(value / 1000, step % 1000 ? 1 : 0)}k` : grouped(value, digits)]);
  }
  return result;
}

// Ticks at powers of ten, with ticks in between if these are few.
function logTicks(low, high) {
  const result = [];
  for (const factors of [[1], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    result.length = 0;
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      result.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(1))));
    const inside = result.filter((value) => value >= low && value <= high);
    if (inside.length > 2) return inside.map((value) => [value, number(value)]);
  }
  return ticks(low, high, 4).filter(([value]) => value > 0);
}

// Running mean, of logarithms if `log` is set; missing values are skipped.
function smoothed(values, log = false) {
  const reach = Math.max(2, Math.round(values.length / 40));
  const levels = log ? values.map((value) => (value > 0 ? Math.log(value) : null)) : values;
  return levels.map((level, i) => {
    if (level === null) return null;
    const near = levels.slice(Math.max(0, i - reach), i + reach + 1).filter((other) => other !== null);
    const mean = near.reduce((sum, other) => sum + other, 0) / near.length;
    return log ? Math.exp(mean) : mean;
  });
}

// The time unit for an axis that ends at `most` seconds.
function axisUnit(axis, most) {
  if (axis === "train_seconds") return [...UNITS].reverse().find(([, size]) => most >= 2 * size) ?? UNITS[0];
  return [{ step: "updates", reward_queries: "scored images", scale: "scale of the LoRA" }[axis], 1];
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// The segments of a line between missing values.
function stretches(points) {
  const segments = [[]];
  for (const point of points) point.slice(1).includes(null) ? segments.push([]) : segments.at(-1).push(point);
  return segments.filter((stretch) => stretch.length);
}

class Chart {
  // group: charts with a common axis and cursor; mark: a position on the axis "step" or "scale", and its name.
  constructor(spec, id, group, mark) {
    Object.assign(this, { spec, group, mark });
    this.readout = make("output", { class: "readout" });
    this.svg = draw("svg", { role: "img", "aria-label": this.summary() });
    this.keys = make("input", {
      type: "range", id, min: 0, max: spec.values.length - 1, value: spec.values.length - 1, step: 1,
      "aria-label": `Values of ${spec.title}, ${spec.note}`,
      input: () => group.point(this.place(Number(this.keys.value))),
      focus: () => group.point(this.place(Number(this.keys.value))),
      blur: () => group.rest(),
    });
    this.element = make("figure", { class: `chart ${spec.kind}` },
      make("figcaption", {}, make("h3", {}, spec.title), this.readout, make("p", { class: "note" }, spec.note)),
      this.svg, this.keys);
    this.svg.addEventListener("pointermove", (event) => group.point(this.under(event)));
    this.svg.addEventListener("pointerdown", (event) => group.point(this.under(event)));
    this.svg.addEventListener("pointerleave", () => group.rest());
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  summary() {
    const known = this.spec.values.filter((value) => value !== null);
    return `${this.spec.title}: from ${number(known[0])} to ${number(known.at(-1))}, ${known.length} values`;
  }

  // The x position of a value on the group's axis.
  place(index) {
    return this.spec.x[this.group.base][index];
  }

  under(event) {
    const x = this.low + ((event.offsetX - this.left) / (this.right - this.left)) * (this.high - this.low);
    return this.place(nearest(this.spec.x[this.group.axis], x));
  }

  // The line (smoothed if noisy), the edges of its band, and their scales.
  measure(full) {
    const { spec, group } = this, { values } = spec;
    this.smooth = spec.noisy && values.length >= NOISY;
    this.line = this.smooth ? smoothed(values, spec.log) : values;
    const widths = spec.spread && (this.smooth ? smoothed(spec.spread) : spec.spread);
    this.edges = this.line.map((v, i) => (v === null || !widths || widths[i] === null ? [null, null] : [v - widths[i], v + widths[i]]));

    const seen = [...values, ...this.edges.flat()].filter((v) => v !== null && (!spec.log || v > 0));
    let bottom = Math.min(...seen), top = Math.max(...seen);
    if (top - bottom < 1e-9 * Math.max(1, Math.abs(top))) {
      const room = Math.abs(top) / 2 || 1; // a constant curve is centered
      [bottom, top] = [bottom - room, top + room];
    }
    this.rows = spec.log ? logTicks(bottom, top) : ticks(bottom, top, 5);
    this.left = 12 + 6.3 * Math.max(...this.rows.map(([, text]) => text.length));
    this.right = full - RIGHT;
    [this.low, this.high] = group.domain();
    const level = (v) => (spec.log ? Math.log(Math.max(v, bottom)) : v);
    const tall = HEIGHT - TOP - BOTTOM, span = level(top) - level(bottom);
    this.x = (value) => this.left + ((value - this.low) / (this.high - this.low || 1)) * (this.right - this.left);
    this.y = (value) => (value === null ? null : TOP + tall - ((level(value) - level(bottom)) / span) * tall);
  }

  draw() {
    const full = this.element.clientWidth;
    if (!full) return;
    this.measure(full);
    const xs = this.spec.x[this.group.axis].map(this.x);
    const points = (values) => values.map((value, i) => [xs[i], this.y(value)]);
    const line = (values, kind) => draw("path", { class: kind, d: stretches(points(values)).map(path).join("") });
    const dots = this.line.length > FEW ? [] : stretches(points(this.line)).flat();
    this.cursor = draw("g", { visibility: "hidden" },
      draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM }), draw("circle", { class: "here", r: 4 }));
    this.svg.setAttribute("viewBox", `0 0 ${full} ${HEIGHT}`);
    this.svg.replaceChildren(
      ...this.scale(),
      ...stretches(this.edges.map(([low, high], i) => [xs[i], this.y(low), this.y(high)])).map((part) => draw("path",
        { class: "band", d: `${path([...part.map(([x, , high]) => [x, high]), ...part.map(([x, low]) => [x, low]).reverse()])}Z` })),
      ...this.flag(xs),
      ...(this.smooth ? [line(this.spec.values, "line raw")] : []),
      line(this.line, "line"),
      ...dots.map(([cx, cy]) => draw("circle", { class: "dot", cx, cy, r: 2.5 })),
      this.cursor,
    );
    this.point(this.group.cursor);
  }

  // Grid lines and numbers of both axes; the last number leaves room for the unit.
  scale() {
    const [unit, size] = axisUnit(this.group.axis, this.high), foot = HEIGHT - 6;
    const columns = ticks(this.low / size, this.high / size, Math.max(2, Math.min(8, (this.right - this.left) / 60)));
    const free = this.right - 5.6 * unit.length - 16;
    return [
      ...this.rows.map(([value, text]) => draw("g", {},
        draw("line", { class: "grid", x1: this.left, x2: this.right, y1: this.y(value), y2: this.y(value) }),
        draw("text", { x: this.left - 7, y: this.y(value) + 4, "text-anchor": "end" }, text))),
      ...columns.map(([value, text]) => [this.x(value * size), text]).filter(([x]) => x < free).map(([x, text]) =>
        draw("text", { x, y: foot, "text-anchor": "middle" }, text)),
      draw("text", { x: this.right, y: foot, "text-anchor": "end" }, unit),
    ];
  }

  // The mark and its name.
  flag(xs) {
    if (!this.mark) return [];
    const x = xs[nearest(this.spec.x[this.group.base], this.mark.at)];
    return [
      draw("line", { class: "mark", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      draw("text", { x, y: TOP - 4, "text-anchor": x > this.right - 40 ? "end" : "middle" }, this.mark.name),
    ];
  }

  // Shows the value at an index, or the last value.
  point(place) {
    const { spec, group } = this, places = spec.x[group.base];
    const i = place === null ? places.length - 1 : nearest(places, place);
    const spread = spec.spread?.[i];
    const text = `${group.describe(places[i])}: ${number(spec.values[i])}${spread ? ` ± ${number(Number(spread.toPrecision(2)))}` : ""}`;
    this.readout.textContent = text;
    this.keys.setAttribute("aria-valuetext", text);
    if (!this.cursor) return;
    const x = this.x(spec.x[group.axis][i]), y = this.y(spec.values[i]);
    this.cursor.setAttribute("visibility", place === null || y === null ? "hidden" : "visible");
    const [rule, dot] = this.cursor.children;
    rule.setAttribute("x1", x);
    rule.setAttribute("x2", x);
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y ?? 0);
  }
}

// Charts with a common axis and cursor.
class Charts {
  constructor(id, specs, axis, describe, mark) {
    Object.assign(this, { axis, describe, base: "step" in specs[0].x ? "step" : "scale", cursor: null });
    this.list = specs.map((spec, i) => new Chart(spec, `${id}-${i}`, this, mark));
    this.specs = specs;
    this.element = make("div", { class: "charts" }, ...this.list.map((chart) => chart.element));
  }

  domain() {
    const all = this.specs.flatMap((spec) => spec.x[this.axis]);
    return [Math.min(0, ...all), Math.max(...all)];
  }

  along(axis) {
    this.axis = axis;
    for (const chart of this.list) chart.draw();
  }

  // Returns to the keyboard's position, if any.
  rest() {
    const held = this.list.find((chart) => chart.keys === document.activeElement);
    this.point(held ? held.place(Number(held.keys.value)) : null);
  }

  point(place) {
    this.cursor = place;
    for (const chart of this.list) chart.point(place);
  }
}
