// Trajectories of cosines, of what is left of the task's update, and of the probe's figures.
const everyStep = [...run.steps, ...(run.terms || []).flatMap((term) => term.steps), ...run.probes.map((probe) => probe.step)].sort((a, b) => a - b);
const span = () => [everyStep[0], everyStep[everyStep.length - 1]];

// Lowest, middle and highest of all modules at every check.
function spread(valueOf) {
  return run.steps.map((step, check) => {
    const values = run.modules.map((module) => valueOf(module, check)).filter((value) => value !== null).sort((a, b) => a - b);
    if (!values.length) return [step, null, null, null];
    return [step, values[0], values[Math.floor(values.length / 2)], values[values.length - 1]];
  });
}

function backdrop(drawn, all) {
  const lows = all.map(([step, low]) => [step, low]);
  const highs = all.map(([step, , , high]) => [step, high]);
  drawn.picture.append(svg("path", { class: "band", d: area(lows, highs, drawn.x, drawn.y) }));
  drawn.picture.append(svg("path", { class: "median", d: path(all.map(([step, , middle]) => [step, middle]), drawn.x, drawn.y) }));
}

const cosineAt = (module, check) => (measured(module.cosine[check]) ? module.cosine[check] : null);
const allCosines = spread(cosineAt);

// A dashed line across, and what it is.
function limitLine(drawn, value) {
  const height = drawn.y(value);
  drawn.picture.append(svg("line", { class: "gate", x1: drawn.left, x2: drawn.width - MARGIN.right, y1: height, y2: height }));
}

function limitLabel(drawn, value, words) {
  drawn.picture.append(svg("text", { class: "gate-label halo", x: drawn.left + 6, y: drawn.y(value) - 5 }, words));
}

function drawMoved() {
  const box = byId("moved-chart");
  if (!box) return;
  const { edge, means } = run.moved;
  const known = means.filter((mean) => mean !== null);
  const label = "How far the updates go along the alignment, mean over the modules, over steps; arrow keys move from check to check";
  const drawn = frame(box, { span: span(), ...room([...known, edge, 0]), height: 220, label });
  drawn.picture.append(svg("line", { class: "axis", x1: drawn.left, x2: drawn.width - MARGIN.right, y1: drawn.y(0), y2: drawn.y(0) }));
  limitLine(drawn, edge);
  drawn.picture.append(svg("path", { class: "line c0", d: path(run.steps.map((step, check) => [step, means[check]]), drawn.x, drawn.y) }));
  const changes = new Map();
  for (const module of run.modules) {
    for (const check of module.merged) changes.set(check, (changes.get(check) || new Set()).add(changeOf(module, check)));
  }
  for (const check of changes.keys()) {
    if (means[check] !== null) drawn.picture.append(svg("circle", { class: "ring c0", cx: drawn.x(run.steps[check]), cy: drawn.y(means[check]), r: run.steps.length > 80 ? 2.4 : 3.6 }));
  }
  limitLabel(drawn, edge, `edge ${edge}`);
  follow(box, drawn, run.steps, (check) => {
    const mean = means[check];
    const told = mean === null ? "not known" : `${mean.toFixed(2)}, ${mean < edge ? "below" : "not below"} ${edge}`;
    return `step ${run.steps[check]}: moved ${told}${changes.has(check) ? `; modules were ${[...changes.get(check)].join(", or ")} at this check` : ""}`;
  });
}

function drawModule(drawn, module, colour) {
  const look = { class: `line c${colour}`, "stroke-dasharray": DASHES[colour] };
  const values = run.steps.map((step, check) => [step, cosineAt(module, check)]);
  const nulls = run.steps.map((step, check) => [step, at(module.null, check)]);
  drawn.picture.append(svg("path", { class: `null c${colour}`, d: path(nulls, drawn.x, drawn.y) }));
  if (run.threshold === null && module.limit !== null) {
    const limits = run.steps.map((step, check) => [step, at(module.limit, check)]);
    drawn.picture.append(svg("path", { class: `gate c${colour}`, fill: "none", d: path(limits, drawn.x, drawn.y) }));
  }
  drawn.picture.append(svg("path", { ...look, d: path(values, drawn.x, drawn.y) }));
  for (const check of module.merged) {
    if (cosineAt(module, check) === null) continue;
    const spot = [drawn.x(run.steps[check]), drawn.y(module.cosine[check])];
    if (module.undoneAt.has(check)) drawn.picture.append(svg("path", { class: `c${colour}`, "stroke-width": 2, d: `M${spot[0] - 4},${spot[1] - 4}l8,8m0,-8l-8,8` }));
    else drawn.picture.append(svg("circle", { class: `ring c${colour}`, cx: spot[0], cy: spot[1], r: run.steps.length > 80 ? 2.4 : 3.6 }));
  }
}

