/* One function per panel: what a snapshot says, drawn and in words. See cli/board_data.py for the
   snapshot's form. Not here: how it is fetched (board.js), pictures (planes.js). */
"use strict";

const GONE = new Set(["left", "revoked"]);
const ABSENT = new Set(["away", "left", "revoked", "unknown"]);
const chosen = { metric: "" };

/** Everybody, sorted by id, so that a hospital has the same colour in every panel and everywhere. */
function everybody(snap) {
  const all = (snap.peers || []).map((peer) => ({ id: peer.peer_id, name: peer.name, state: peer.state, peer }));
  if (snap.status) all.push({ id: snap.status.peer_id, name: snap.status.name, state: snap.status.present === false ? "left" : "here", own: true });
  all.sort((a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0));
  all.forEach((one, index) => { one.index = index; });
  return all;
}

function isHollow(one) { return ABSENT.has(one.state); }
function named(one) { return one.own ? `${one.name} (here)` : one.name; }
function wide(id) { return Math.max(260, Math.floor(document.getElementById(id).clientWidth || 600)); }
function say(id, text) { document.getElementById(id).textContent = text; }
function nameCell(one) { return el("th", { scope: "row", class: one.own ? "own" : null, title: one.id }, chip(one.index, isHollow(one)), named(one)); }

function paint(snap) {
  const all = everybody(snap);
  header(snap);
  tiles(snap, all);
  metric(snap, all);
  privacy(snap);
  topology(snap, all);
  agreement(snap, all);
  traffic(snap, all);
  strip(snap, all);
  peers(snap, all);
  events(snap, all);
}

// --- header and tiles -----------------------------------------------------------------------------

function header(snap) {
  const { status } = snap;
  if (!status) return;
  const { run } = status;
  const network = (status.network && status.network.name) || "no network yet";
  document.title = `${status.name} · ${run ? run.name : network} · p2pfed`;
  say("title", `${status.name} in ${network}`);
  say("subtitle", run ? `Run ${run.name}, task ${run.task}. This hospital is up for ${span(status.uptime_s)}.` : "No run is accepted here yet: p2pfed run list");
  put("health", ...(status.health || []).map((line) => el("li", null, line)));
  say("foot", `p2pfed ${status.version}. Looked at ${snap.at.replace("T", " ").replace("Z", " UTC")}. ${snap.frozen ? "A frozen report: nothing on this page changes." : "This page only reads; it is served on this machine alone."}`);
}

function tile(name, big, small, sub, extra) {
  return el("div", { class: `tile${extra && extra.alarm ? " alarm" : ""}` },
    el("dt", null, name),
    el("dd", { class: "big" }, big, small ? el("small", null, ` ${small}`) : null),
    extra && extra.bar ? el("dd", null, el("progress", { max: extra.bar[1], value: extra.bar[0], "aria-label": `${name}: ${extra.bar[0]} of ${extra.bar[1]}` })) : null,
    el("dd", { class: "sub" }, sub));
}

const PHASES = { waiting: "waiting for peers", folding: "adding up what arrived", training: "training", gathering: "waiting for the others' changes", finished: "finished" };

function tiles(snap, all) {
  const { status } = snap;
  if (!status) return;
  const { run } = status;
  const counts = status.peers || {};
  const rest = Object.entries(counts).filter(([state, n]) => n && state !== "alive").map(([state, n]) => `${n} ${state}`);
  const own = ownMetric(snap);
  const spent = status.privacy || {};
  const agreed = agreementOf(snap, all);
  const sharing = run && run.phase === "finished" ? PHASES.finished : status.contributing && !status.contributing.yes ? `not contributing: ${status.contributing.reason || "sharing is off"}` : (PHASES[run && run.phase] || (run && run.phase) || "");
  put("tiles",
    run ? tile("Round", run.round, `of ${run.rounds}`, sharing, { bar: [run.round, run.rounds] }) : tile("Round", "–", "", "no run"),
    tile("Peers", counts.alive || 0, "alive", rest.join(" · ") || "nobody is away"),
    tile(own.name || "Measure", own.value === null ? "–" : number(own.value, 3), "here", own.value === null ? own.words : `${own.words} · after round ${own.round}`),
    privacyTile(spent, run),
    tile("Same model", agreed.comparable ? `${agreed.same} of ${agreed.comparable}` : "–", agreed.comparable ? "peers" : "", agreed.words, { alarm: agreed.differ > 0 }),
    tile("Traffic", `↑ ${bytes(status.traffic.sent_bytes)}`, "", `↓ ${bytes(status.traffic.received_bytes)}${status.relay && status.relay.relayed_bytes ? ` · ${bytes(status.relay.relayed_bytes)} passed on for others` : ""}`));
}

