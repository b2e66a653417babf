"use strict";
(() => {
const page = document;
const find = (css, base = page) => base.querySelector(css);
const all = (css, base = page) => [...base.querySelectorAll(css)];
const byId = (id) => page.getElementById(id);
const state = {sort: {}, filter: {}, pick: {}, off: {}, open: {}};
let data;

const set = (node, given) => { for (const key in given) node.setAttribute(key, given[key]); };
const add = (name, given, parent, text) => {
  const made = page.createElementNS("http://www.w3.org/2000/svg", name);
  set(made, given);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
};

// -- numbers

const units = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const short = (x, digits = 3) => {
  const [size, letter] = units.find(([size]) => Math.abs(x) >= size) || [1, ""];
  return +(x / size).toPrecision(digits) + letter;
};
const time = (s) => s < 120 ? +s.toPrecision(3) + " s" : s < 7200 ? +(s / 60).toPrecision(3) + " min"
  : +(s / 3600).toPrecision(3) + " h";
const extent = (values) => values.reduce(([a, b], x) => [x < a ? x : a, x > b ? x : b], [1e99, -1e99]);
const ticks = (low, high, log, most) => {
  const marks = [];
  if (log) {
    const decades = Math.log10(high / low);
    for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e += Math.ceil(decades / most))
      for (const m of decades < 1.5 ? [1, 2, 5] : [1])
        if (m * 10 ** e >= low * .999 && m * 10 ** e <= high * 1.001) marks.push(m * 10 ** e);
    if (marks.length > 1) return marks;
  }
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * .999);
  for (let x = Math.ceil(low / step - 1e-6) * step; x <= high + step * 1e-6; x += step) marks.push(x);
  return marks;
};

// -- charts

