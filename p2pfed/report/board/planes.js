/* Three planes of a patient's image with the expert's outline (solid) and the model's (dashed), drawn
   on this page from grey PNGs; nothing is fetched before somebody asks. */
"use strict";

const EXPERT = "#56B4E9", MODEL = "#E69F00";
const EDGES = { sagittal: ["A", "P", "S", "I"], coronal: ["R", "L", "S", "I"], axial: ["R", "L", "A", "P"] };
const LEAST_PX = 480; // of the widest plane
const viewer = { cases: [], at: 0, slice: 0, expert: true, model: true, turn: 0 };

function offerPictures(snap) {
  const section = document.getElementById("planes");
  if (snap.frozen) {
    if (snap.pictures && !viewer.cases.length) { section.hidden = false; document.getElementById("planes-ask").hidden = true; showPictures(snap.pictures); }
    return;
  }
  section.hidden = !snap.private;
}

async function askForPictures() {
  const button = document.getElementById("planes-ask");
  button.disabled = true;
  say("say-planes", "The trainer goes over its test patients; this can take a while.");
  try {
    const answer = await fetch("/api/pictures", { credentials: "same-origin" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const told = await answer.json();
    if (told.trouble) say("say-planes", `${told.trouble}.`);
    else { showPictures(told); button.textContent = "Draw again"; }
  } catch (error) {
    say("say-planes", "The pictures could not be fetched; is the dashboard still running?");
  }
  button.disabled = false;
}

function showPictures(told) {
  viewer.cases = merged(told.cases);
  viewer.at = Math.min(viewer.at, viewer.cases.length - 1);
  viewer.slice = middleOf(viewer.cases[viewer.at]);
  say("say-planes", `Best, median and worst of the test patients${told.round === null || told.round === undefined ? "" : `, model of round ${told.round}`}. Blue, solid: the expert. Orange, dashed: the model. They stay on this machine.`);
  tools();
  drawPlanes();
}

/** Where there are few test patients one case has several ranks: it is shown once, with all of them. */
function merged(cases) {
  const seen = new Map();
  for (const one of cases) {
    const held = seen.get(one.case);
    if (held) held.rank += `, ${one.rank}`;
    else seen.set(one.case, { ...one });
  }
  return [...seen.values()];
}

/* One slider moves all planes: where it begins each shows its middle, at its ends their first and last slices. */
function middleOf(one) { return Math.max(...one.planes.map((plane) => plane.middle)); }
function depth(one) { return middleOf(one) + Math.max(...one.planes.map((plane) => plane.slices.length - plane.middle)); }
function sliceOf(plane, one) {
  const beyond = viewer.slice - middleOf(one);
  if (beyond <= 0) return Math.round((viewer.slice / Math.max(1, middleOf(one))) * plane.middle);
  return plane.middle + Math.round((beyond / (depth(one) - 1 - middleOf(one))) * (plane.slices.length - 1 - plane.middle));
}

function tools() {
  const place = document.getElementById("planes-tools");
  place.hidden = false;
  const buttons = viewer.cases.map((one, i) => el("button", { type: "button", "aria-pressed": String(i === viewer.at), "data-case": i }, `${one.rank}: ${number(one.score, 3)}`));
  const slider = el("input", { type: "range", id: "planes-slice", min: 0, max: depth(viewer.cases[viewer.at]) - 1, value: viewer.slice, disabled: depth(viewer.cases[viewer.at]) < 2 });
  const box = (name, words) => el("label", null, el("input", { type: "checkbox", "data-layer": name, checked: viewer[name] }), words);
  place.replaceChildren(el("span", { class: "choice", role: "group", "aria-label": "Which case" }, ...buttons),
    el("label", null, "Slice", slider), box("expert", "expert"), box("model", "model"), el("span", { class: "muted", title: "what this hospital calls the case" }, cut(viewer.cases[viewer.at].case, 40)));
}

async function drawPlanes() {
  const turn = ++viewer.turn, one = viewer.cases[viewer.at];
  const wide = (plane) => plane.width * plane.mm, widest = Math.max(...one.planes.map(wide));
  // one scale for all planes of a case; every pixel of the image is drawn
  const scale = Math.max(LEAST_PX / widest, 1 / Math.min(...one.planes.map((plane) => plane.mm)));
  const figures = await Promise.all(one.planes.map(async (plane) => {
    const at = sliceOf(plane, one), shown = plane.slices[at];
    const [image, target, predicted] = await Promise.all(["image", "target", "predicted"].map((part) => decoded(shown[part])));
    const canvas = el("canvas", { width: Math.round(wide(plane) * scale), height: Math.round(plane.height * plane.aspect * plane.mm * scale), role: "img", "aria-label": `${plane.name} plane of the ${one.rank} case, slice ${at + 1} of ${plane.slices.length}` });
    canvas.style.width = `${(100 * wide(plane)) / widest}%`;
    const pen = canvas.getContext("2d"), unit = (widest * scale) / 240;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (viewer.expert) outline(pen, pixels(target, plane), plane, unit, EXPERT, false);
    if (viewer.model) outline(pen, pixels(predicted, plane), plane, unit, MODEL, true);
    letters(pen, canvas, unit, EDGES[plane.name] || []);
    return el("figure", null, canvas, el("figcaption", null, `${plane.name}, slice ${at + 1} of ${plane.slices.length}`));
  }));
  if (turn === viewer.turn) document.getElementById("planes-view").replaceChildren(...figures);
}

function decoded(png) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("not a picture"));
    image.src = `data:image/png;base64,${png}`;
  });
}

