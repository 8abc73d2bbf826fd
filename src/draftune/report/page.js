// The page. Each section is built from its part of the data, and rebuilt only when that part changes.

const EVERY = 2000; // milliseconds between two requests for new data
const AXES = [["step", "updates"], ["reward_queries", "scored images"], ["train_seconds", "time"]];

// State of the controls, which survives rebuilding the sections.
const state = { axis: "step", wipes: {}, places: {}, open: {} };
const rendered = {};

const update = (step) => `update ${grouped(step, 0)}`;

function section(id, part, build) {
  const text = part ? JSON.stringify(part) : "";
  if (rendered[id] === text) return;
  rendered[id] = text;
  const element = find(id), focused = document.activeElement?.id;
  element.hidden = !part;
  if (!part) return;
  const body = element.querySelector(":scope > div") ?? element;
  body.replaceChildren(...build(part));
  if (focused) find(focused)?.focus({ preventScroll: true });
}

function summary({ facts, summary, scores, warning }) {
  return [
    make("p", { class: "summary" }, summary),
    warning ? make("p", { class: "warning", role: "note" }, warning) : "",
    scores.rows.length ? make("div", { class: "scores", role: "region", "aria-label": "Scores", tabindex: "0" }, table(scores.note, scores.head, scores.rows)) : "",
    make("dl", { class: "facts" }, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
  ];
}

function pairs(data) {
  const { prompts, frames: ends } = data.pairs, after = ends[1].at;
  let note = `The same prompt and seed: the base model left of the edge, ${update(after)} right of it.`;
  if (data.best !== null && data.best !== after) note += ` The LoRA in best/ is from ${update(data.best)}.`;
  return [
    make("p", { class: "note" }, note),
    make("div", { class: "images" }, ...prompts.map((prompt, i) => wipe(data, prompt, i, ends, state))),
  ];
}

function curves({ charts, best }) {
  const mark = best === null ? null : { at: best, name: "best" };
  const group = new Charts("curve", charts, state.axis, update, mark);
  const radios = AXES.map(([axis, name]) => make("label", {},
    make("input", { type: "radio", name: "axis", id: `axis-${axis}`, value: axis, checked: axis === state.axis,
      change: () => { state.axis = axis; group.along(axis); } }), name));
  return [make("fieldset", { class: "axis" }, make("legend", {}, "Along"), ...radios), group.element];
}

function samples(data) {
  const describe = (step) => [step ? update(step) : "base model", step === data.best ? "best" : ""];
  return frames(data, "at-update", "Update", data.samples, describe, data.samples.frames.at(-1).at, state);
}

function sweep(data) {
  const { charts, note } = data.sweep, built = note ? [make("p", { class: "note" }, note)] : [];
  const recommended = data.sweep.recommended || null; // 0: no scale is better than the base model
  const scale = (value) => `scale ${number(value)}`;
  if (charts.length)
    built.push(new Charts("scale", charts, "scale", scale, recommended === null ? null : { at: recommended, name: "recommended" }).element);
  if (data.sweep.frames.length)
    built.push(...frames(data, "at-scale", "Scale of the LoRA", data.sweep,
      (value) => [scale(value), value === recommended ? "recommended" : ""], recommended ?? 1, state));
  return built;
}

// A name with line-break opportunities after underscores.
const broken = (name) => name.split(/(?<=_)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

function table(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row" }, ...broken(name)), ...cells.map((cell) => make("td", {}, cell))))));
}

function details(id, summary, ...children) {
  return make("details", { id, open: Boolean(state.open[id]), toggle: (event) => (state.open[id] = event.target.open) },
    make("summary", { id: `${id}-summary` }, summary), ...children);
}

function settings({ settings, command, environment, reward_check: check }) {
  const { changed, usual } = settings, head = ["setting", "value", "default"];
  const built = [
    make("pre", {}, make("code", {}, command)),
    make("p", { class: "note" }, "The command with these settings. To repeat the run, give another --output. Objects that were passed in Python are shown by name only."),
    details("all-settings", "All settings", changed.length ? table("Changed", head, changed) : null, table("Defaults", head.slice(0, 2), usual.map((row) => row.slice(0, 2)))),
  ];
  if (check.length) {
    const columns = [...new Set(check.flatMap(([, row]) => Object.keys(row)))];
    built.push(details("reward_check", "Check of the reward before training",
      table("Means over images of the base model", ["part", ...columns.map((name) => name.replaceAll("_", " "))],
        check.map(([part, row]) => [part, ...columns.map((name) => number(row[name]))]))));
  }
  if (environment.length) built.push(details("versions", "Versions and machine", table("Environment", ["name", "value"], environment)));
  return built;
}

function render(data) {
  const any = (part) => (part.frames.length || part.charts?.length ? part : null);
  section("summary", [data.facts, data.summary, data.scores, data.warning], () => summary(data));
  section("pairs", data.pairs.frames.length === 2 && data.pairs.frames[0].at !== data.pairs.frames[1].at ? [data.pairs, data.best] : null, () => pairs(data));
  section("curves", data.charts.length ? [data.charts, data.best] : null, () => curves(data));
  section("samples", any(data.samples) && [data.samples, data.best], () => samples(data));
  section("sweep", any(data.sweep), () => sweep(data));
  section("settings", [data.settings, data.command, data.environment, data.reward_check], () => settings(data));
  const present = [...document.querySelectorAll("main > section:not([hidden]) > h2")];
  section("contents", present.map((title) => title.textContent), () =>
    present.map((title) => make("a", { href: `#${title.parentElement.id}` }, title.textContent)));
}

async function ask(path, stamp = "") {
  const answer = await fetch(path, { headers: { "If-None-Match": stamp } });
  if (!answer.ok && answer.status !== 304) throw new Error(answer.statusText);
  return answer;
}

// Polls the page's own server for new data; images that are already here are not requested again.
async function follow(data) {
  const live = find("live");
  for (;;) {
    try {
      const answer = await ask("data", data.stamp);
      if (answer.status !== 304) {
        const next = await answer.json(), images = {};
        for (const digest of next.images) images[digest] = data.images[digest] ?? (await (await ask(`images/${digest}`)).text());
        data = { ...next, images };
        render(data);
      }
      live.textContent = "· live";
    } catch {
      live.textContent = "· disconnected: this is the last state received";
    }
    do await new Promise((resume) => setTimeout(resume, EVERY)); while (document.hidden);
  }
}

const data = JSON.parse(find("data").textContent);
render(data);
if (data.live) follow(data);
