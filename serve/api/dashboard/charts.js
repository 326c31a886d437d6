// Charts of the last half hour, minute by minute, and meters of evidence. All charts of the page have one scale.

import { count, counted, decimal, make, seconds } from "/dashboard/dom.js";

const MINUTES = 30, WIDE = 250, LEFT = 42, TOP = 8, HIGH = 58, BOTTOM = 80;
const STEP = (WIDE - LEFT) / MINUTES;

// 1, 2 or 5 times a power of ten that is no smaller.
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}

// An outlier does not flatten the others: it is cut at the axis, and says so.
const ENOUGH = 5, OUTLIER = 4;
function top(values, least) {
  const seen = values.filter((value) => value > 0).sort((one, other) => one - other);
  const most = seen.at(-1) ?? 0, usual = seen[Math.floor(0.9 * (seen.length - 1))] ?? 0;
  return rounded(Math.max(least, seen.length >= ENOUGH && most > OUTLIER * usual ? 1.5 * usual : most));
}

// The upper ends of both axes, over every version that is drawn.
export function scales(cards) {
  const drawn = cards.flatMap((card) => card.versions.map((version) => version.recent)).filter(Boolean);
  return {
    requests: top(drawn.flatMap((recent) => recent.requests), 4),
    first: top(drawn.flatMap((recent) => recent.first_token_p95), 0.1),
  };
}

function axes(most, label) {
  const drawn = make("g", { class: "axes", "aria-hidden": "true" });
  for (const part of [0, 0.5, 1]) {
    const y = TOP + HIGH * (1 - part);
    drawn.append(make("line", { x1: LEFT, x2: WIDE, y1: y, y2: y }));
    drawn.append(make("text", { x: LEFT - 4, y: y + 3, "text-anchor": "end" }, label(part * most)));
  }
  for (const [minute, text, anchor] of [[0, "−30 min", "start"], [15, "−15 min", "middle"], [30, "now", "end"]]) {
    drawn.append(make("text", { x: LEFT + minute * STEP, y: BOTTOM, "text-anchor": anchor }, text));
  }
  return drawn;
}

const clock = (recent, minute) => new Date((recent.from + 60 * minute) * 1000).toLocaleTimeString(undefined, { timeStyle: "short" });

// `over` is what a bar says that goes beyond the axis.
function bar(minute, low, high, kind, title, over = "") {
  if (high > 1.000001) return make("g", { class: "over" }, bar(minute, Math.min(low, 0.9), 1, kind, title), beyond(minute, over, title));
  const tall = Math.max(1.5, HIGH * (high - low));
  const y = Math.min(TOP + HIGH * (1 - high), TOP + HIGH - tall);
  return make("rect", { x: LEFT + minute * STEP + 0.8, y, width: STEP - 1.6, height: tall, class: kind }, make("title", {}, title));
}

function beyond(minute, text, title) {
  const x = LEFT + (minute + 0.5) * STEP, right = minute > MINUTES / 2;
  return make("g", {}, make("title", {}, title),
    make("polygon", { points: `${x - 3},${TOP - 1} ${x + 3},${TOP - 1} ${x},${TOP - 7}` }),
    make("text", { x: right ? x - 5 : x + 5, y: TOP - 1, "text-anchor": right ? "end" : "start" }, text));
}

function figure(caption, label, ...drawn) {
  return make("figure", {},
    make("figcaption", {}, caption),
    make("svg", { viewBox: `0 0 ${WIDE} ${BOTTOM + 4}`, role: "img", "aria-label": label }, ...drawn));
}

export function requestsChart(recent, scale) {
  const all = recent.all, bars = [];
  recent.requests.forEach((requests, minute) => {
    if (!requests) return;
    const errors = recent.errors[minute];
    const title = `${clock(recent, minute)}: ${counted(requests, "request")}, ${errors} failed`;
    bars.push(bar(minute, 0, requests / scale.requests, "", title, count(requests)));
    if (errors) bars.push(bar(minute, 0, Math.min(1, errors / scale.requests), "bad", title));
  });
  const label = `Requests a minute, the last 30 minutes: ${counted(all.requests, "request")}, ${all.errors} failed, `
    + `at most ${Math.max(...recent.requests)} in a minute`;
  return figure("Requests a minute", label, axes(scale.requests, (value) => decimal(value, 1)), ...bars);
}

export function firstTokenChart(recent, scale) {
  const all = recent.all, bars = [];
  recent.first_token_p95.forEach((p95, minute) => {
    if (p95 == null) return;
    const p50 = recent.first_token_p50[minute];
    const title = `${clock(recent, minute)}: half of the first tokens within ${seconds(p50)}, 95 % within ${seconds(p95)}`;
    bars.push(bar(minute, Math.min(p50, p95 * 0.999) / scale.first, p95 / scale.first, "", title, seconds(p95)));
  });
  const label = all.answers ? `Time to the first token, the last 30 minutes: half within ${seconds(all.first_token_p50)}, `
    + `95 % within ${seconds(all.first_token_p95)}, of ${counted(all.answers, "answer")}` : "Time to the first token: not measured";
  return figure("First token: median to 95 % quantile", label, axes(scale.first, seconds), ...bars);
}

// What the numbers are of, in words.
export function traffic(recent) {
  if (!recent) return make("p", { class: "note" }, "No requests in the last 30 minutes.");
  const all = recent.all;
  const parts = [`${counted(all.requests, "request")} in 30 min`];
  if (all.errors) parts.push(`${count(all.errors)} failed`);
  if (all.answers) {
    parts.push(`first token of ${counted(all.answers, "answer")}: 50 % within ${seconds(all.first_token_p50)}, `
      + `95 % within ${seconds(all.first_token_p95)}`);
  }
  if (all.inter_token_p95 != null) parts.push(`mean between tokens: 95 % of the answers within ${seconds(all.inter_token_p95)}`);
  return make("p", { class: "note" }, parts.join(" · "));
}

// Evidence against what it takes: the right end is the threshold.
export function meter(label, part, kind = "", text = "") {
  const level = Math.max(0, Math.min(1, part || 0));
  return make("div", { class: "metered" },
    make("svg", {
      class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "meter", "aria-label": label,
      "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * level), "aria-valuetext": text || null,
    },
    make("rect", { class: "track", width: 100, height: 6 }),
    make("rect", { class: `level ${kind}`, width: 100 * level, height: 6 })));
}

// A score from 0 to 1 with the range that it lies in.
export function interval(label, score, low, high) {
  return make("svg", { class: "interval", viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img", "aria-label": label },
    make("rect", { class: "track", y: 3, width: 100, height: 2 }),
    make("rect", { class: "range", x: 100 * low, y: 1, width: Math.max(1, 100 * (high - low)), height: 6 }),
    make("rect", { class: "score", x: Math.max(0, Math.min(98.5, 100 * score - 0.75)), width: 1.5, height: 8 }));
}