function privacyTile(spent, run) {
  if (!spent.mechanism) return tile("Privacy", "–", "", "nothing is released yet");
  if (spent.mechanism === "none") return tile("Privacy", "none", "", "updates leave this hospital unprotected", { alarm: true });
  const forecast = spent.forecast_round === null || spent.forecast_round === undefined ? `${spent.releases} releases` : run && spent.forecast_round >= run.rounds ? "lasts to the end of the run" : `stops by itself at round ≈ ${spent.forecast_round}`;
  return tile("Privacy spent", `ε ${number(spent.spent_epsilon, 3)}`, `of ${number(spent.epsilon, 3)}`, forecast, { bar: [Math.min(spent.spent_epsilon, spent.epsilon), spent.epsilon] });
}

// --- measures -------------------------------------------------------------------------------------

/** Names of measures, first those that most hospitals show: a tab that nobody else fills comes last. */
function metricNames(snap) {
  const own = snap.private ? [...new Set(snap.private.metrics.flatMap((line) => Object.keys(line.values)))] : [];
  const told = [...own, ...Object.keys(snap.measures || {}).flatMap((id) => sharedBy(snap, id))];
  const many = (name) => told.filter((one) => one === name).length;
  return [...new Set(told)].sort((a, b) => many(b) - many(a));
}

/** Names of the measures that a peer shares. */
function sharedBy(snap, id) { return [...new Set(((snap.measures || {})[id] || []).map((one) => one[2]))]; }

/** Who is not in the chart of a measure, and why, in words; "" where all are. */
function whoIsMissing(snap, told) {
  const list = (many) => many.map((one) => cut(one.name, 24)).join(", ");
  const [own, others] = [told.filter((one) => one.own), told.filter((one) => !one.own)].map((many) => many.filter((one) => !one.points.length));
  const elsewhere = others.filter((one) => sharedBy(snap, one.id).length), nowhere = others.filter((one) => !elsewhere.includes(one));
  const parts = [];
  if (elsewhere.length) parts.push(`${list(elsewhere)} ${elsewhere.length === 1 ? "does" : "do"} not share this one, but ${[...new Set(elsewhere.flatMap((one) => sharedBy(snap, one.id)))].join(", ")}`);
  if (nowhere.length) parts.push(`${list(nowhere)} ${nowhere.length === 1 ? "shares" : "share"} none`);
  if (own.length && snap.private) parts.push(`${list(own)} does not measure it`);
  return parts.length ? `– : ${parts.join("; ")}.` : "";
}

function metricName(snap) {
  const names = metricNames(snap);
  return names.includes(chosen.metric) ? chosen.metric : (names[0] || "");
}

function ownMetric(snap) {
  const name = metricName(snap);
  if (!snap.private) return { name: "Measure", value: null, round: null, words: snap.frozen ? "left out of this report" : "you may not read it here" };
  const line = [...snap.private.metrics].reverse().find((one) => name in one.values);
  const alone = snap.private.alone ? snap.private.alone[name] : undefined;
  if (!line) return { name: name || "Measure", value: null, round: null, words: "nothing is measured yet" };
  const words = alone === undefined ? "on this hospital's own test patients" : `alone ${number(alone)}`;
  return { name, value: line.values[name], round: line.round, words };
}