function drawCurves() {
  const box = byId("curve-chart");
  if (!box) return;
  const nulls = [...chosen.keys()].flatMap((index) => run.modules[index].null).filter((value) => value !== null);
  const high = Math.max(top, ...nulls);
  const label = `Cosines of ${chosen.size} chosen modules over steps; arrow keys move from check to check`;
  const drawn = frame(box, { span: span(), low: 0, top: high, label, format: (tick) => (tick / SCALE).toFixed(2) });
  backdrop(drawn, allCosines);
  if (run.threshold !== null) limitLine(drawn, run.threshold);
  for (const [index, colour] of chosen) drawModule(drawn, run.modules[index], colour);
  if (run.threshold !== null) limitLabel(drawn, run.threshold, `threshold ${run.threshold / SCALE}`);
  follow(box, drawn, run.steps, (check) => {
    const [step, low, middle, most] = allCosines[check];
    const own = [...chosen.keys()].map((index) => `${run.modules[index].name} ${digits(cosineAt(run.modules[index], check))}`);
    return `step ${step}: all modules ${digits(low)} to ${digits(most)}, median ${digits(middle)}${own.length ? "; " : ""}${own.join(", ")}`;
  });
}

function drawChips() {
  const chips = [...chosen].map(([index, colour]) => {
    const { name } = run.modules[index];
    const button = element("button", { type: "button", "aria-label": `Hide ${name}` }, swatch(colour), name, element("span", { "aria-hidden": "true" }, "×"));
    button.addEventListener("click", () => choose(index, false));
    return element("li", {}, button);
  });
  byId("chosen").replaceChildren(...(chips.length ? chips : [element("li", { class: "muted" }, "No module is chosen.")]));
}

function drawWeights() {
  const box = byId("weight-chart");
  if (!box) return;
  // All of the update is there before the first merge.
  const all = [[span()[0], SCALE, SCALE, SCALE], ...spread(weightAfter)];
  const high = Math.max(SCALE, ...all.map(([, , , most]) => most));
  const label = "Share of the task's update left, over steps; arrow keys move from check to check";
  const drawn = frame(box, { span: span(), low: 0, top: high, label, height: 220, format: (tick) => `${(100 * tick) / SCALE} %` });
  // A share holds until the next merge.
  backdrop(drawn, all.flatMap((row, index) => (index ? [[row[0], ...all[index - 1].slice(1)], row] : [row])));
  for (const [index, colour] of chosen) {
    const values = run.steps.map((step, check) => [step, weightAfter(run.modules[index], check)]);
    values.unshift([span()[0], SCALE]);
    drawn.picture.append(svg("path", { class: `line c${colour}`, "stroke-dasharray": DASHES[colour], d: path(values, drawn.x, drawn.y, true) }));
  }
  follow(box, drawn, run.steps, (check) => {
    const [step, low, middle, most] = all[check + 1];
    return `after step ${step}: ${digits(low)} to ${digits(most)} of the task's update left, median ${digits(middle)}`;
  });
}

const KIND_WORDS = { harm: "harm, higher is safer", over_refusal: "over-refusal, lower is better", task: "task", coherence: "coherence" };
const plainWords = (measure) => measure.replaceAll("_", " ");

// Every measure's points over the probes, one after the other; `place` keeps before and after apart.
function probeSeries(wanted) {
  const found = new Map();
  run.probes.forEach((probe, place) => {
    for (const figure of probe.measures) {
      if (!wanted(figure) || figure.value === null) continue;
      if (!found.has(figure.measure)) found.set(figure.measure, { name: figure.measure, kind: figure.kind, unit: figure.unit, points: [] });
      found.get(figure.measure).points.push({ ...figure, step: probe.step, when: probe.when, place });
    }
  });
  return [...found.values()];
}

