// A line chart in SVG: x is the step, y from `low` to `top`. Redrawn when its room changes; colours are the style's.
const DASHES = ["", "8 4", "3 3", "10 3 2 3", "6 2", "2 4", "12 4", "4 2 1 2"];
const MARGIN = { left: 46, right: 14, top: 12, bottom: 34 };

// Marks between two numbers, at most so many, but two at least, which tell how far they are apart.
function ticks(low, high, most) {
  const span = high - low || 1;
  const rough = span / Math.max(1, most);
  const base = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 2.5, 5, 10].map((factor) => factor * base).find((distance) => span / distance <= most) || 10 * base;
  const found = [];
  for (let tick = Math.ceil(low / by - 1e-9) * by; tick <= high + by * 1e-6; tick += by) found.push(tick);
  return found.length < 2 && high > low ? ticks(low, high, most + 1) : found;
}

// Where an axis begins and ends that shows all of these numbers, whatever their size and sign.
function room(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const pad = (most - least) * 0.06 || Math.abs(most) * 0.06 || 1;
  return { low: least - pad, top: most + pad };
}

// Numbers of an axis, in as many digits as tell its marks, `by` apart, from each other.
function plainNumbers(low, top, by) {
  const most = Math.max(Math.abs(low), Math.abs(top));
  const whole = (places) => by * 10 ** places > 0.999 && Math.abs(by * 10 ** places - Math.round(by * 10 ** places)) < 1e-6;
  const places = [0, 1, 2, 3, 4].find(whole);
  const none = (tick) => Math.abs(tick) < by * 1e-6;
  if (most < 1e6 && places !== undefined) return (tick) => (none(tick) ? 0 : tick).toFixed(places);
  const after = clamp(Math.ceil(Math.log10(most / by)) + 1, 0, 15);
  return (tick) => none(tick) ? "0" : tick.toExponential(after).replace(/\.?0*e\+?/, "e");
}

function frame(box, options) {
  const width = Math.max(240, box.clientWidth);
  const height = options.height || (width < 560 ? 240 : 320);
  const [first, last] = options.span;
  const share = (step) => (last > first ? (step - first) / (last - first) : 0.5);
  const marks = ticks(options.low, options.top, height < 200 ? 3 : 5);
  const format = options.format || plainNumbers(options.low, options.top, marks[1] - marks[0] || 1);
  const left = Math.max(MARGIN.left, ...marks.map((tick) => 7 * format(tick).length + 14));
  const x = (step) => left + share(step) * (width - left - MARGIN.right);
  const y = (value) => height - MARGIN.bottom - ((value - options.low) / (options.top - options.low || 1)) * (height - MARGIN.top - MARGIN.bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: "0", "aria-label": options.label });
  for (const tick of marks) {
    picture.append(svg("line", { class: "grid", x1: left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  const whole = ticks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
  for (const tick of whole) {
    picture.append(svg("text", { x: x(tick), y: height - MARGIN.bottom + 18, "text-anchor": "middle" }, String(tick)));
  }
  picture.append(svg("line", { class: "axis", x1: left, x2: width - MARGIN.right, y1: y(options.low), y2: y(options.low) }));
  picture.append(svg("text", { x: width - MARGIN.right, y: height - 2, "text-anchor": "end" }, "step"));
  return { picture, x, y, left, width, height };
}

// Points as a path; null breaks the line, and one point alone is a dash. With `stairs` a value holds until the next one.
function path(points, x, y, stairs = false) {
  const known = points.filter(([, value]) => value !== null && value !== undefined);
  if (known.length === 1) return `M${(x(known[0][0]) - 10).toFixed(1)},${y(known[0][1]).toFixed(1)}h20`;
  let text = "";
  let down = false;
  for (const [step, value] of points) {
    if (value === null || value === undefined) down = false;
    else {
      const before = down && stairs ? `H${x(step).toFixed(1)}` : "";
      text += `${before}${down ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`;
      down = true;
    }
  }
  return text;
}

function area(lows, highs, x, y) {
  const known = lows.map(([step, low], index) => [step, low, highs[index][1]]).filter(([, low]) => low !== null);
  if (known.length < 2) return "";
  const forth = known.map(([step, , high]) => `${x(step).toFixed(1)},${y(high).toFixed(1)}`);
  const back = known.map(([step, low]) => `${x(step).toFixed(1)},${y(low).toFixed(1)}`).reverse();
  return `M${forth.join("L")}L${back.join("L")}Z`;
}

// A cursor over the steps, by pointer and by arrow keys; `tell(index)` says in words what is there.
function follow(box, drawn, steps, tell) {
  const line = svg("line", { class: "cursor", y1: MARGIN.top, y2: drawn.height - MARGIN.bottom, visibility: "hidden" });
  drawn.picture.append(line);
  const words = element("p", { class: "readout", role: "status", "aria-live": "polite" }, tell(steps.length - 1));
  let index = steps.length - 1;
  const go = (to) => {
    index = clamp(to, 0, steps.length - 1);
    line.setAttribute("x1", drawn.x(steps[index]));
    line.setAttribute("x2", drawn.x(steps[index]));
    line.setAttribute("visibility", "visible");
    words.textContent = tell(index);
  };
  drawn.picture.addEventListener("pointermove", (event) => {
    const left = event.clientX - drawn.picture.getBoundingClientRect().left;
    const distances = steps.map((step) => Math.abs(drawn.x(step) - left));
    go(distances.indexOf(Math.min(...distances)));
  });
  drawn.picture.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  box.replaceChildren(drawn.picture, words);
}

// A short line in a series' colour and dash.
function swatch(colour) {
  const line = svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: `c${colour}`, "stroke-width": 2.5, "stroke-dasharray": DASHES[colour] });
  return svg("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
}

// Draw now, and again when the room changes.
function redrawn(box, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(box.clientWidth - width) < 1) return;
    width = box.clientWidth;
    draw();
  }).observe(box);
}
