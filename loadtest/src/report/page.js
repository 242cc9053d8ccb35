// Draws the charts from the data in the page. What it draws is also in the tables.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colours = {
  light: ["#6b7680", "#0b6bcb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0c8599", "#a07400", "#5f3dc4", "#846358"],
  dark: ["#a3afb9", "#6cb2ff", "#ff9a62", "#69db7c", "#da9bf0", "#faa2c1", "#66d9e8", "#ffd43b", "#b197fc", "#d0b8a8"],
};
const root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const colour = (name) => colours[isDark() ? "dark" : "light"][data.targets.indexOf(name) % 10];
const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits ?? (value >= 100 ? 0 : value >= 10 ? 1 : value >= 0.1 ? 2 : 4) });
const short = (value) => value >= 1e9 ? number(value / 1e9) + "G" : value >= 1e6 ? number(value / 1e6) + "M" : value >= 1e4 ? number(value / 1e3) + "k" : number(value);
const element = (kind, name, text) => {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};

function card(place, title, note) {
  const made = element("div", "card");
  const head = element("h3", "", title);
  if (note) head.append(" ", Object.assign(element("span", "quiet", note), { style: "font-weight:400" }));
  made.append(head);
  place.append(made);
  return made;
}

function bars(place, rows, unit) {
  const list = element("div", "bars");
  const most = Math.max(...rows.map((row) => Math.max(row.high ?? 0, row.value, row.whole ?? 0)));
  for (const row of rows) {
    const track = element("div", "track");
    const bar = element("div", "bar");
    bar.style.width = 100 * row.value / most + "%";
    bar.style.background = colour(row.name);
    track.append(bar);
    if (row.whole > row.value) {
      const rest = element("div", "rest");
      rest.style.left = 100 * row.value / most + "%";
      rest.style.width = 100 * (row.whole - row.value) / most + "%";
      rest.style.background = colour(row.name);
      track.append(rest);
    }
    if (row.high > row.low) {
      const whisker = element("div", "whisker");
      whisker.style.left = 100 * row.low / most + "%";
      whisker.style.width = 100 * (row.high - row.low) / most + "%";
      track.append(whisker);
    }
    const text = row.whole !== undefined ? `${row.value ? number(row.value) : "–"} / ${number(row.whole)}` : number(row.value);
    list.append(element("div", "", row.name), track, element("div", "value", text + (unit ? " " + unit : "")));
  }
  place.append(list);
}

function keys(place, names) {
  const list = element("div", "keys");
  for (const name of names) {
    const key = element("span");
    const mark = element("i");
    mark.style.background = colour(name);
    key.append(mark, name);
    list.append(key);
  }
  place.append(list);
}

function lines(place, names, table, options) {
  const grid = { stroke: variable("--line"), width: 1 };
  const axis = { stroke: variable("--quiet"), grid, ticks: grid, font: "12px system-ui, sans-serif" };
  const box = element("div");
  place.append(box);
  keys(place, names);
  const plot = new uPlot({
    width: box.clientWidth, height: 260, legend: { show: false }, cursor: { drag: { x: true, y: false } },
    scales: { x: { time: false, ...options.x }, y: options.y },
    axes: [
      { ...axis, ...options.xAxis },
      { ...axis, size: 62, values: (_, splits) => splits.map((split) => split === null ? "" : short(split)), ...options.yAxis },
    ],
    series: [{}, ...names.map((name) => ({ label: name, stroke: colour(name), width: 2, points: { show: options.points ?? false, size: 6, fill: colour(name) }, spanGaps: true }))],
  }, table, box);
  plots.push([plot, box]);
}
const plots = [];

// Percentiles on an axis of nines: 90, 99, 99.9 are equally far from each other.
function percentiles(place, cells) {
  const shown = cells.filter((cell) => cell.histogram.length);
  if (!shown.length) return;
  const steps = [];
  for (let nines = 0; nines <= 4.001; nines += 0.05) steps.push(nines);
  const curves = shown.map((cell) => {
    const all = cell.histogram.reduce((sum, [, count]) => sum + count, 0);
    return steps.map((nines) => {
      const rank = Math.ceil(all * (1 - 10 ** -nines));
      if (all * 10 ** -nines < 1) return null;
      let seen = 0;
      for (const [value, count] of cell.histogram) {
        seen += count;
        if (seen >= Math.max(rank, 1)) return value;
      }
      return null;
    });
  });
  const names = { 0: "0", 1: "90", 2: "99", 3: "99.9", 4: "99.99" };
  lines(card(place, "Latency by percentile", "µs, all rounds"), shown.map((cell) => cell.target), [steps, ...curves], {
    x: { range: [0, 4] }, y: { distr: 3 },
    xAxis: { splits: () => [0, 1, 2, 3, 4], values: (_, splits) => splits.map((split) => names[split] + " %") },
  });
}

