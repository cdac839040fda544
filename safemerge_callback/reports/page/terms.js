// Losses of gradient terms, and their gradients' norms and cosines, each on an axis of its own.
const scarce = (value) => (value === null || value === undefined ? "not known" : String(Number(value.toPrecision(3))));

// Steps at which modules were merged or changed otherwise, with what was done to them.
const changedAt = new Map();
for (const module of run.modules) {
  for (const check of module.merged) {
    const step = run.steps[check];
    changedAt.set(step, (changedAt.get(step) || new Set()).add(changeOf(module, check)));
  }
}

function drawChanges(drawn) {
  // Many would hide the curves.
  const floor = drawn.height - MARGIN.bottom;
  const height = changedAt.size > 40 ? 8 : floor - MARGIN.top;
  for (const step of changedAt.keys()) {
    drawn.picture.append(svg("line", { class: "change", x1: drawn.x(step), x2: drawn.x(step), y1: floor - height, y2: floor }));
  }
}

// What was done to modules since the reading before, in words.
function tellChanges(term, index) {
  const since = index ? term.steps[index - 1] : -1;
  const steps = [...changedAt.keys()].filter((step) => step > since && step <= term.steps[index]);
  const words = steps.map((step) => `modules were ${[...changedAt.get(step)].join(", or ")} at step ${step}`);
  return words.length ? `; ${words.join("; ")}` : "";
}

function tellReading(term, index, series) {
  const [count, rows] = [term.counts[index], term.rows[index]];
  const size = `${count} step${count === 1 ? "" : "s"}${rows === null ? "" : `, ${rows} row${rows === 1 ? "" : "s"}`}`;
  const words = Object.entries(series).filter(([, values]) => values[index] !== null).map(([name, values]) => `${name} ${scarce(values[index])}`);
  return `step ${term.steps[index]} (${size}): ${words.join("; ") || "not known"}${tellChanges(term, index)}`;
}

// One chart of some series of a term, each a value or null by reading; `what` says which.
function drawTerm(box, term, series, what, height) {
  const values = Object.values(series).flat().filter((value) => value !== null);
  if (!values.length) return;
  const label = `${term.name}: ${what} over steps; arrow keys move from reading to reading`;
  const drawn = frame(box, { span: span(), ...room([...values, 0]), height, label });
  drawn.picture.append(svg("line", { class: "axis", x1: drawn.left, x2: drawn.width - MARGIN.right, y1: drawn.y(0), y2: drawn.y(0) }));
  drawChanges(drawn);
  Object.values(series).forEach((line, colour) => {
    // What a reading does not know breaks no line: a kind of rows may have no part in some.
    const points = term.steps.map((step, index) => [step, line[index]]).filter(([, value]) => value !== null);
    drawn.picture.append(svg("path", { class: `line c${colour % DASHES.length}`, "stroke-dasharray": DASHES[colour % DASHES.length], d: path(points, drawn.x, drawn.y) }));
  });
  follow(box, drawn, term.steps, (index) => tellReading(term, index, series));
  const keys = Object.keys(series).map((name, colour) => element("span", {}, swatch(colour % DASHES.length), name));
  if (changedAt.size) keys.push(element("span", {}, element("i", { class: "key change" }), `modules ${run.mark || "merged"}`));
  box.prepend(element("div", { class: "legend" }, ...keys));
}

function termCurves() {
  const home = byId("term-charts");
  if (!home) return;
  const charts = run.terms.flatMap((term) => {
    const losses = Object.fromEntries(Object.entries(term.losses).map(([name, values]) => [name === "loss" ? `${term.name}, mean loss` : `${name} rows`, values]));
    const parts = [[losses, "mean loss", 240]];
    if (term.norm) parts.push([{ [`${term.name}, norm of its gradient`]: term.norm }, "norm of its gradient", 170]);
    if (term.cosine) parts.push([{ [`${term.name}, cosine of its gradient to the task's`]: term.cosine }, "cosine of its gradient to the task's", 170]);
    return parts.map(([series, what, height]) => [element("div", { class: "chart" }), term, series, what, height]);
  });
  home.replaceChildren(...charts.map(([box]) => box));
  redrawn(home, () => charts.forEach((chart) => drawTerm(...chart)));
}
