// Pictures: two of them with an edge between, and rows of them along a slider.

const picture = (data, digest, alt, name = "") => make("img", { src: data.pictures[digest], alt, class: name });

const caption = (prompt, text) => make("figcaption", { class: "caption" }, make("b", {}, prompt), text);

// The base model's picture left of the edge and the tuned one's right of it.
function wipe(data, prompt, index, [before, after], state) {
  const input = make("input", {
    type: "range", id: `wipe-${index}`, min: 0, max: 100, value: state.wipes[index] ?? 50,
    "aria-label": `Before and after: ${prompt}`,
    input: () => move(),
  });
  const frame = make("div", { class: "wipe" },
    picture(data, before.pictures[index], `${prompt}, before training`),
    picture(data, after.pictures[index], `${prompt}, after update ${after.at}`, "after"),
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

// The same prompts along an axis: the slider says where, `said` says it in words.
function frames(data, id, label, part, said, start, state) {
  const { prompts, frames: all } = part, places = all.map((frame) => frame.at);
  const first = nearest(places, state.places[id] ?? start);
  const pictures = prompts.map((prompt) => make("img", {}));
  const captions = prompts.map((prompt) => caption(prompt, ""));
  const output = make("output", { for: id });
  const input = make("input", { type: "range", id, min: 0, max: all.length - 1, step: 1, value: first, "aria-label": label,
    input: () => { state.places[id] = places[input.value]; show(); } });
  function show() {
    const frame = all[input.value], [text, mark] = said(frame.at);
    output.replaceChildren(text, make("span", { class: "mark" }, mark ? `, ${mark}` : ""));
    input.setAttribute("aria-valuetext", mark ? `${text}, ${mark}` : text);
    prompts.forEach((prompt, i) => {
      pictures[i].src = data.pictures[frame.pictures[i]];
      pictures[i].alt = `${prompt}, ${text}`;
      captions[i].lastChild.textContent = frame.scores.length ? number(frame.scores[i]) : "";
    });
  }
  for (const element of captions) element.append(document.createTextNode(""));
  show();
  return [
    make("div", { class: "slider" }, output, input),
    make("div", { class: "pictures small" }, ...pictures.map((image, i) => make("figure", {}, image, captions[i]))),
  ];
}
