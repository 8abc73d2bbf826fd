"use strict";

const SIDES = ["left", "right"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "skip", Backspace: "undo" };
const POLL = 500, POLL_IDLE = 2000;
// Nobody compares two images in less: a second click of a double click must not answer the next pair.
const SOONEST = 250;

const loaded = new Map();
let shown = null;
let since = 0;
let busy = false;

// The image of a name, decoded; it is fetched once.
function load(name) {
  if (!loaded.has(name)) {
    const image = make("img");
    image.src = `/images/${name}`;
    loaded.set(name, image.decode().then(() => image));
    loaded.get(name).catch(() => loaded.delete(name));
  }
  return loaded.get(name);
}

function say(text) {
  find("message").textContent = text;
  find("message").hidden = !text;
}

async function show(state) {
  const waiting = !state.images;
  find("title").textContent = state.title ? `· ${state.title}` : "";
  find("progress").textContent = state.total ? `· ${state.done} of ${state.total}` : "";
  find("undo").disabled = !state.done;
  if (waiting) {
    shown = null;
    find("pair").hidden = true;
    find("prompt").textContent = "";
    document.title = "Compare images – draftune";
    if (state.idle) say(state.idle);
    else if (state.finished) say(`All ${state.total} pairs have answers, in ${state.file}.`);
    else say("Sampling images …");
    setTimeout(poll, state.idle || state.finished ? POLL_IDLE : POLL);
    return;
  }
  const images = await Promise.all(state.images.map(load));
  SIDES.forEach((side, i) => {
    images[i].alt = `${side} image`;
    find(side).classList.remove("chosen");
    find(side).querySelector(".picture").replaceChildren(images[i]);
  });
  find("prompt").textContent = state.prompt;
  document.title = `${state.done + 1} of ${state.total} – draftune`;
  find("pair").hidden = false;
  say("");
  shown = state.images;
  since = performance.now();
  for (const name of loaded.keys()) if (![...state.images, ...state.next].includes(name)) loaded.delete(name);
  state.next.forEach(load);
  if (!state.next.length && state.done + 1 < state.total) setTimeout(prefetch, POLL);
}

// The images of the next pair, as soon as they are sampled.
async function prefetch() {
  try {
    const state = await ask("/state");
    if (state.images && shown && state.images.join() === shown.join()) state.next.forEach(load);
  } catch { /* the next answer reports it */ }
}

async function ask(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const response = await fetch(path, options);
  if (!response.ok) throw new Error(response.statusText);
  return response.json();
}

async function poll() {
  try {
    await show(await ask("/state"));
  } catch {
    if (!find("message").textContent.startsWith("All")) say("No answer from draftune: see its terminal.");
    setTimeout(poll, POLL_IDLE);
  }
}

async function act(action) {
  if (busy || !shown || performance.now() - since < SOONEST) return;
  busy = true;
  if (SIDES.includes(action)) find(action).classList.add("chosen");
  try {
    const path = action === "undo" ? "/undo" : "/answer";
    await show(await ask(path, { images: shown, choice: action }));
  } catch (error) {
    find("pair").hidden = true;
    shown = null;
    say(`The answer was not written (${error.message}): see the terminal.`);
    setTimeout(poll, POLL_IDLE);
  } finally {
    busy = false;
  }
}

for (const action of [...SIDES, "skip", "undo"]) find(action).addEventListener("click", () => act(action));
document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key];
  // With a modifier, the arrows are the browser's own, such as Alt and left to go back.
  if (!action || event.repeat || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (action !== "undo" || !find("undo").disabled) act(action);
});
poll();
