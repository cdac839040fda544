// The heat map: a canvas a panel, one module a row, one check a column, one cell under the cursor.
const STOPS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"].map((hex) =>
  [0, 2, 4].map((start) => parseInt(hex.slice(start, start + 2), 16)),
);
const everyCosine = run.modules.flatMap((module) => module.cosine.filter(measured));
const marks = run.threshold === null ? [] : [run.threshold];
const highest = [...everyCosine, ...marks].reduce((most, cosine) => Math.max(most, cosine), 0);
const top = Math.ceil((highest || SCALE) / 500) * 500;
// From a twentieth below the lowest: what differs must look different, wherever the cosines of this run lie.
const bottom = Math.min(top - 500, Math.floor([...everyCosine, ...marks].reduce((least, cosine) => Math.min(least, cosine), top) / 500) * 500);
const placeOf = (cosine) => clamp((cosine - bottom) / (top - bottom), 0, 1);

function colourOf(cosine) {
  const place = placeOf(cosine) * (STOPS.length - 1);
  const lower = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = STOPS[lower].map((channel, index) => Math.round(channel + (STOPS[lower + 1][index] - channel) * (place - lower)));
  return `rgb(${mix.join(" ")})`;
}

// The style's colours, read once a drawing: asked for at every cell they would take longer than the cells.
let theme = null;

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  theme = Object.fromEntries(["card", "ink", "muted", "alarm", "still"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// A context in which one unit is one pixel of the page, however many of the screen's that are.
function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "11px system-ui, sans-serif";
  return context;
}

function drawScale() {
  const canvas = element("canvas", { role: "img", "aria-label": `colour scale: cosine ${digits(bottom, 2)}, dark, to ${digits(top, 2)}, bright` });
  const keys = [["merged", run.mark || "merged"], ["undone", run.mark ? "taken back" : "merge taken back"], ["still", "nothing to measure"], ["broken", "not finite"]];
  const seen = {
    merged: run.modules.some((module) => module.merged.length),
    undone: run.modules.some((module) => module.undone.length),
    still: run.modules.some((module) => module.cosine.includes(-2)),
    broken: run.modules.some((module) => module.cosine.includes(-1)),
  };
  const shown = keys.filter(([key]) => seen[key]).map(([key, words]) => element("span", {}, element("i", { class: `key ${key}` }), words));
  if (run.threshold !== null) shown.unshift(element("span", {}, element("i", { class: "key gate" }), `threshold ${run.threshold / SCALE}`));
  byId("scale").replaceChildren(element("span", {}, "cosine", canvas), ...shown);
  const context = sharp(canvas, 192, 30);
  for (let x = 0; x < 192; x += 1) {
    context.fillStyle = colourOf(bottom + (x / 191) * (top - bottom));
    context.fillRect(x, 2, 1, 11);
  }
  context.fillStyle = theme.muted;
  context.fillText(digits(bottom, 2), 0, 26);
  context.textAlign = "right";
  context.fillText(digits(top, 2), 192, 26);
  if (run.threshold === null) return;
  context.fillStyle = theme.alarm;
  context.fillRect(placeOf(run.threshold) * 192 - 1, 0, 2, 15);
}

function hatch(context, x, y, width, height) {
  context.fillStyle = theme.card;
  context.fillRect(x, y, width, height);
  context.fillStyle = theme.alarm;
  for (let across = 0; across < width; across += 3) context.fillRect(x + across, y, Math.min(1.6, width - across), height);
}

function drawMark(context, x, y, width, height, undone) {
  const size = Math.min(width, height);
  if (size < 5) {
    context.fillStyle = undone ? "#ffb000" : "#ffffff";
    context.fillRect(x + width * 0.15, y + height * 0.36, Math.max(0.7, width * 0.7), Math.max(1, height * 0.28));
    return;
  }
  context.beginPath();
  context.arc(x + width / 2, y + height / 2, clamp(size * 0.28, 1.6, 4), 0, 7);
  context.fillStyle = undone ? "#ffb000" : "#ffffff";
  context.fill();
  context.lineWidth = 1.2;
  context.strokeStyle = "#1d2329";
  context.stroke();
}

class Panel {
  constructor(title, members) {
    this.members = members;
    this.cursor = null;
    this.outside = members.every((index) => run.modules[index].label === run.modules[index].name);
    const nulls = members.map((index) => at(run.modules[index].null, 0)).filter((value) => value !== null && value !== undefined);
    const middle = nulls.sort((a, b) => a - b)[Math.floor(nulls.length / 2)];
    const about = middle === undefined ? "" : `null ${digits(middle, 2)}`;
    const label = `${title}: ${members.length} modules, ${run.steps.length} checks. Arrow keys move, Enter chooses the module.`;
    this.canvas = element("canvas", { tabindex: "0", role: "application", "aria-label": label, "aria-describedby": "heat-readout" });
    this.box = element("figure", { class: this.outside ? "panel wide" : "panel" }, element("figcaption", {}, title, element("span", {}, about)), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("click", (event) => this.point(event) && choose(this.members[this.cursor[0]]));
    this.canvas.addEventListener("pointerleave", () => document.activeElement === this.canvas || this.leave());
    this.canvas.addEventListener("blur", () => this.leave());
    this.canvas.addEventListener("focus", () => this.canvas.matches(":focus-visible") && this.go(...(this.cursor || [0, run.steps.length - 1])));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  measure() {
    const longest = Math.max(...this.members.map((index) => run.modules[index].label.length));
    this.left = clamp(longest * 6.5 + 8, 24, 150);
    this.width = Math.max(120, this.box.clientWidth) - this.left - 1;
    this.row = clamp(Math.floor(300 / this.members.length), 6, 15);
    this.column = this.width / run.steps.length;
  }

  draw() {
    this.measure();
    const height = this.row * this.members.length;
    const context = sharp(this.canvas, this.left + this.width + 1, height + 20);
    this.members.forEach((index, row) => this.drawRow(context, run.modules[index], row));
    context.fillStyle = theme.muted;
    context.textAlign = "right";
    const every = Math.ceil(12 / this.row);
    this.members.forEach((index, row) => row % every || context.fillText(run.modules[index].label, this.left - 6, (row + 0.5) * this.row + 4, this.left - 6));
    this.drawSteps(context, height);
    if (this.cursor) this.drawCursor(context);
  }

  drawRow(context, module, row) {
    const gap = this.column >= 5 ? 0.6 : 0;
    module.cosine.forEach((cosine, check) => {
      if (cosine === null) return;
      const box = [this.left + check * this.column, row * this.row, this.column - gap, this.row - 0.6];
      if (cosine === -1) hatch(context, ...box);
      else {
        context.fillStyle = cosine === -2 ? theme.still : colourOf(cosine);
        context.fillRect(box[0], box[1], gap ? box[2] : box[2] + 0.35, box[3]);
      }
    });
    for (const check of module.merged) drawMark(context, this.left + check * this.column, row * this.row, this.column - gap, this.row - 0.6, module.undoneAt.has(check));
  }

  drawSteps(context, height) {
    const most = Math.max(2, Math.floor(this.width / 55));
    const by = [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 10000].find((count) => run.steps.length / count <= most) || run.steps.length;
    context.textAlign = "center";
    for (let check = 0; check < run.steps.length; check += by) {
      const x = this.left + (check + 0.5) * this.column;
      const text = String(run.steps[check]);
      const half = context.measureText(text).width / 2;
      context.fillText(text, clamp(x, half, this.left + this.width - half), height + 14);
    }
  }

  drawCursor(context) {
    const [row, check] = this.cursor;
    context.lineWidth = 3;
    context.strokeStyle = theme.card;
    const box = [this.left + check * this.column - 1, row * this.row - 1, this.column + 2, this.row + 1];
    context.strokeRect(...box);
    context.lineWidth = 1.6;
    context.strokeStyle = theme.ink;
    context.strokeRect(...box);
  }

  go(row, check) {
    this.cursor = [clamp(row, 0, this.members.length - 1), clamp(check, 0, run.steps.length - 1)];
    byId("heat-readout").textContent = tellCell(run.modules[this.members[this.cursor[0]]], this.cursor[1]);
    this.draw();
    return true;
  }

  leave() {
    this.cursor = null;
    this.draw();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - this.left, event.clientY - box.top];
    if (x < 0 || y < 0 || y >= this.row * this.members.length) return false;
    const spot = [Math.floor(y / this.row), clamp(Math.floor(x / this.column), 0, run.steps.length - 1)];
    if (this.cursor && this.cursor[0] === spot[0] && this.cursor[1] === spot[1]) return true;
    return this.go(...spot);
  }

  key(event) {
    const [row, check] = this.cursor || [0, run.steps.length - 1];
    const moves = { ArrowUp: [row - 1, check], ArrowDown: [row + 1, check], ArrowLeft: [row, check - 1], ArrowRight: [row, check + 1], Home: [row, 0], End: [row, run.steps.length - 1] };
    if (moves[event.key]) this.go(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") choose(this.members[row]);
    else return;
    event.preventDefault();
  }
}

function heatMap() {
  const parts = run.panels.map((title, part) => new Panel(title, run.modules.map((_, index) => index).filter((index) => run.modules[index].panel === part)));
  byId("heat").replaceChildren(...parts.map((panel) => panel.box));
  const draw = () => {
    readTheme();
    drawScale();
    for (const panel of parts) panel.draw();
  };
  redrawn(byId("heat"), draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
