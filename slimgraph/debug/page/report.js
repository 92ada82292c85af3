"use strict";

const cells = JSON.parse(document.getElementById("cells").textContent);
const root = document.documentElement;

// ---- light and dark ----

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());

// ---- what is pointed at, by mouse or keyboard ----

const tip = document.getElementById("tip");

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18}px`;
}

function hideTip() {
  tip.hidden = true;
}

document.addEventListener("pointermove", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(target.dataset.tip, event.clientX, event.clientY);
  else if (event.target.id !== "units-map") hideTip();
});
document.addEventListener("focusin", (event) => {
  const target = event.target.closest("[data-tip]");
  if (!target || !target.matches(":focus-visible")) return hideTip();
  const box = target.getBoundingClientRect();
  showTip(target.dataset.tip, box.left, box.bottom - 10);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
document.addEventListener("scroll", hideTip, { passive: true, capture: true });

// ---- the units of one cell ----

const map = document.getElementById("units-map");
let shown = null; // {cell, removed, ranks, columns, size}

function choose(index) {
  const cell = cells[index];
  document.querySelectorAll("[data-cell]").forEach((b) => b.setAttribute("aria-pressed", String(Number(b.dataset.cell) === index)));
  const row = cell.row || cell.units;
  const removed = new Set((cell.rows || []).flatMap((units, i) => units.map((u) => i * row + u)));
  shown = { cell, removed, ranks: ranksOf(cell.scores) };
  document.getElementById("units-title").textContent = `Layer ${cell.layer}, ${cell.kind}: ${cell.kept.toLocaleString("en")} of ${cell.units.toLocaleString("en")} stay`;
  const colours = shown.ranks ? "The stronger the colour, the higher the score; outlined ones went." : "Filled ones stay, outlined ones went.";
  const known = removed.size || cell.kept === cell.units;
  document.getElementById("units-text").textContent = known ? `${colours} ${listed([...removed])}` : "Which ones went is not known.";
  draw();
}

function listed(units) {
  if (!units.length) return "Nothing was removed here.";
  const few = units.slice(0, 40).join(", ");
  return `Removed: ${few}${units.length > 40 ? ` and ${units.length - 40} more` : ""}.`;
}

function ranksOf(scores) {
  if (!scores || !scores.length) return null;
  const order = scores.map((_, i) => i).sort((a, b) => scores[a] - scores[b]);
  const ranks = new Array(scores.length);
  order.forEach((unit, rank) => { ranks[unit] = scores.length > 1 ? rank / (scores.length - 1) : 1; });
  return ranks;
}

function draw() {
  if (!shown) return;
  const style = getComputedStyle(root);
  const units = shown.cell.units;
  const width = map.clientWidth || 600;
  shown.size = Math.max(7, Math.min(30, Math.floor(Math.sqrt((width * 190) / units))));
  shown.columns = Math.max(1, Math.floor(width / shown.size));
  const height = Math.ceil(units / shown.columns) * shown.size;
  const scale = devicePixelRatio || 1;
  map.width = width * scale;
  map.height = height * scale;
  map.style.height = `${height}px`;
  const pen = map.getContext("2d");
  pen.scale(scale, scale);
  const inner = shown.size - (shown.size > 12 ? 3 : 1.5);
  for (let unit = 0; unit < units; unit++) {
    const x = (unit % shown.columns) * shown.size;
    const y = Math.floor(unit / shown.columns) * shown.size;
    const gone = shown.removed.has(unit);
    pen.globalAlpha = shown.ranks ? 0.15 + 0.85 * shown.ranks[unit] : gone ? 0.12 : 0.85;
    pen.fillStyle = style.getPropertyValue(gone ? "--hot" : "--accent");
    pen.fillRect(x, y, inner, inner);
    if (!gone) continue;
    pen.globalAlpha = 1;
    pen.strokeStyle = style.getPropertyValue("--hot");
    pen.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1);
  }
  pen.globalAlpha = 1;
}

map.addEventListener("pointermove", (event) => {
  const box = map.getBoundingClientRect();
  const unit = Math.floor((event.clientY - box.top) / shown.size) * shown.columns + Math.floor((event.clientX - box.left) / shown.size);
  if (unit < 0 || unit >= shown.cell.units) return hideTip();
  const score = shown.ranks ? `, score ${shown.cell.scores[unit].toPrecision(3)}` : "";
  showTip(`unit ${unit}: ${shown.removed.has(unit) ? "removed" : "stays"}${score}`, event.clientX, event.clientY);
});

document.querySelectorAll("[data-cell]").forEach((button) => {
  button.addEventListener("click", () => choose(Number(button.dataset.cell)));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const row = [...button.closest("tr").querySelectorAll("[data-cell]")];
    row[row.indexOf(button) + step]?.focus();
    event.preventDefault();
  });
});
addEventListener("resize", draw);
const first = cells.findIndex((cell) => cell.kept < cell.units && cell.kind === "channels");
if (cells.length) choose(first < 0 ? 0 : first);

// ---- search ----

const search = document.getElementById("search");
const rows = [...document.querySelectorAll("#table tbody tr")].map((row) => ({ row, code: row.querySelector("code") }));
rows.forEach((each) => { each.name = each.code.textContent; });

search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const each of rows) {
    const name = each.name.toLowerCase();
    const hit = words.every((word) => name.includes(word));
    each.row.hidden = !hit;
    found += hit;
    mark(each, hit ? words : []);
  }
  document.getElementById("count").textContent = words.length ? `${found} of ${rows.length}` : `${rows.length} changed`;
  document.getElementById("nothing").hidden = found > 0;
});

function mark(each, words) {
  each.code.textContent = each.name;
  if (!words.length) return;
  const longest = words.reduce((a, b) => (b.length > a.length ? b : a));
  const at = each.name.toLowerCase().indexOf(longest);
  const range = document.createRange();
  range.setStart(each.code.firstChild, at);
  range.setEnd(each.code.firstChild, at + longest.length);
  range.surroundContents(document.createElement("mark"));
}
