/* Keeps the page alive: a snapshot now and then, events as they come, and a clear mark when either
   fails. Frozen into a report, it draws the data that lies in the page and asks for nothing. */
"use strict";

const EVERY_MS = 5000, BROKEN_MS = 2500, SOON_MS = 700, SILENCE_MS = 15000, KEPT = 300;
const live = { snap: null, events: new Map(), daemon: false, streaming: false, served: true, closed: false, due: null, heard: 0, abort: null };

function lastSeq() { return live.events.size ? Math.max(...live.events.keys()) : 0; }

function show() {
  if (!live.snap) return;
  paint({ ...live.snap, events: [...live.events.values()] });
  offerPictures(live.snap);
}

function lamp() {
  const on = live.served && live.daemon;
  const words = live.closed ? "not live: this address was opened elsewhere; run p2pfed dashboard again"
    : !live.served ? "not live: the dashboard has ended"
    : !live.daemon ? "not live: the daemon does not answer; waiting for it"
    : live.streaming ? "live" : "live, by asking every few seconds";
  const mark = document.getElementById("live");
  mark.className = `live ${on ? "on" : "off"}`;
  if (document.getElementById("live-text").textContent !== words) say("live-text", words);
  document.documentElement.classList.toggle("stale", !on);
}

async function look() {
  try {
    const answer = await fetch("/api/snapshot", { credentials: "same-origin" });
    live.closed = answer.status === 403;
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const snap = await answer.json();
    const newest = (snap.events || []).reduce((most, event) => Math.max(most, event.seq), 0);
    if (newest && newest < lastSeq() - KEPT) live.events.clear(); // the daemon's numbers began anew
    for (const event of snap.events || []) keep(event);
    live.snap = snap;
    live.daemon = snap.live;
    live.served = true;
  } catch (error) {
    live.served = false;
  }
  lamp();
  show();
}

function keep(event) {
  live.events.set(event.seq, event);
  while (live.events.size > KEPT) live.events.delete(Math.min(...live.events.keys()));
}

function soon() {
  if (live.due === null) live.due = setTimeout(() => { live.due = null; look(); }, SOON_MS);
}

function take(line) {
  const told = JSON.parse(line);
  live.heard = Date.now();
  if (told.kind === "event") { keep(told.event); soon(); show(); }
  if (told.kind === "beat" && told.live !== live.daemon) { live.daemon = told.live; lamp(); soon(); }
}

async function follow() {
  for (;;) {
    try {
      live.abort = new AbortController();
      const answer = await fetch(`/api/events?since=${lastSeq()}`, { credentials: "same-origin", signal: live.abort.signal });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      live.streaming = true;
      live.heard = Date.now();
      lamp();
      for (let rest = "";;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n");
        rest = parts.pop();
        parts.filter(Boolean).forEach(take);
      }
    } catch (error) { /* below: the mark says so, and it is tried again */ }
    live.streaming = false;
    lamp();
    await new Promise((resolve) => { setTimeout(resolve, BROKEN_MS); });
  }
}

function ask() {
  if (live.streaming && Date.now() - live.heard > SILENCE_MS) live.abort.abort();
  if (!document.hidden) look();
  setTimeout(ask, live.streaming ? EVERY_MS : BROKEN_MS);
}

// --- theme and choices ----------------------------------------------------------------------------

function theme(name) {
  document.documentElement.setAttribute("data-theme", name);
  const button = document.getElementById("theme");
  button.textContent = name === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Change to ${name === "dark" ? "light" : "dark"} colours`);
}

function remembered() {
  try { return localStorage.getItem("p2pfed-theme"); } catch (error) { return null; }
}

function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  theme(remembered() || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", (event) => { if (!remembered()) theme(event.matches ? "dark" : "light"); });
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.getAttribute("data-theme") === "dark" ? "light" : "dark";
    try { localStorage.setItem("p2pfed-theme", next); } catch (error) { /* a file may have no storage */ }
    theme(next);
  });
  document.getElementById("metric-names").addEventListener("click", (event) => {
    const name = event.target instanceof Element && event.target.getAttribute("data-metric");
    if (!name) return;
    chosen.metric = name;
    show();
    document.querySelectorAll("[data-metric]").forEach((button) => { if (button.getAttribute("data-metric") === name) button.focus(); });
  });
  let width = 0;
  new ResizeObserver(() => { const now = document.body.clientWidth; if (now !== width) { width = now; show(); } }).observe(document.body);
  const frozen = document.getElementById("frozen");
  if (frozen) {
    live.snap = JSON.parse(frozen.textContent);
    live.snap.events.forEach(keep);
    document.getElementById("live").className = "live";
    say("live-text", `as of ${live.snap.at.replace("T", " ").replace("Z", " UTC")}`);
    show();
    return;
  }
  look().then(follow);
  setTimeout(ask, EVERY_MS);
}

begin();
