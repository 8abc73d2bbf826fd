// Asks the server every two seconds for the parts of the page that change, and replaces those that did.

const PAUSE = 2000; // milliseconds
const poll = document.querySelector("[data-poll]").dataset.poll;
const received = {};

// Replaces a part, and gives the focus back to the same control, or to the first one.
function replace(part, fresh) {
  const focused = part.contains(document.activeElement) ? document.activeElement.id : null;
  const open = [...part.querySelectorAll("details[open]")].map((element) => element.id);
  const typed = [...part.querySelectorAll("input:not([type=hidden]), select")].map((input) => [input.id, input.value]);
  part.replaceChildren(...fresh.childNodes);
  Object.assign(part.dataset, fresh.dataset);
  for (const id of open) if (find(id)) find(id).open = true;
  for (const [id, value] of typed) if (find(id)) find(id).value = value;
  if (focused !== null) (find(focused) ?? part.querySelector("button, a, summary"))?.focus({ preventScroll: true });
}

// Shows the curves and images of a run that has just written its first data.
async function begin() {
  const answer = await fetch("data?whole");
  if (!answer.ok) return;
  find("data").textContent = await answer.text();
  document.body.append(make("script", { src: "/static/page.js" }));
}

async function refresh() {
  const answer = await fetch(poll);
  if (!answer.ok) return;
  const next = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = next.getElementById(part.id), html = fresh?.outerHTML;
    if (fresh && html !== (received[part.id] ?? part.outerHTML)) replace(part, fresh);
    received[part.id] = html;
  }
  if (find("data")?.textContent === "" && find("state").dataset.ready) await begin();
}

async function keepFresh() {
  for (;;) {
    do await new Promise((resume) => setTimeout(resume, PAUSE)); while (document.hidden);
    await refresh().catch(() => {}); // the server may be away for a while
  }
}

keepFresh();