function pixels(image, plane) {
  const canvas = el("canvas", { width: plane.width, height: plane.height }), pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return pen.getImageData(0, 0, plane.width, plane.height).data;
}

/** Borders between labels, as lines of [x, y] that go on as far as they can: dashes run along them. */
function borders(data, { width, height }) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : data[4 * (y * width + x)]);
  const row = width + 1, ways = new Map();
  const join = (from, to) => { if (!ways.has(from)) ways.set(from, []); ways.get(from).push(to); };
  for (let y = 0; y <= height; y += 1) {
    for (let x = 0; x <= width; x += 1) {
      const corner = y * row + x;
      for (const [other, next] of [[at(x - 1, y), corner + row], [at(x, y - 1), corner + 1]]) {
        if (at(x, y) !== other) { join(corner, next); join(next, corner); }
      }
    }
  }
  const odd = (corner) => ways.get(corner).length % 2; // a line that is no ring begins at such a corner
  const found = [];
  for (const start of [...ways.keys()].sort((a, b) => odd(b) - odd(a))) {
    while (ways.get(start).length) {
      const line = [start];
      for (let here = start; ways.get(here).length; line.push(here)) {
        const next = ways.get(here).pop(), back = ways.get(next);
        back.splice(back.indexOf(here), 1);
        here = next;
      }
      found.push(line.map((corner) => [corner % row, Math.floor(corner / row)]));
    }
  }
  return found;
}

function outline(pen, data, plane, unit, colour, dashed) {
  const wide = pen.canvas.width / plane.width, high = pen.canvas.height / plane.height;
  pen.strokeStyle = colour;
  pen.lineWidth = 1.2 * unit;
  pen.setLineDash(dashed ? [3.4 * unit, 2.4 * unit] : []);
  pen.beginPath();
  for (const line of borders(data, plane)) line.forEach(([x, y], i) => { if (i) pen.lineTo(x * wide, y * high); else pen.moveTo(x * wide, y * high); });
  pen.stroke();
}

function letters(pen, canvas, unit, [left, right, top, bottom]) {
  const { width, height } = canvas, edge = 2 * unit;
  pen.setLineDash([]);
  pen.font = `${Math.round(8 * unit)}px sans-serif`;
  pen.fillStyle = "#fff";
  pen.strokeStyle = "#000";
  pen.lineWidth = 2 * unit;
  for (const [text, x, y, align, base] of [[left, edge, height / 2, "left", "middle"], [right, width - edge, height / 2, "right", "middle"], [top, width / 2, edge, "center", "top"], [bottom, width / 2, height - edge, "center", "bottom"]]) {
    pen.textAlign = align;
    pen.textBaseline = base;
    pen.strokeText(text || "", x, y);
    pen.fillText(text || "", x, y);
  }
}

document.addEventListener("click", (event) => {
  const { target } = event;
  if (!(target instanceof Element)) return;
  if (target.id === "planes-ask") askForPictures();
  if (target.matches("[data-case]")) {
    viewer.at = Number(target.getAttribute("data-case"));
    viewer.slice = middleOf(viewer.cases[viewer.at]);
    tools();
    document.querySelector(`[data-case="${viewer.at}"]`).focus();
    drawPlanes();
  }
});
document.addEventListener("input", (event) => {
  const { target } = event;
  if (target.id === "planes-slice") { viewer.slice = Number(target.value); drawPlanes(); }
  if (target.matches && target.matches("[data-layer]")) { viewer[target.getAttribute("data-layer")] = target.checked; drawPlanes(); }
});
