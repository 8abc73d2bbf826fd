// Conveniences of the form, which works without them: defaults, facts of the reward, the picker, the run's name.

const reward = find("reward"), pick = find("pick");
const DECIDING = ["model", "base_pipeline", "revision", "variant", "num_inference_steps", "method"].map(find); // defaults depend on them

function facts({ error, rewards, todo }) {
  const missing = () => make("strong", {}, ` Not on this machine: ${todo}`);
  const known = rewards.map((one) =>
    make("p", { class: "help" }, make("b", {}, one.name), ` ${one.text}`, one.missing ? missing() : ""));
  return error ? [...known, make("p", { class: "problem" }, error)] : known;
}

async function ask(path, values) {
  const answer = await fetch(`${path}?${new URLSearchParams(values)}`);
  return answer.json();
}

async function tellReward(into, expression) {
  const answer = expression ? await ask("/reward", { expression }) : { rewards: [] };
  into.replaceChildren(...facts(answer));
}

const tellChosen = () => tellReward(find("facts"), reward.value || reward.placeholder);

async function tellDefaults() {
  const defaults = await ask("/defaults", DECIDING.map((input) => [input.name, input.value]));
  for (const [name, text] of Object.entries(defaults)) {
    const option = document.querySelector(`option[data-default="${name}"]`);
    if (option) option.textContent = `default (${text})`;
    else if (find(name)) find(name).placeholder = text;
  }
  if (!reward.value) await tellChosen();
}

function choose(expression) {
  reward.value = expression;
  tellChosen();
}

// Adds the picked reward, unless the expression has it.
function add() {
  const expression = reward.value || reward.placeholder;
  if (!expression.match(/[\w.]+/g)?.includes(pick.value)) choose(`${expression} + ${pick.value}`);
}

function tellPicked() {
  find("use").disabled = find("add").disabled = !pick.value;
  tellReward(find("picked"), pick.value);
}

find("picker").hidden = false;
find("use").addEventListener("click", () => choose(pick.value));
find("add").addEventListener("click", add);
pick.addEventListener("change", tellPicked);
tellPicked();
reward.addEventListener("change", tellChosen);
for (const input of DECIDING) input.addEventListener("change", tellDefaults);
for (const input of document.querySelectorAll("[data-source]"))
  input.addEventListener("input", () => (find(input.dataset.source).checked = true));
find("fill").addEventListener("submit", () => (find("fill").elements.name.value = find("name").value));
find("errors")?.focus();
