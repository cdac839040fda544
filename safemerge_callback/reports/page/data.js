// The run as the page was given it, and small questions to it. Nothing here, or below, sets markup from a text.
const SCALE = 10000;
const run = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const at = (values, index) => (Array.isArray(values) ? values[index] : values);
const digits = (value, count = 4) => (value === null || value === undefined ? "–" : (value / SCALE).toFixed(count));

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const measured = (value) => value !== null && value >= 0;

function stateOf(module, check) {
  const cosine = module.cosine[check];
  if (cosine === null) return "not measured";
  return { "-1": "not finite", "-2": "nothing to measure" }[cosine] || `cosine ${digits(cosine)}`;
}

// The gate's reason: a template, the cosine in its place, and what numbers were not the same at all checks.
function reasonOf(module, check) {
  const template = run.templates[at(module.words, check)];
  if (template === undefined || module.cosine[check] === null) return "";
  const numbers = (module.numbers[check] || "").split(" ");
  return template.replace(/\{c\}|\{\}/g, (mark) => (mark === "{c}" ? digits(module.cosine[check]) : numbers.shift()));
}

function weightAfter(module, check) {
  let left = SCALE;
  module.merged.forEach((step, index) => {
    if (step <= check) left = module.left[index];
  });
  return left;
}

for (const module of run.modules) {
  module.mergedAt = new Set(module.merged);
  module.undoneAt = new Set(module.undone);
}

// What was done to a module at a check: by the merge, unless the data names who else it was.
function changeOf(module, check) {
  return (module.changes || {})[check] || "merged";
}

function tellCell(module, check) {
  const words = [`${module.name}, step ${run.steps[check]}: ${stateOf(module, check)}`];
  const none = at(module.null, check);
  if (none !== null && none !== undefined && module.cosine[check] !== null) words.push(`null ${digits(none)}`);
  const merge = module.merged.indexOf(check);
  if (merge >= 0) {
    const lost = module.lost[merge] === null ? "" : `, ${digits(module.lost[merge], 3)} of the ${(module.changes || {})[check] ? "new" : "merged"} update did not fit the rank`;
    words.push(`${changeOf(module, check)}${module.undoneAt.has(check) ? " and taken back" : ""}, ${digits(module.left[merge])} of the task's update left${lost}`);
  }
  const reason = reasonOf(module, check);
  if (reason) words.push(`gate: ${reason}`);
  return words.join("; ");
}

// Which modules are drawn in the trajectories: their indices in order of choice, each with the colour it keeps.
const MOST = 6;
const chosen = new Map();
const watchers = [];

function choose(index, wanted = !chosen.has(index)) {
  if (!wanted) chosen.delete(index);
  else if (!chosen.has(index)) {
    if (chosen.size === MOST) chosen.delete(chosen.keys().next().value);
    const taken = new Set(chosen.values());
    chosen.set(index, [0, 1, 2, 3, 4, 5].find((colour) => !taken.has(colour)));
  }
  for (const tell of watchers) tell();
}
