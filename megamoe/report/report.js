"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const box = data.box, axes = data.axes;
const ends = data.ends;  // axis -> where its longest run ends
let axis = data.axis;
const allAxes = ["steps", "tokens", "hours"];
const svgName = "http://www.w3.org/2000/svg";
document.documentElement.classList.add("js");

const places = line => data.runs[line.run][line.table][axis] || [];
const xOf = value => box.left + (box.right - box.left) * value / ends[axis];
const yOf = (value, [low, high, log]) => {
  const share = log ? (value > 0 ? (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low)) : -1) : (value - low) / (high - low);
  return box.bottom - (box.bottom - box.top) * Math.min(Math.max(share, -3), 4);
};
const point = (x, y) => x.toFixed(1) + " " + y.toFixed(1);
const known = value => value !== null && value !== undefined;

function linePath(xs, ys, scale, dots) {
  let path = "", down = false;
  ys.forEach((y, i) => {
    if (!known(xs[i]) || !known(y)) { down = false; return; }
    path += (down && !dots ? "L" : "M") + point(xOf(xs[i]), yOf(y, scale)) + (dots ? "h0" : "");
    down = true;
  });
  return path;
}

function areaPath(xs, low, high, scale) {
  const there = [], back = [];
  xs.forEach((x, i) => {
    if (!known(x) || !known(low[i]) || !known(high[i])) return;
    there.push(point(xOf(x), yOf(high[i], scale)));
    back.unshift(point(xOf(x), yOf(low[i], scale)));
  });
  return there.length ? "M" + there.concat(back).join("L") + "Z" : "";
}

const units = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]];
function short(value) {
  for (const [limit, unit] of units)
    if (Math.abs(value) >= limit * 0.99995) return +(value / (unit === "k" ? 1e3 : limit)).toPrecision(4) + unit;
  return value === 0 || Math.abs(value) >= 1e-3 ? String(+value.toPrecision(4)) : value.toExponential(2);
}

function told(value, kind) {
  if (kind === "percent") return (100 * value).toPrecision(4) + " %";
  if (kind === "bytes") return value >= 2 ** 30 / 10 ? (value / 2 ** 30).toFixed(2) + " GiB" : (value / 2 ** 20).toFixed(1) + " MiB";
  if (kind === "seconds") return value >= 0.1 ? +value.toPrecision(4) + " s" : +(1000 * value).toPrecision(3) + " ms";
  if (kind === "flops") return short(value).replace("B", "G");
  return Math.abs(value) >= 1e4 ? short(value) : String(+value.toPrecision(5));
}

function ticks() {
  let step = 10 ** Math.floor(Math.log10(ends[axis] / 7));
  step *= [1, 2, 5, 10].find(factor => ends[axis] / (factor * step) <= 7);
  const found = [];
  for (let number = 0; number * step <= ends[axis] * (1 + 1e-9); number++) found.push(+(number * step).toPrecision(12));
  return found;
}

function element(parent, name, attributes, text) {
  const made = document.createElementNS(svgName, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
}

function drawTicks(group) {
  group.replaceChildren();
  for (const value of ticks()) {
    const x = xOf(value).toFixed(1);
    element(group, "path", {d: `M${x} ${box.bottom}v4`});
    element(group, "text", {x, y: box.bottom + 16, "text-anchor": "middle"}, short(value));
  }
}

const figures = [...document.querySelectorAll("figure[data-chart]")].map(figure => ({
  figure, svg: figure.querySelector("svg[role=img]"), chart: data.charts[figure.dataset.chart],
}));

function redraw() {
  for (const {svg, chart} of figures) {
    drawTicks(svg.querySelector(".x"));
    svg.querySelector(".xname").textContent = data.names[axis];
    for (const group of svg.querySelectorAll("g[data-line]")) {
      const line = chart.lines[+group.dataset.line], xs = places(line);
      const set = (name, path) => { const found = group.querySelector(name); if (found) found.setAttribute("d", path); };
      if (line.low) for (const name of [".area", ".range"]) set(name, areaPath(xs, line.low, line.high, chart.y));
      set(".line", linePath(xs, line.y, chart.y, false));
      set(".dot", linePath(xs, line.y, chart.y, true));
    }
  }
  document.querySelectorAll("#marks path").forEach((path, i) => {
    const at = data.marks[i][3 + allAxes.indexOf(axis)];
    if (known(at)) path.setAttribute("transform", `translate(${xOf(at).toFixed(1)} 0)`);
  });
}

for (const input of document.querySelectorAll("input[name=axis]"))
  input.addEventListener("change", () => { axis = input.value; redraw(); });
const marksInput = document.getElementById("show-marks");
if (marksInput) marksInput.addEventListener("change", () => document.body.classList.toggle("no-marks", !marksInput.checked));

// What is hidden: runs as a whole, and single lines.
const hiddenRuns = new Set();
function show() {
  for (const {figure, svg, chart} of figures)
    for (const group of svg.querySelectorAll("g[data-line]")) {
      const line = chart.lines[+group.dataset.line];
      const button = figure.querySelector(`button[data-metric="${line.metric}"]`);
      const off = hiddenRuns.has(line.run) || (button && button.getAttribute("aria-pressed") === "false");
      group.classList.toggle("off", off);
    }
  for (const path of document.querySelectorAll("#marks path")) path.classList.toggle("off", hiddenRuns.has(+path.dataset.run));
}
for (const button of document.querySelectorAll(".legend button, .runs button"))
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(on));
    if (button.dataset.run !== undefined) hiddenRuns[on ? "delete" : "add"](+button.dataset.run);
    show();
  });

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