function metric(snap, all) {
  const name = metricName(snap);
  const names = metricNames(snap);
  const buttons = names.length > 1 ? names.map((one) => el("button", { type: "button", "aria-pressed": String(one === name), "data-metric": one }, one)) : [];
  put("metric-names", ...buttons);
  const told = all.map((one) => {
    const of = one.own ? (snap.private ? snap.private.metrics.filter((l) => name in l.values).map((l) => [l.round, l.values[name]]) : [])
      : ((snap.measures || {})[one.id] || []).filter((m) => m[2] === name).map((m) => [m[0], m[1]]);
    return { ...one, points: of.filter((p) => Number.isFinite(p[0]) && Number.isFinite(p[1])) };
  });
  const shown = told.filter((one) => one.points.length);
  const alone = snap.private && snap.private.alone ? snap.private.alone[name] : undefined;
  const own = shown.find((one) => one.own);
  const parts = [];
  if (name) parts.push(`${name}, on each hospital's own test patients.`);
  if (!snap.private) parts.push(snap.frozen ? "This hospital's own measures are left out of this report." : "This hospital's own measures are on the trainer's private socket, which you may not read.");
  else if (own && alone !== undefined) parts.push(`The dotted line is a model trained on this hospital's patients alone: ${number(alone)}.`);
  if (own && shown.some((one) => !one.own && one.points[0][0] > own.points[0][0])) parts.push("Others tell their newest value only: their lines begin with this page.");
  if (shown.length) parts.push(whoIsMissing(snap, told));
  say("say-metric", parts.join(" "));
  if (!shown.length) {
    put("metric", empty(names.length ? "Nothing is measured yet." : "No measure is shown: hospitals keep theirs unless their policy releases it."));
    put("table-metric");
    return;
  }
  const ys = shown.flatMap((one) => one.points.map((p) => p[1])).concat(alone === undefined ? [] : [alone]);
  const xs = shown.flatMap((one) => one.points.map((p) => p[0]));
  const low = Math.min(...ys), high = Math.max(...ys), pad = (high - low) * 0.08 || 0.05;
  put("metric", lines({
    width: wide("metric"), height: 260, x: [Math.min(...xs), Math.max(...xs)], y: [low - pad, high + pad],
    label: `${name} over rounds of ${shown.map(named).join(", ")}`,
    refs: alone === undefined ? [] : [{ y: alone, name: `alone ${number(alone, 3)}` }],
    series: shown.map((one) => ({ name: `${number(one.points[one.points.length - 1][1], 3)} ${one.name}`, index: one.index, own: one.own, points: one.points })),
  }));
  const rounds = [...new Set(xs)].sort((a, b) => b - a).slice(0, 100);
  put("table-metric", table(["round", ...told.map((one) => cut(named(one), 20))], rounds.map((r) => [r, ...told.map((one) => { const hit = one.points.find((p) => p[0] === r); return hit ? number(hit[1]) : "–"; })])));
}

// --- privacy --------------------------------------------------------------------------------------

function privacy(snap) {
  const spent = (snap.status && snap.status.privacy) || {};
  const run = snap.status && snap.status.run;
  if (!spent.mechanism || spent.mechanism === "none") {
    say("say-privacy", spent.mechanism === "none" ? "Mechanism none: nothing protects the patients whose updates leave this hospital." : "");
    put("privacy", empty(spent.mechanism ? "There is no budget in this run." : "Nothing is released yet."));
    put("table-privacy");
    return;
  }
  const words = [`Mechanism ${spent.mechanism}, per ${spent.unit || "unit"}: ε ${number(spent.spent_epsilon, 3)} of ${number(spent.epsilon, 3)} after ${plural(spent.releases, "release")} (δ ${number(spent.delta)}).`];
  const known = ((snap.history && snap.history.history) || []).filter((line) => typeof line.epsilon === "number").map((line) => [line.round, line.epsilon]);
  const now = run ? run.round : 0;
  const points = known.length ? [...known] : [[now, spent.spent_epsilon]];
  const [lastRound, lastSpent] = points[points.length - 1];
  const forecast = spent.forecast_round;
  const paths = [{ kind: "spent", points: points[0][0] > 0 && known.length && known[0][0] <= 1 ? [[0, 0], ...points] : points }];
  let end = Math.max(lastRound, now, 1);
  if (typeof forecast === "number" && forecast > lastRound) {
    const rate = lastSpent / Math.max(1, spent.releases);
    const reach = Math.min(spent.epsilon, lastSpent + rate * (forecast - lastRound));
    paths.push({ kind: "forecast", name: `round ${forecast}`, points: [[lastRound, lastSpent], [forecast, reach]] });
    end = forecast;
    words.push(run && forecast >= run.rounds ? "At this rate it lasts to the end of the run (dashed)." : `At this rate releasing ends at round ≈ ${forecast} (dashed); receiving goes on.`);
  }
  say("say-privacy", words.join(" "));
  const refs = [{ y: spent.epsilon, name: `limit ${number(spent.epsilon, 3)}`, kind: "limit" }];
  if (typeof spent.run_epsilon === "number" && Math.abs(spent.run_epsilon - spent.epsilon) > 0.02 * spent.epsilon) refs.push({ y: spent.run_epsilon, name: `this run ${number(spent.run_epsilon, 3)}` });
  put("privacy", lines({
    width: wide("privacy"), height: 260, x: [0, end], y: [0, 1.05 * Math.max(...refs.map((r) => r.y), lastSpent)], right: 118,
    label: `Privacy spent over rounds: epsilon ${number(spent.spent_epsilon, 3)} of ${number(spent.epsilon, 3)}`,
    refs, paths, series: [],
  }));
  put("table-privacy", table(["round", "ε spent"], points.slice(-100).reverse().map(([r, e]) => [r, number(e)])));
}