function plot(figure, series, options) {
  const svg = find("svg", figure);
  const tip = find(".tip", figure);
  const {names, log, xlabel, limits, small} = options;
  const {max, min} = Math;
  const width = max(240, figure.clientWidth);
  const left = 54, right = width - 12, top = 10, bottom = (small ? 190 : max(240, min(400, width * .42))) - 40;
  set(svg, {viewBox: `0 0 ${width} ${bottom + 40}`});
  svg.replaceChildren();
  tip.textContent = "";
  const points = series.flatMap((s) => s.points.map((p) => ({x: p[0], y: p[1], text: p[2], s, best: p[3]})));
  if (!points.length) {
    add("text", {x: width / 2, y: bottom / 2}, svg, "no data yet");
    return;
  }
  let [low, high] = extent(limits || points.map((p) => p.y));
  const pad = (high - low || 1) * .06;
  low -= pad; high += pad;
  let [first, last] = extent(points.map((p) => p.x));
  if (names) { first = -.5; last = names.length - .5; }
  if (first === last) { first /= 2; last = last * 2 || 1; }
  const scale = log ? Math.log : (x) => x;
  const px = (x) => left + (right - left) * (scale(x) - scale(first)) / (scale(last) - scale(first));
  const py = (y) => top + (bottom - top) * (high - y) / (high - low);
  const marks = ticks(low, high, false, small ? 4 : 6);
  const places = min(6, max(0, -Math.floor(Math.log10(marks[1] - marks[0]) + 1e-9)));
  for (const y of marks) {
    add("line", {x1: left, x2: right, y1: py(y), y2: py(y), class: "rule"}, svg);
    add("text", {x: left - 8, y: py(y) + 4, class: "end"}, svg, y.toFixed(places));
  }
  add("line", {x1: left, x2: right, y1: bottom, y2: bottom, class: "axis"}, svg);
  const heads = names ? names.map((_, i) => i) : ticks(first, last, log, max(3, width / 130 | 0));
  for (const x of heads) {
    const name = names ? names[x] : short(x);
    add("text", {x: px(x), y: bottom + 17}, svg,
      name.length > 14 ? name.slice(0, 13) + "…" : name);
  }
  add("text", {x: (left + right) / 2, y: bottom + 36}, svg, xlabel);
  const frame = [left - 7, top - 7, right - left + 14, bottom - top + 7];
  const body = add("svg", {x: frame[0], y: frame[1], width: frame[2], height: frame[3], viewBox: frame.join(" ")}, svg);
  for (const s of series) {
    s.mark = add("g", {class: s.colour}, body);
    if (s.line) {
      const path = s.points.map((p, i) => (i && !s.stairs ? "L" : i ? "H" + px(p[0]) + "V" : "M")
        + (i && s.stairs ? "" : px(p[0]) + " ") + py(p[1]));
      add("path", {d: path.join("")}, s.mark);
    }
    if (!s.line || s.points.length < 25 && !s.stairs)
      for (const p of s.points)
        add("circle", {cx: px(p[0]), cy: py(p[1]), r: p[3] ? 6 : s.line ? 2.5 : 4, class: "dot"}, s.mark);
  }
  const ring = add("circle", {r: 7, class: "ring", visibility: "hidden"}, svg);
  const show = (p) => {
    for (const s of series) s.mark.classList.toggle("dim", !!p && !s.stairs && s.line && s !== p.s);
    set(ring, {visibility: p ? "visible" : "hidden"});
    tip.textContent = p ? p.text : "";
    if (!p) return;
    set(ring, {cx: px(p.x), cy: py(p.y)});
    const ratio = svg.clientWidth / width;
    tip.style.left = max(0, min(px(p.x) * ratio + 12, figure.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = max(0, py(p.y) * ratio - tip.offsetHeight - 12) + "px";
  };
  const inside = points.filter((p) => p.y <= high && p.y >= low && p.text);
  svg.onpointermove = ({clientX, clientY}) => {
    const box = svg.getBoundingClientRect(), ratio = width / box.width;
    let near, least = 60;
    for (const p of inside) {
      const far = Math.hypot(px(p.x) - (clientX - box.left) * ratio, py(p.y) - (clientY - box.top) * ratio);
      if (far < least) { near = p; least = far; }
    }
    show(near);
  };
  svg.onpointerleave = svg.onblur = () => show();
  let at = -1;
  svg.onkeydown = (event) => {
    const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!move) return;
    event.preventDefault();
    at = max(0, min(inside.length - 1, at + move));
    show(inside[at]);
  };
}

function curves(figure) {
  const axes = {steps: [0, "step"], tokens: [1, "tokens"], time: [2, ...data.time], flops: [3, "FLOPs"]};
  const [column, xlabel, unit = 1] = axes[state.pick["curves-x"] || "tokens"];
  const key = state.pick["curves-y"] || "full";
  const shown = visible("runs-table");
  const series = [], limits = [];
  for (const run of data.runs) {
    if (state.off[run.group] || shown && !shown.has(run.key)) continue;
    const points = run[key].filter((p) => p[column] !== null && p[4] !== null).map((p) => [p[column] / unit, p[4],
      `${run.id}\n${key} ${p[4].toFixed(4)}\nstep ${p[0]}, ${short(p[1])} tokens, ${time(p[2])}`
        + (p[3] === null ? "" : `, ${short(p[3])} FLOPs`)]);
    if (!points.length) continue;
    series.push({points, line: true, colour: run.colour});
    const skipped = points.length > 2 && Math.ceil(points.length * .08);
    for (const p of points.slice(skipped)) limits.push(p[1]);
  }
  plot(figure, series, {xlabel, limits});
}

function study(figure) {
  const {trials, fields, best} = data.studies[figure.dataset.study];
  const field = fields.find((f) => f.name === figure.dataset.field);
  const names = field && field.names;
  const done = [], rest = [], line = [];
  let lowest = Infinity;
  for (const t of trials) {
    const x = field ? t.params[field.name] : t.trial;
    if (t.value === null || x === undefined || x === null) continue;
    const set = Object.entries(t.params).map(([k, v]) => `${k} ${v}`).join("\n");
    const point = [names ? names.indexOf(String(x)) : x, t.value,
      `trial ${t.trial}: ${t.value.toFixed(4)}, ${t.state}\n${set}`, t.trial === best];
    (t.complete ? done : rest).push(point);
    if (t.complete && t.value < lowest) { lowest = t.value; line.push([x, lowest, ""]); }
  }
  const series = [{points: rest, colour: "cx"}, {points: done.filter((p) => !p[3]), colour: "c0"}];
  if (!field && line.length) {
    line.push([trials[trials.length - 1].trial, lowest, ""]);
    series.push({points: line, line: true, stairs: true, colour: "c1"});
  }
  series.push({points: done.filter((p) => p[3]), colour: "c1"});
  plot(figure, series.filter((s) => s.points.length), {names, log: field && field.log, small: field,
    xlabel: field ? field.name : "trial", limits: done.length > 2 ? done.map((p) => p[1]) : undefined});
}

const draw = () => all("figure[data-chart]").forEach((f) => (f.dataset.chart === "curves" ? curves : study)(f));

// -- tables

const value = (cell) => "v" in cell.dataset ? +cell.dataset.v : cell.textContent.trim();

function sort(table) {
  const [column, down] = state.sort[table.id] || [];
  if (column === undefined) return;
  all("thead th", table).forEach((th, i) =>
    set(th, {"aria-sort": i !== column ? "none" : down ? "descending" : "ascending"}));
  const rows = all("tbody tr", table).map((row) => [value(row.cells[column]), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = typeof a !== typeof b ? typeof a > typeof b : a > b;
    return a === b ? 0 : order !== Boolean(down) ? 1 : -1;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

function filter(table) {
  const words = (state.filter[table.id] || "").toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all("tbody tr", table);
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  const said = byId(table.id + "-count");
  if (said) said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

const visible = (id) => state.filter[id]
  && new Set(all(`#${id} tbody tr:not([hidden])`).map((row) => row.dataset.key));

// -- setting up, again after each refresh of the board

function start() {
  data = JSON.parse(find("#data").textContent);
  for (const table of all("table")) {
    all("th button", table).forEach((button, column) => {
      button.onclick = () => {
        const [before, down] = state.sort[table.id] || [];
        state.sort[table.id] = [column, before === column && !down];
        sort(table);
      };
    });
    sort(table);
    filter(table);
  }
  for (const input of all("input[type=search]")) {
    const id = input.dataset.table;
    input.value = state.filter[id] || "";
    input.oninput = () => { state.filter[id] = input.value; filter(byId(id)); draw(); };
  }
  for (const input of all("input[type=radio]")) {
    if (state.pick[input.name]) input.checked = state.pick[input.name] === input.value;
    input.onchange = () => { state.pick[input.name] = input.value; draw(); };
  }
  for (const button of all(".key button")) {
    const group = button.dataset.group;
    const press = () => set(button, {"aria-pressed": !state.off[group]});
    button.onclick = () => { state.off[group] = !state.off[group]; press(); draw(); };
    press();
  }
  for (const details of all("details")) {
    details.open = state.open[details.id];
    details.ontoggle = () => { state.open[details.id] = details.open; };
  }
  draw();
}

const reveal = () => {
  const target = byId(location.hash.slice(1));
  if (target) target.open = true;
};

// -- the board

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw answer.status;
  return answer;
}

async function poll() {
  const live = find("#live");
  try {
    const {version} = await (await get("version")).json();
    if (version !== page.body.dataset.version) await refresh();
    live.className = "";
    live.textContent = page.body.dataset.shown;
  } catch {
    live.className = "lost";
    live.textContent = live.dataset.lost;
  }
  setTimeout(poll, 1000);
}

async function refresh() {
  const fresh = new DOMParser().parseFromString(await (await get("./")).text(), "text/html");
  const {id, selectionStart} = page.activeElement;
  const scrolled = all(".scroll").map((box) => [box.scrollTop, box.scrollLeft]);
  for (const part of ["nav", "main", "#data"]) find(part).replaceWith(find(part, fresh));
  Object.assign(page.body.dataset, fresh.body.dataset);
  start();
  all(".scroll").forEach((box, i) => scrolled[i] && ([box.scrollTop, box.scrollLeft] = scrolled[i]));
  const again = byId(id);
  if (!again) return;
  again.focus({preventScroll: true});
  if (selectionStart) again.setSelectionRange(selectionStart, selectionStart);
}

start();
reveal();
addEventListener("hashchange", reveal);
addEventListener("resize", draw);
if (page.body.dataset.version) poll();
})();
