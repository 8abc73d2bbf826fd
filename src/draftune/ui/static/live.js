// Asks the server every two seconds for the parts of the page that change, and replaces those that did.

const PAUSE = 2000; // milliseconds
const DOUBLE = 700; // milliseconds between the two halves of a double click, at most
const poll = document.querySelector("[data-poll]").dataset.poll;
const received = {}, touched = new Set();
const AWAY = "The server does not answer: “draftune ui” may have ended. This page shows what it last said; runs go on.";
const REFUSED = "The server cannot show this any more. This page shows what it last said: load it again.";
const away = make("p", { class: "problem away", role: "status", hidden: true });

// Gives back what the user has typed or chosen; the server decides what stands in the other controls.
function restore(id, value) {
  const control = find(id);
  if (control && (control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value)))
    control.value = value;
}

// Replaces a part, and gives the focus back to the same control, or to the first one. Images that stay are not loaded again.
function replace(part, fresh) {
  const images = new Map([...part.querySelectorAll("img")].map((image) => [image.getAttribute("src"), image]));
  for (const image of fresh.querySelectorAll("img")) image.replaceWith(images.get(image.getAttribute("src")) ?? image);
  const focused = part.contains(document.activeElement) ? document.activeElement.id : null;
  const open = [...part.querySelectorAll("details[open]")].map((element) => element.id);
  const typed = [...part.querySelectorAll("input:not([type=hidden]), select")]
    .filter((input) => touched.has(input.id)).map((input) => [input.id, input.value]);
  part.replaceChildren(...fresh.childNodes);
  Object.assign(part.dataset, fresh.dataset);
  for (const id of open) if (find(id)) find(id).open = true;
  for (const [id, value] of typed) restore(id, value);
  if (focused !== null) (find(focused) ?? part.querySelector("button, a, summary") ?? find("state"))?.focus({ preventScroll: true });
}

// Shows the curves and images of a run that has just written its first data.
async function begin() {
  const answer = await fetch("data?whole");
  if (!answer.ok) return;
  find("data").textContent = await answer.text();
  document.body.append(make("script", { src: "/static/page.js" }));
}

// Says what is wrong with the server; an empty text if nothing is.
function tell(text) {
  away.hidden = !text;
  if (away.textContent !== text) away.textContent = text;
}

async function refresh() {
  const answer = await fetch(poll);
  tell(answer.ok ? "" : REFUSED);
  if (!answer.ok) return;
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = next.getElementById(part.id), html = fresh?.outerHTML;
    // Errors and what was typed before them stay until the server has something new to say.
    if (fresh && html !== (received[part.id] ?? html)) replace(part, fresh);
    received[part.id] = html;
  }
  if (find("data")?.textContent === "" && find("state").dataset.ready) await begin();
}

async function keepFresh() {
  for (;;) {
    do await new Promise((resume) => setTimeout(resume, PAUSE)); while (document.hidden);
    await refresh().catch(() => tell(AWAY));
  }
}

// Asks before something is lost. The second half of a double click does nothing, also where it meets Stop after Start.
function guard(event) {
  const form = event.target, path = form.action.replace(/stop$/, "start"), now = Date.now();
  const doubled = now - Number(sessionStorage.getItem(path)) < DOUBLE;
  if (doubled || (form.dataset.confirm && !confirm(form.dataset.confirm))) event.preventDefault();
  else {
    sessionStorage.setItem(path, now);
    // The page stays, and its focus too: a screen reader hears only this.
    if (/(export|card)$/.test(event.submitter?.getAttribute("formaction") ?? form.action)) find("announce").textContent = "The download is being prepared.";
  }
}

for (const part of document.querySelectorAll("[data-live]:not([data-typed])")) received[part.id] = part.outerHTML;
document.querySelector("header").after(away);
document.addEventListener("input", (event) => touched.add(event.target.id));
document.addEventListener("submit", guard);
document.querySelector("[data-typed] [aria-invalid]")?.focus();
keepFresh();