// --- connections ----------------------------------------------------------------------------------

function topology(snap, all) {
  const others = all.filter((one) => !one.own);
  const own = all.find((one) => one.own);
  if (!own || !others.length) { put("topology", empty("No other member is known yet.")); say("say-topology", ""); put("table-topology"); return; }
  const width = wide("topology"), height = Math.max(250, Math.min(340, width * 0.62));
  const cx = width / 2, cy = height / 2, rx = Math.max(50, width / 2 - 108), ry = height / 2 - 40;
  const place = new Map([[own.id, [cx, cy]]]);
  const half = others.length % 2 ? 0 : 0.5; // nobody straight below, where our own name stands
  others.forEach((one, i) => { const turn = ((i + half) / others.length) * 2 * Math.PI - Math.PI / 2; place.set(one.id, [cx + rx * Math.cos(turn), cy + ry * Math.sin(turn)]); });
  const moved = (one) => (one.peer.sent_bytes || 0) + (one.peer.received_bytes || 0);
  const most = Math.max(1, ...others.map(moved));
  const links = [], marks = [], relayed = [];
  for (const one of others) {
    const [x, y] = place.get(one.id);
    const through = /^relay (.*)$/.exec(one.peer.path || "");
    const relay = through && others.find((other) => other.name === through[1]);
    const thick = (1 + 8 * Math.sqrt(moved(one) / most)).toFixed(1);
    const title = sv("title", null, `${one.name}: ${bytes(moved(one))}, ${one.peer.path || "no connection"}`);
    if (through) {
      relayed.push(one.name);
      const [mx, my] = relay ? place.get(relay.id) : [cx, cy];
      const bend = relay ? `Q${(mx * 0.8 + cx * 0.2).toFixed(1)} ${(my * 0.8 + cy * 0.2).toFixed(1)}` : "L";
      links.push(sv("path", { class: `link c${one.index % COLOURS}`, d: `M${x.toFixed(1)} ${y.toFixed(1)}${bend === "L" ? "" : bend} ${bend === "L" ? `L${cx} ${cy}` : `${cx.toFixed(1)} ${cy.toFixed(1)}`}`, "stroke-width": thick, "stroke-dasharray": "7 5" }, title));
    } else if (one.peer.path) {
      links.push(sv("line", { class: `link c${one.index % COLOURS}`, x1: cx, y1: cy, x2: x, y2: y, "stroke-width": thick }, title));
    }
  }
  for (const one of all) {
    const [x, y] = place.get(one.id);
    marks.push(shape(one.index, x, y, one.own ? 12 : 9, { class: `${isHollow(one) ? "hollow" : "dot"} c${one.index % COLOURS}` }));
    const side = one.own ? 0 : Math.sign(Math.round((x - cx) / (rx / 3)));
    const below = one.own || (!side && y > cy);
    const anchor = side > 0 ? "start" : side < 0 ? "end" : "middle";
    const dx = 15 * side, dy = side ? 4 : one.own ? 32 : below ? 27 : -16;
    marks.push(sv("text", { class: `halo${one.own ? " strong" : ""}`, x: x + dx, y: y + dy, "text-anchor": anchor }, cut(one.name, side ? 12 : 18), sv("title", null, one.name)));
    if (!one.own && one.state !== "alive") marks.push(sv("text", { class: "dim halo", x: x + dx, y: y + dy + (side || below ? 14 : -14), "text-anchor": anchor }, one.state));
  }
  put("topology", drawing(width, height, `${own.name} and ${plural(others.length, "other member")}`, ...links, ...marks));
  say("say-topology", `Wider: more bytes. Hollow: away or left.${relayed.length ? ` Dashed: through a relay (${relayed.map((n) => cut(n, 20)).join(", ")}).` : ""}`);
  put("table-topology", table(["hospital", "state", "path", "bytes"], others.map((one) => [nameCell(one), one.state, one.peer.path || "–", bytes(moved(one))])));
}