function series(place, cells, unit) {
  const shown = cells.filter((cell) => cell.intervals.length);
  if (!shown.length) return;
  const times = [...new Set(shown.flatMap((cell) => cell.intervals.map(([time]) => time)))].sort((a, b) => a - b);
  const table = shown.map((cell) => {
    const values = new Map(cell.intervals);
    return times.map((time) => values.get(time) ?? null);
  });
  lines(card(place, "Over time", unit + ", rounds one after the other"), shown.map((cell) => cell.target), [times, ...table], {
    y: { range: (_, low, high) => [0, high * 1.08] },
    xAxis: { values: (_, splits) => splits.map((split) => split + " s") },
  });
}

function workload(part) {
  const place = document.querySelector(`[data-workload="${part.name}"]`);
  const rows = (figure, factor) => part.cells
    .filter((cell) => cell.figures[figure])
    .map((cell) => { const [value, low, high] = cell.figures[figure]; return { name: cell.target, value: value * factor, low: low * factor, high: high * factor }; });
  const stacked = (first, whole, factor) => part.cells
    .filter((cell) => cell.figures[whole])
    .map((cell) => ({ name: cell.target, value: (cell.figures[first] ?? [0])[0] * factor, whole: cell.figures[whole][0] * factor }));
  if (part.unit === "flow") {
    bars(card(place, "Memory of an idle flow", "bytes of the forwarder's user space"), rows("user_bytes_per_flow", 1), "B");
    bars(card(place, "Kernel slab of an idle flow", "bytes, client's and server's sockets included"), rows("slab_bytes_per_flow", 1).filter((row) => row.value > 0), "B");
    return;
  }
  if (part.unit === "GB") {
    bars(card(place, "Rate", "Gbit/s, with its interval"), rows("bytes_per_second", 8e-9), "");
    bars(card(place, "CPU of a gigabyte", "seconds: forwarder / whole system"), stacked("forwarder_cpu_us_per_unit", "system_cpu_us_per_unit", 1e-6), "");
    series(place, part.cells, "Gbit/s");
    return;
  }
  bars(card(place, `${part.unit === "request" ? "Requests" : "Connections"} a second`, "with their interval"), rows("per_second", 1), "");
  bars(card(place, `CPU of a ${part.unit}`, "µs: forwarder / whole system"), stacked("forwarder_cpu_us_per_unit", "system_cpu_us_per_unit", 1), "");
  percentiles(place, part.cells);
  series(place, part.cells, "a second");
}

function scaling() {
  const place = document.getElementById("scaling");
  for (const family of data.families) {
    const xs = family.connections;
    const log = { distr: 3 };
    const x = { ...log, range: [xs[0] * 0.9, xs[xs.length - 1] * 1.15] };
    const brief = (count) => count >= 1000 ? number(count / 1000) + "k" : number(count);
    const table = (figure) => family.lines.map((line) => line[figure]);
    const names = family.lines.map((line) => line.target);
    const options = { x, y: {}, points: true, xAxis: { splits: () => xs, filter: (_, splits) => splits, values: (_, splits) => splits.map(brief) } };
    lines(card(place, `${family.name}: rate by connections`, "a second"), names, [xs, ...table("rate")], { ...options, y: { range: (_, low, high) => [0, high * 1.08] } });
    lines(card(place, `${family.name}: p99 by connections`, "µs"), names, [xs, ...table("p99")], { ...options, y: log });
  }
}

function draw() {
  plots.length = 0;
  for (const place of document.querySelectorAll(".grid")) place.replaceChildren();
  for (const part of data.workloads) workload(part);
  if (data.families.length) scaling();
}
draw();
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("resize", () => plots.forEach(([plot, box]) => plot.setSize({ width: box.clientWidth, height: 260 })));
