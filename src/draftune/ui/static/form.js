// Conveniences of the form, which works without them: defaults of the model, facts of the reward, the picker.

const reward = find("reward"), model = find("model"), pick = find("pick");

function showFacts({ error, rewards }) {
  const missing = () => make("strong", {}, " Not on this machine: the start downloads its weights.");
  find("facts").replaceChildren(...(error ? [make("p", { class: "problem" }, error)] : rewards.map((one) =>
    make("p", { class: "help" }, make("b", {}, one.name), ` ${one.text}`, one.missing ? missing() : ""))));
}

async function ask(path, name, value) {
  const answer = await fetch(`${path}?${new URLSearchParams({ [name]: value })}`);
  return answer.json();
}

const tellReward = async () => showFacts(await ask("/reward", "expression", reward.value || reward.placeholder));

async function tellDefaults() {
  const defaults = await ask("/defaults", "model", model.value);
  for (const [name, text] of Object.entries(defaults)) {
    const option = document.querySelector(`option[data-default="${name}"]`);
    if (option) option.textContent = `default (${text})`;
    else if (find(name)) find(name).placeholder = text;
  }
  if (!reward.value) await tellReward();
}

function choose(expression) {
  reward.value = expression;
  tellReward();
}

find("picker").hidden = false;
find("use").addEventListener("click", () => choose(pick.value));
find("add").addEventListener("click", () => choose(`${reward.value || reward.placeholder} + ${pick.value}`));
reward.addEventListener("change", tellReward);
model.addEventListener("change", tellDefaults);
for (const input of document.querySelectorAll("[data-source]"))
  input.addEventListener("input", () => (find(input.dataset.source).checked = true));
find("errors")?.focus();