// --- agreement ------------------------------------------------------------------------------------

/** Whether a peer holds the model that this node holds, or held when it was at the peer's round. A hash
    of an earlier round that differs proves nothing: late changes make both compute it anew. */
function stand(one, run, hashes) {
  if (!run || !run.model_hash || !one.peer.model_hash || ABSENT.has(one.state)) return "unknown";
  if (one.peer.model_round !== run.model_round) return hashes.get(one.peer.model_round) === one.peer.model_hash ? "same" : "other round";
  return one.peer.model_hash === run.model_hash ? "same" : "differs";
}

function hashesOf(snap) {
  return new Map(((snap.history && snap.history.history) || []).filter((line) => line.model_hash).map((line) => [line.round, line.model_hash]));
}

function agreementOf(snap, all) {
  const run = snap.status && snap.status.run, hashes = hashesOf(snap);
  const stands = all.filter((one) => !one.own).map((one) => stand(one, run, hashes));
  const same = stands.filter((s) => s === "same").length, differ = stands.filter((s) => s === "differs").length;
  const words = differ ? `${differ} at this round differ` : same ? "at their round, bit by bit" : "no peer is at this round just now";
  return { same, differ, comparable: same + differ, words: run && run.meetings ? "pairwise: models only come close" : words };
}

function agreement(snap, all) {
  const run = snap.status && snap.status.run, hashes = hashesOf(snap);
  const marks = { same: ["✓ same", "well"], differs: ["≠ another", "badly"], "other round": [null, "muted"], unknown: ["–", "muted"] };
  put("agreement", ...all.filter((one) => !one.own).map((one) => {
    const how = stand(one, run, hashes), [text, cls] = marks[how];
    const at = how === "same" && one.peer.model_round !== run.model_round ? `, round ${one.peer.model_round}` : "";
    return el("li", null, el("span", { class: "name", title: one.name }, chip(one.index, isHollow(one)), one.name), el("span", { class: `how ${cls}` }, text ? text + at : `of round ${one.peer.model_round}`));
  }));
  if (!run || !run.model_hash) { say("say-agreement", "There is no model yet."); return; }
  let text = `Here: ${run.model_hash.slice(0, 12)}, after round ${run.model_round}.`;
  if (run.meetings) text += ` Pairwise averaging: models come close and are never equal; ${plural(run.meetings.begun, "meeting")} begun here, ${run.meetings.failed} failed.`;
  if (run.meetings && typeof run.consensus_distance === "number") text += ` Distance between models: ${number(run.consensus_distance, 3)}.`;
  say("say-agreement", text);
}

// --- bytes ----------------------------------------------------------------------------------------

function traffic(snap, all) {
  const others = all.filter((one) => !one.own && (one.peer.sent_bytes || one.peer.received_bytes));
  if (!others.length) { put("bytes", empty("Nothing was sent or received yet.")); say("say-bytes", ""); put("table-bytes"); return; }
  others.sort((a, b) => b.peer.sent_bytes + b.peer.received_bytes - a.peer.sent_bytes - a.peer.received_bytes);
  const shown = others.slice(0, 16), width = wide("bytes"), row = 40, height = shown.length * row + 4;
  const most = Math.max(...shown.map((one) => Math.max(one.peer.sent_bytes, one.peer.received_bytes)));
  const room = width - 78, out = [];
  shown.forEach((one, i) => {
    const y = i * row, cls = `c${one.index % COLOURS}`;
    out.push(shape(one.index, 6, y + 8, 4.5, { class: `${isHollow(one) ? "hollow" : "dot"} ${cls}` }), sv("text", { x: 16, y: y + 12 }, cut(one.name, Math.floor(width / 9)), sv("title", null, one.name)));
    for (const [j, key, kind, arrow] of [[0, "sent_bytes", "bar-sent", "↑"], [1, "received_bytes", "bar-received", "↓"]]) {
      const long = Math.max(1.5, (one.peer[key] / most) * room);
      out.push(sv("rect", { class: `${kind} ${cls}`, x: 1, y: y + 17 + j * 9.5, width: long, height: 7, rx: 1 }), sv("text", { class: "dim", x: long + 7, y: y + 24.5 + j * 9.5 }, `${arrow} ${bytes(one.peer[key])}`));
    }
  });
  put("bytes", drawing(width, height, `Bytes sent to and received from ${plural(shown.length, "peer")}`, ...out));
  say("say-bytes", `Filled: sent. Hollow: received.${others.length > shown.length ? ` The ${shown.length} busiest of ${others.length}.` : ""}`);
  put("table-bytes", table(["hospital", "sent", "received"], others.map((one) => [nameCell(one), bytes(one.peer.sent_bytes), bytes(one.peer.received_bytes)])));
}

