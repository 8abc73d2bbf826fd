// Image elements: a before/after slider, and rows of images that follow a slider.

const imageOf = (data, digest, alt, name = "") => make("img", { src: data.images[digest], alt, class: name });

const caption = (prompt, text) => make("figcaption", { class: "caption" }, make("b", {}, prompt), text);

// A before/after slider: the base model's image left of the edge, the fine-tuned model's right of it.
function wipe(data, prompt, index, [before, after], state) {
  const input = make("input", {
    type: "range", id: `wipe-${index}`, min: 0, max: 100, value: state.wipes[index] ?? 50,
    "aria-label": `Before and after: ${prompt}`,
    input: () => move(),
  });
  const frame = make("div", { class: "wipe" },
    imageOf(data, before.images[index], `${prompt}, before training`),
    imageOf(data, after.images[index], `${prompt}, after update ${after.at}`, "after"),
    make("span", { class: "edge" }), input);
  function move() {
    state.wipes[index] = input.value;
    frame.style.setProperty("--at", `${input.value}%`);
    input.setAttribute("aria-valuetext", `${input.value} % before, ${100 - input.value} % after`);
  }
  move();
  const scores = [before, after].map((side) => side.scores[index]);
  return make("figure", {}, frame, caption(prompt, `before ${number(scores[0])}, after ${number(scores[1])}`));
}

// Images of the same prompts at the slider's place on an axis. `describe` returns its text and mark.
function frames(data, id, label, part, describe, start, state) {
  const { prompts, frames: all } = part, places = all.map((frame) => frame.at);
  const first = nearest(places, state.places[id] ?? start);
  const images = prompts.map((prompt) => make("img", {}));
  const captions = prompts.map((prompt) => caption(prompt, ""));
  const output = make("output", { for: id });
  const input = make("input", { type: "range", id, min: 0, max: all.length - 1, step: 1, value: first, "aria-label": label,
    input: () => { state.places[id] = places[input.value]; show(); } });
  function show() {
    const frame = all[input.value], [text, mark] = describe(frame.at);
    output.replaceChildren(text, make("span", { class: "mark" }, mark ? `, ${mark}` : ""));
    input.setAttribute("aria-valuetext", mark ? `${text}, ${mark}` : text);
    prompts.forEach((prompt, i) => {
      images[i].src = data.images[frame.images[i]];
      images[i].alt = `${prompt}, ${text}`;
      captions[i].lastChild.textContent = frame.scores.length ? number(frame.scores[i]) : "";
    });
  }
  for (const element of captions) element.append(document.createTextNode(""));
  show();
  return [
    make("div", { class: "slider" }, output, input),
    make("div", { class: "images small" }, ...images.map((image, i) => make("figure", {}, image, captions[i]))),
  ];
}