function drawInterval(drawn, point, x, colour) {
  if (point.low === null || point.high === null) return;
  drawn.picture.append(svg("line", { class: `c${colour}`, "stroke-width": 1.2, opacity: 0.75, x1: x, x2: x, y1: drawn.y(point.low), y2: drawn.y(point.high) }));
  for (const end of [point.low, point.high]) {
    drawn.picture.append(svg("line", { class: `c${colour}`, "stroke-width": 1.2, opacity: 0.75, x1: x - 2.5, x2: x + 2.5, y1: drawn.y(end), y2: drawn.y(end) }));
  }
}

function drawSeries(drawn, one, colour, apart) {
  const x = (point) => drawn.x(point.step) + apart + ({ before: -3, after: 3 }[point.when] || 0);
  const line = one.points.map((point) => [x(point), point.value]);
  for (const point of one.points) drawInterval(drawn, point, x(point), colour);
  drawn.picture.append(svg("path", { class: `line c${colour}`, "stroke-dasharray": DASHES[colour], d: path(line, (place) => place, drawn.y) }));
  for (const point of one.points) drawn.picture.append(svg("circle", { class: `ring c${colour}`, cx: x(point), cy: drawn.y(point.value), r: 3.2 }));
}

function tellProbe(place, series) {
  const probe = run.probes[place];
  const figures = series.map((one) => one.points.find((point) => point.place === place)).filter(Boolean);
  const words = figures.map((point) => `${plainWords(point.measure)} ${point.text}`);
  return `step ${probe.step}, ${probe.when}: ${words.join("; ")}`;
}

function drawProbe(box, wanted, look) {
  const series = probeSeries(wanted);
  if (!series.length) return;
  const values = series.flatMap((one) => one.points.flatMap((point) => [point.value, point.low, point.high])).filter((value) => value !== null);
  const drawn = frame(box, { span: span(), ...look(values), label: `${series.map((one) => plainWords(one.name)).join(", ")} over steps; arrow keys move from probe to probe` });
  series.forEach((one, index) => drawSeries(drawn, one, index % DASHES.length, 2 * (index - (series.length - 1) / 2)));
  follow(box, drawn, run.probes.map((probe) => probe.step), (place) => tellProbe(place, series));
  const keys = series.map((one, index) => element("span", {}, swatch(index % DASHES.length), `${plainWords(one.name)} (${KIND_WORDS[one.kind] || one.kind})${one.unit === "share" || !one.unit ? "" : `, ${one.unit}`}`));
  box.prepend(element("div", { class: "legend" }, ...keys));
}

function curves() {
  const lowest = run.modules.map((module, index) => [index, Math.min(...module.cosine.slice(-1).filter(measured))]);
  for (const [index] of lowest.sort((a, b) => a[1] - b[1]).slice(0, Math.min(3, run.modules.length)).reverse()) choose(index, true);
  const draw = () => {
    drawChips();
    drawMoved();
    drawCurves();
    drawWeights();
  };
  watchers.push(draw);
  // A run of changes alone has no cosines to draw.
  redrawn(byId("curve-chart") || byId("weight-chart"), draw);
}

function probeCurves() {
  if (!byId("probe-chart")) return;
  // Shares together; every other measure has an axis of its own, which holds whatever was measured.
  const others = new Set(run.probes.flatMap((probe) => probe.measures.filter((figure) => figure.unit !== "share").map((figure) => figure.measure)));
  const charts = [...others].map((name) => [name, element("div", { class: "chart" })]);
  byId("own-charts").replaceChildren(...charts.map(([, box]) => box));
  redrawn(byId("probe-chart"), () => {
    drawProbe(byId("probe-chart"), (figure) => figure.unit === "share", () => ({ low: 0, top: 1, format: (tick) => `${Math.round(100 * tick)} %` }));
    for (const [name, box] of charts) drawProbe(box, (figure) => figure.measure === name, (values) => ({ ...room(values), height: 180 }));
  });
}