// --- rounds by hospital ---------------------------------------------------------------------------

function strip(snap, all) {
  const told = snap.history, rounds = ((told && told.history) || []).filter((line) => line.round < told.rounds);
  if (!rounds.length) { put("strip", empty(told === null ? "The daemon is older than this page and tells no history." : "No round has begun yet.")); say("say-strip", ""); put("table-strip"); return; }
  const width = wide("strip"), names = Math.min(150, Math.max(86, width * 0.2)), size = width < 500 ? 9 : 12, gap = 2, row = size + 9;
  const shown = rounds.slice(-Math.max(8, Math.floor((width - names - 4) / (size + gap))));
  const training = all.filter((one) => one.own || !one.peer.roles || !one.peer.roles.length || one.peer.roles.includes("train"));
  const place = new Map(told.members.map((id, i) => [id, i]));
  const took = (line, one) => (told.history[0] && line.meetings !== undefined && one.own) || line.origins.includes(place.get(one.id));
  const out = [], rows = [];
  training.forEach((one, i) => {
    const y = i * row + 4, cls = `c${one.index % COLOURS}`;
    out.push(shape(one.index, 6, y + size / 2, 4.2, { class: `${isHollow(one) ? "hollow" : "dot"} ${cls}` }), sv("text", { class: one.own ? "strong" : null, x: 17, y: y + size / 2 + 4 }, cut(one.name, Math.floor((names - 20) / 7)), sv("title", null, one.name)));
    const part = rounds.filter((line) => took(line, one));
    const first = part.length ? part[0].round : Infinity, last = part.length ? part[part.length - 1].round : -1;
    shown.forEach((line, j) => {
      const x = names + j * (size + gap), title = (text) => sv("title", null, `${one.name}, round ${line.round}: ${text}`);
      if (took(line, one)) out.push(sv("rect", { class: `cell ${cls}`, x, y, width: size, height: size, rx: 2 }, title("contributed")));
      else if (line.round === told.round && !isHollow(one)) out.push(sv("rect", { class: `cell-now ${cls}`, x: x + 0.7, y: y + 0.7, width: size - 1.4, height: size - 1.4, rx: 2 }, title("not yet")));
      else if (GONE.has(one.state) && line.round > last) out.push(sv("line", { class: "cell-left", x1: x + 1, x2: x + size - 1, y1: y + size / 2, y2: y + size / 2 }, title(one.state)));
      else if (line.round < first) out.push(sv("circle", { class: "cell-none", cx: x + size / 2, cy: y + size / 2, r: 1.6 }, title("not there yet")));
      else out.push(sv("rect", { class: "cell-off", x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, rx: 2 }, title("absent")));
    });
    rows.push([nameCell(one), part.length, rounds.length, part.length ? last : "–"]);
  });
  const base = training.length * row + 14;
  const every = Math.max(1, Math.ceil(shown.length / Math.max(2, Math.floor(width / 90))));
  shown.forEach((line, j) => { if (j % every === 0) out.push(sv("text", { class: "dim", x: names + j * (size + gap) + size / 2, y: base, "text-anchor": "middle" }, line.round)); });
  put("strip", drawing(width, base + 6, `Rounds ${shown[0].round} to ${shown[shown.length - 1].round} by hospital`, ...out));
  const seconds = rounds.map((line) => line.seconds).filter((s) => typeof s === "number").slice(-20).sort((a, b) => a - b);
  say("say-strip", `Filled: contributed. Hollow: absent. Dash: left. Dot: not there yet.${seconds.length ? ` A round takes ${span(seconds[Math.floor(seconds.length / 2)])} (median of the last ${seconds.length}).` : ""}`);
  put("table-strip", table(["hospital", "rounds contributed", "of", "last"], rows));
}

// --- peers and events -----------------------------------------------------------------------------

