// The page: each section is built from its part of the data, and built again only when that part has changed.

const EVERY = 2000; // milliseconds between two questions for what is new
const AXES = [["step", "updates"], ["reward_queries", "scored pictures"], ["train_seconds", "time"]];

// What the reader has set; it outlives the sections.
const state = { axis: "step", wipes: {}, places: {}, open: {} };
const drawn = {};

const update = (step) => `update ${grouped(step, 0)}`;

function section(id, part, build) {
  const text = part ? JSON.stringify(part) : "";
  if (drawn[id] === text) return;
  drawn[id] = text;
  const element = find(id), focused = document.activeElement?.id;
  element.hidden = !part;
  if (!part) return;
  const body = element.querySelector(":scope > div") ?? element;
  body.replaceChildren(...build(part));
  if (focused) find(focused)?.focus({ preventScroll: true });
}

function asked({ facts, verdict, warning }) {
  return [
    make("p", { class: "verdict" }, verdict),
    warning ? make("p", { class: "warning", role: "note" }, warning) : "",
    make("dl", { class: "facts" }, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
  ];
}

function pairs(data) {
  const { prompts, frames: ends } = data.pairs, after = ends[1].at;
  let note = `The same prompt and seed: the base model left of the edge, ${update(after)} right of it.`;
  if (data.best !== null && data.best !== after) note += ` The LoRA in best/ is from ${update(data.best)}.`;
  return [
    make("p", { class: "note" }, note),
    make("div", { class: "pictures" }, ...prompts.map((prompt, i) => wipe(data, prompt, i, ends, state))),
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
  const said = (step) => [step ? update(step) : "base model", step === data.best ? "best" : ""];
  return frames(data, "at-update", "Update", data.samples, said, data.samples.frames.at(-1).at, state);
}

function sweep(data) {
  const { charts, recommended, rule } = data.sweep, built = [];
  const scale = (value) => `scale ${number(value)}`;
  if (recommended !== null)
    built.push(make("p", { class: "note" }, `The LoRA at several strengths: 0 is the base model, 1 is as trained. Recommended${rule ? `, by ${rule}` : ""}: ${number(recommended)}.`));
  if (charts.length)
    built.push(new Charts("scale", charts, "scale", scale, recommended === null ? null : { at: recommended, name: "recommended" }).element);
  if (data.sweep.frames.length)
    built.push(...frames(data, "at-scale", "Scale of the LoRA", data.sweep,
      (value) => [scale(value), value === recommended ? "recommended" : ""], recommended ?? 1, state));
  return built;
}

// A name that may be broken after an underscore.
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

function settings({ settings, command, environment, audit }) {
  const { changed, usual } = settings, head = ["setting", "value", "default"];
  const built = [
    make("pre", {}, make("code", {}, command)),
    make("p", { class: "note" }, "The command with these settings. To run it beside this one, give another --output; what was given in Python as an object has only its name here."),
    details("all-settings", "All settings", changed.length ? table("Changed", head, changed) : null, table("As by default", head.slice(0, 2), usual.map((row) => row.slice(0, 2)))),
  ];
  if (audit.length) {
    const columns = [...new Set(audit.flatMap(([, found]) => Object.keys(found)))];
    built.push(details("reward_check", "The reward, tried on the base model before training",
      table("Means of the pictures it was tried on", ["part", ...columns.map((name) => name.replaceAll("_", " "))],
        audit.map(([part, found]) => [part, ...columns.map((name) => number(found[name]))]))));
  }
  if (environment.length) built.push(details("versions", "Versions and machine", table("What it ran with", ["name", "value"], environment)));
  return built;
}

function render(data) {
  const any = (part) => (part.frames.length || part.charts?.length ? part : null);
  section("asked", [data.facts, data.verdict, data.warning], () => asked(data));
  section("pairs", data.pairs.frames.length === 2 && data.pairs.frames[0].at !== data.pairs.frames[1].at ? [data.pairs, data.best] : null, () => pairs(data));
  section("curves", data.charts.length ? [data.charts, data.best] : null, () => curves(data));
  section("samples", any(data.samples) && [data.samples, data.best], () => samples(data));
  section("sweep", any(data.sweep), () => sweep(data));
  section("settings", [data.settings, data.command, data.environment, data.audit], () => settings(data));
  const present = [...document.querySelectorAll("main > section:not([hidden]) > h2")];
  section("contents", present.map((title) => title.textContent), () =>
    present.map((title) => make("a", { href: `#${title.parentElement.id}` }, title.textContent)));
}

async function ask(path, stamp = "") {
  const answer = await fetch(path, { headers: { "If-None-Match": stamp } });
  if (!answer.ok && answer.status !== 304) throw new Error(answer.statusText);
  return answer;
}

// Asks the page's own server for what is new; pictures that are here already are not asked for again.
async function follow(data) {
  const live = find("live");
  for (;;) {
    try {
      const answer = await ask("data", data.stamp);
      if (answer.status !== 304) {
        const next = await answer.json(), pictures = {};
        for (const digest of next.pictures) pictures[digest] = data.pictures[digest] ?? (await (await ask(`pictures/${digest}`)).text());
        data = { ...next, pictures };
        render(data);
      }
      live.textContent = "· live";
    } catch {
      live.textContent = "· no longer followed: this is what was there last";
    }
    do await new Promise((resume) => setTimeout(resume, EVERY)); while (document.hidden);
  }
}

const data = JSON.parse(find("data").textContent);
render(data);
if (data.live) follow(data);
