/* Elements, formats, colours and charts; knows nothing of p2pfed's data.

   Invariant: whatever comes from data enters the page as text (textContent) or as a number. There is
   no innerHTML here, no style attribute and no handler attribute: the content policy forbids them. */
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 4", "9 3 2 3", "4 3", "12 4", "1 3", "8 3 2 3 2 3"];
const COLOURS = 8;

function fill(node, attrs, children) {
  for (const [name, value] of Object.entries(attrs || {})) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

/** An HTML element; children that are no nodes become text. */
function el(tag, attrs, ...children) { return fill(document.createElement(tag), attrs, children); }

/** An SVG element. */
function sv(tag, attrs, ...children) { return fill(document.createElementNS(SVG, tag), attrs, children); }

/** A drawing as wide as its place, with what it shows in words. */
function drawing(width, height, label, ...children) {
  return sv("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, ...children);
}

/** Put these children, and nothing else, into an element; an equal content is left alone. */
function put(id, ...children) {
  const place = document.getElementById(id);
  const fresh = document.createDocumentFragment();
  fill(fresh, null, children);
  if (place.childNodes.length === fresh.childNodes.length) {
    const held = [...place.childNodes];
    if ([...fresh.childNodes].every((node, i) => node.isEqualNode(held[i]))) return place;
  }
  place.replaceChildren(fresh);
  return place;
}

// --- formats ------------------------------------------------------------------------------------

function number(value, digits = 4) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  return String(Number(value.toPrecision(digits)));
}

function bytes(count) {
  if (typeof count !== "number") return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 999.5) return `${Number(count.toPrecision(3))} ${unit}`;
    count /= 1000;
  }
  return `${Number(count.toPrecision(3))} TB`;
}