function peers(snap, all) {
  const others = all.filter((one) => !one.own);
  if (!others.length) { put("peers", empty("No other member is known yet.")); return; }
  const run = snap.status && snap.status.run, hashes = hashesOf(snap);
  const shared = new Set(others.filter((one) => one.peer.measure).map((one) => one.peer.measure.name));
  const measureOf = ({ measure }) => !measure ? "–" : shared.size > 1 ? `${measure.name} ${number(measure.value)}` : number(measure.value);
  const modelOf = (one) => { const s = stand(one, run, hashes); return s === "same" ? el("td", { class: "well" }, "✓ same") : s === "differs" ? el("td", { class: "badly" }, "≠ differs") : el("td", null, s === "other round" ? `of ${one.peer.model_round}` : "–"); };
  put("peers", table(["hospital", "state", "round", "round trip", "path", "sent", "received", "model", shared.size === 1 ? cut([...shared][0], 16) : "measure", "last heard"], others.map((one) => {
    const { peer } = one;
    return [nameCell(one), el("td", { class: one.state === "alive" ? "well" : ABSENT.has(one.state) ? "badly" : null }, peer.blocked ? `${one.state}, blocked` : one.state), peer.round ?? "–",
      typeof peer.rtt_ms === "number" ? `${number(peer.rtt_ms, 3)} ms` : "–", el("td", { title: peer.path }, cut(peer.path || "–", 16)), bytes(peer.sent_bytes), bytes(peer.received_bytes), modelOf(one),
      measureOf(peer), typeof peer.seen_s === "number" ? `${span(peer.seen_s)} ago` : "–"];
  })));
}

const HAPPENED = {
  "peer.alive": "{name} is here", "peer.suspect": "{name} is not heard of", "peer.away": "{name} is away", "peer.left": "{name} has left", "peer.unheard": "{name} is not heard of",
  "peer.joined": "{name} joined", "peer.revoked": "{name} was revoked", "peer.equivocated": "a member signed two changes for round {round}", "peer.differs": "{name} holds another model of round {round}",
  "round.started": "round {round} began", "round.finished": "round {round} ended", "round.skipped_to": "went on to round {round}, where the others are", "model.folded": "the model after round {round} is here",
  "delta.released": "released a change for round {round} ({bytes} bytes)", "change.released": "released a change for round {round}", "privacy.spent": "ε {spent_epsilon} spent after {releases} releases",
  "privacy.exhausted": "the privacy budget is used up: {reason}", "privacy.rollback": "the ledger is older than what was released", "release.withheld": "a release of round {round} was withheld",
  "sharing.on": "sharing is on", "sharing.off": "sharing is off", "roster.updated": "roster version {version} is in force", "roster.rejected": "a roster was refused: {reason}",
  "run.started": "run {run} began here", "run.accepted": "run {run} was accepted", "run.finished": "the run is finished", "run.rejected": "a run was refused: {reason}", "node.ready": "this node is ready", "node.joined": "this node joined",
  "node.left": "this node left", "node.stopping": "this node stops", "task.paused": "training is paused", "task.resumed": "training goes on", "training.failed": "training failed in round {round}: {reason}",
};
const GRAVE = /exhausted|rollback|equivocated|differs|rejected|failed|revoked|refused|blamed|withheld/;

function sentence(event, all) {
  const data = { ...event.data };
  if (!data.name && data.peer) { const one = all.find((known) => known.id === data.peer); data.name = one ? one.name : cut(data.peer, 16); }
  if (event.type === "privacy.spent" && data.spent_epsilon === 0) return `${plural(data.releases, "release")} without protection`;
  const form = HAPPENED[event.type];
  if (form) return form.replace(/\{(\w+)\}/g, (_, key) => { const v = data[key]; return typeof v === "number" ? number(v) : v === undefined || v === null ? "?" : String(v); });
  const rest = Object.entries(event.data || {}).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`);
  return [event.type, ...rest].join("  ");
}

function events(snap, all) {
  const newest = [...(snap.events || [])].sort((a, b) => b.seq - a.seq).slice(0, 100);
  put("events", ...(newest.length ? newest.map((event) => el("li", null,
    el("time", { datetime: event.ts, title: event.ts }, String(event.ts).slice(11, 19)),
    el("span", { class: `what${GRAVE.test(event.type) ? " grave" : ""}`, title: `${event.type}, number ${event.seq}` }, sentence(event, all))))
    : [el("li", { class: "empty" }, "Nothing has happened yet.")]));
}