function row(colour, label, value) {
  const made = document.createElement("div");
  if (colour) { const swatch = document.createElement("i"); swatch.className = colour; made.append(swatch); }
  const name = document.createElement("span"), number = document.createElement("b");
  name.textContent = label;
  number.textContent = value;
  made.append(name, number);
  return made;
}

function placeTip(x, y) {
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, x + 16 + width > innerWidth ? x - width - 16 : x + 16) + "px";
  tip.style.top = Math.max(4, Math.min(y + 12, innerHeight - height - 4)) + "px";
}

function nearest(xs, ys, x) {
  let best = -1, distance = Infinity;
  for (let i = 0; i < xs.length; i++) {
    if (!known(xs[i]) || !known(ys[i])) continue;
    const away = Math.abs(xs[i] - x);
    if (away < distance) { distance = away; best = i; }
  }
  return best;
}

function tell({svg, chart}, x, clientX, clientY) {
  const rows = [];
  let at = null;
  chart.lines.forEach((line, index) => {
    const group = svg.querySelector(`g[data-line="${index}"]`);
    if (group.classList.contains("off")) return;
    const xs = places(line), i = nearest(xs, line.y, x);
    if (i < 0 || Math.abs(xOf(xs[i]) - xOf(x)) > 60) return;
    if (at === null || Math.abs(xs[i] - x) < Math.abs(at - x)) at = xs[i];
    let value = told(line.area ? line.y[i] - line.low[i] : line.y[i], chart.kind);
    if (line.low && !line.area && line.low[i] !== line.high[i])
      value += ` (${told(line.low[i], chart.kind)} to ${told(line.high[i], chart.kind)})`;
    rows.push(row(group.classList[1], line.label, value));
  });
  const cursor = svg.querySelector(".cursor");
  if (at === null) { tip.hidden = true; cursor.setAttribute("hidden", ""); return; }
  const events = document.body.classList.contains("no-marks") ? [] : data.marks.filter(mark => {
    const place = mark[3 + allAxes.indexOf(axis)];
    return !hiddenRuns.has(mark[0]) && known(place) && Math.abs(xOf(place) - xOf(x)) < 5;
  }).slice(0, 4).map(mark => row("", "▪ " + mark[2], ""));
  const where = axis === "hours" ? (+at.toPrecision(4)) + " h" : axis === "steps" ? Math.round(at).toLocaleString("en") : short(at);
  tip.replaceChildren(row("", axis === "hours" ? "after" : axis === "steps" ? "step" : "tokens", where), ...rows, ...events);
  const px = xOf(at).toFixed(1);
  for (const [key, value] of [["x1", px], ["x2", px], ["y1", box.top], ["y2", box.bottom]]) cursor.setAttribute(key, value);
  cursor.removeAttribute("hidden");
  placeTip(clientX, clientY);
}

for (const each of figures) {
  const {svg} = each;
  let at = null;
  const leave = () => { tip.hidden = true; svg.querySelector(".cursor").setAttribute("hidden", ""); };
  svg.addEventListener("pointermove", event => {
    const area = svg.getBoundingClientRect();
    const inside = (event.clientX - area.left) / area.width * box.width;
    at = Math.min(Math.max((inside - box.left) / (box.right - box.left), 0), 1) * ends[axis];
    tell(each, at, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by) return;
    event.preventDefault();
    at = Math.min(Math.max((at === null ? ends[axis] / 2 : at) + by * ends[axis] / 100, 0), ends[axis]);
    const area = svg.getBoundingClientRect();
    tell(each, at, area.left + xOf(at) / box.width * area.width, area.top + area.height / 4);
  });
}

// Heat maps: the colour of a cell says its value, as the legend does.
const name = (words, index) => {
  if (words.includes("{}")) return words.replace("{}", index);
  const [what, numbers] = words.split(" ");
  return what + " " + (+numbers.split(",")[index]).toLocaleString("en");
};
for (const image of document.querySelectorAll("img.heat")) {
  let pixels = null;
  image.addEventListener("pointermove", event => {
    const area = image.getBoundingClientRect(), {naturalWidth: width, naturalHeight: height} = image;
    const column = Math.min(width - 1, Math.max(0, Math.floor((event.clientX - area.left - 1) / (area.width - 2) * width)));
    const line = Math.min(height - 1, Math.max(0, Math.floor((event.clientY - area.top - 1) / (area.height - 2) * height)));
    if (pixels === null) {
      const canvas = document.createElement("canvas");
      canvas.width = width;
      canvas.height = height;
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      pixels = context.getImageData(0, 0, width, height).data;
    }
    const [red, green, blue, opacity] = pixels.slice(4 * (line * width + column), 4 * (line * width + column) + 4);
    const doublings = opacity / 255 * data.heat * (blue > red ? -1 : 1);
    let load = "no tokens";
    if (opacity === 0 || Math.max(red, green, blue) - Math.min(red, green, blue) > 20) {
      const edge = opacity === 255 ? (doublings < 0 ? "≤ " : "≥ ") : "";
      load = edge + (2 ** doublings).toFixed(2) + " × mean";
    }
    tip.replaceChildren(row("", name(image.dataset.rows, line) + ", " + name(image.dataset.columns, column), load));
    placeTip(event.clientX, event.clientY);
  });
  image.addEventListener("pointerleave", () => { tip.hidden = true; });
}
})();