function span(seconds) {
  if (typeof seconds !== "number") return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function cut(text, most) {
  const letters = [...String(text)];
  return letters.length <= most ? String(text) : `${letters.slice(0, most - 1).join("")}…`;
}

function plural(count, word) { return `${count} ${word}${count === 1 ? "" : "s"}`; }

// --- shapes: told apart without colours -----------------------------------------------------------

function shape(kind, x, y, r, attrs) {
  const path = {
    1: `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    2: `M${x} ${y - r * 1.2}l${r * 1.15} ${r * 2}h${-2.3 * r}z`,
    3: `M${x} ${y - r * 1.3}l${r * 1.3} ${r * 1.3}l${-r * 1.3} ${r * 1.3}l${-r * 1.3} ${-r * 1.3}z`,
    4: `M${x} ${y + r * 1.2}l${r * 1.15} ${-r * 2}h${-2.3 * r}z`,
    5: `M${x - r} ${y - r / 3}h${r * 0.67}v${-r * 0.67}h${r * 0.67}v${r * 0.67}h${r * 0.67}v${r * 0.67}h${-r * 0.67}v${r * 0.67}h${-r * 0.67}v${-r * 0.67}h${-r * 0.67}z`,
  }[kind % 6];
  return path ? sv("path", { d: path, ...attrs }) : sv("circle", { cx: x, cy: y, r, ...attrs });
}

/** The mark of a hospital: its colour and shape; hollow where it is not there. */
function chip(index, hollow) {
  return el("span", { class: `chip c${index % COLOURS}`, "aria-hidden": "true" },
    sv("svg", { viewBox: "0 0 16 16" }, shape(index, 8, 8, 5.5, { class: hollow ? "hollow" : "dot" })));
}

function table(head, rows, caption) {
  return el("table", null,
    caption ? el("caption", { class: "muted" }, caption) : null,
    el("thead", null, el("tr", null, ...head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", null, ...rows.map((row) => el("tr", null,
      ...row.map((cell, i) => (cell instanceof Element && /^T[DH]$/.test(cell.tagName) ? cell
        : el(i === 0 ? "th" : "td", i === 0 ? { scope: "row" } : null, cell)))))));
}

function empty(text) { return el("p", { class: "empty" }, text); }

// --- charts -------------------------------------------------------------------------------------

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || rough;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

/** Move labels apart so that none covers another; keeps their order. */
function apart(labels, gap, low, high) {
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => { label.at = Math.max(label.y, i ? labels[i - 1].at + gap : low); });
  for (let i = labels.length - 1; i >= 0; i -= 1) {
    const most = i === labels.length - 1 ? high : labels[i + 1].at - gap;
    labels[i].at = Math.min(labels[i].at, most);
  }
}

/** Lines over rounds with their names at their ends.

    chart: width, height, label, x [low, high], y [low, high], series (name, index, own, points),
    refs (y, name, kind), paths (points, kind), yName, right (room for names). */
function lines(chart) {
  const { width, height } = chart;
  const room = { left: 44, right: chart.right ?? Math.max(112, Math.min(170, width * 0.28)), top: 12, bottom: 34 };
  const [x0, x1] = chart.x[0] === chart.x[1] ? [chart.x[0] - 1, chart.x[1] + 1] : chart.x;
  const [y0, y1] = chart.y[0] === chart.y[1] ? [chart.y[0] - 0.5, chart.y[1] + 0.5] : chart.y;
  const px = (x) => room.left + ((x - x0) / (x1 - x0)) * (width - room.left - room.right);
  const py = (y) => height - room.bottom - ((y - y0) / (y1 - y0)) * (height - room.top - room.bottom);
  const at = (points) => points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
  const out = [];
  for (const tick of ticks(y0, y1, Math.max(2, height / 55))) {
    out.push(sv("line", { class: "gridline", x1: room.left, x2: width - room.right, y1: py(tick), y2: py(tick) }),
      sv("text", { class: "dim", x: room.left - 6, y: py(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks(x0, x1, Math.max(2, width / 110)).filter(Number.isInteger)) {
    out.push(sv("text", { class: "dim", x: px(tick), y: height - room.bottom + 16, "text-anchor": "middle" }, tick));
  }
  out.push(sv("line", { class: "axis", x1: room.left, x2: width - room.right, y1: height - room.bottom, y2: height - room.bottom }),
    sv("text", { class: "dim", x: width - room.right, y: height - 4, "text-anchor": "end" }, "round"));
  const labels = [];
  for (const ref of chart.refs || []) {
    out.push(sv("line", { class: ref.kind || "ref", x1: room.left, x2: width - room.right, y1: py(ref.y), y2: py(ref.y) }));
    labels.push({ y: py(ref.y), text: ref.name, cls: "" });
  }
  for (const path of chart.paths || []) {
    out.push(sv("polyline", { class: path.kind, points: at(path.points) }));
    if (path.name) labels.push({ y: py(path.points[path.points.length - 1][1]), text: path.name, cls: "" });
  }
  for (const one of chart.series) {
    if (!one.points.length) continue;
    const cls = `c${one.index % COLOURS}`;
    out.push(sv("polyline", { class: `series ${cls}${one.own ? " own" : ""}`, points: at(one.points), "stroke-dasharray": one.own ? null : DASHES[one.index % DASHES.length] || null }));
    const [ex, ey] = one.points[one.points.length - 1];
    out.push(shape(one.index, px(ex), py(ey), 4.5, { class: `dot ${cls}` }));
    labels.push({ y: py(ey), text: one.name, cls: one.own ? "strong" : "", index: one.index, beside: px(ex) > width - room.right - 8 });
  }
  apart(labels, 14, room.top, height - room.bottom);
  const letters = Math.max(5, Math.floor((room.right - 18) / 6.8));
  for (const label of labels) {
    const x = width - room.right + 8;
    if (label.index !== undefined && !(label.beside && Math.abs(label.at - label.y) <= 3)) out.push(shape(label.index, x + 4, label.at, 3.8, { class: `dot c${label.index % COLOURS}` }));
    out.push(sv("text", { class: label.cls, x: label.index === undefined ? x : x + 12, y: label.at + 4 }, cut(label.text, letters), sv("title", null, label.text)));
  }
  return drawing(width, height, chart.label, ...out);
}
