// Loops: a row each, and below the open one its tries: what opened each, its steps, losses, gate, canary and answers.

import { meter } from "/dashboard/charts.js";
import { age, count, counted, decimal, make, percent, pill, when } from "/dashboard/dom.js";
import { lossesOf } from "/dashboard/jobs.js";

const ENDS = { promoted: "good", rejected: "warn", failed: "bad" };
// What belongs to a try in an adapter's history: the loop's own entries, which say `step: text`, and what others did.
const OTHERS = ["canary", "canary_end", "promote", "rollback"];
const CAUSES = ["drift", "golden_fell"];
const SLACK = 10; // the last step is written a moment after the try has its end

export const stoppedBy = (loop) => loop.stopped ?? loop.stopped_everywhere;

export function verbsOf(loop) {
  if (loop.stopped) return ["start"];
  if (loop.stopped_everywhere || !loop.phase) return [];
  if (loop.phase === "waiting") return ["run", "stop"];
  return [...loop.phase === "asking" ? ["approve"] : [], "reject", "stop"];
}

// Those that want a person come first, then those in a try.
const ORDER = (loop) => (loop.phase === "asking" ? 0 : loop.phase !== "waiting" ? 1 : 2);
export const inOrder = (loops) => [...loops].sort((one, other) => ORDER(one) - ORDER(other) || one.name.localeCompare(other.name));

export function loopRow(loop, opened, open) {
  const cell = (label, ...content) => make("td", { "data-label": label }, ...content), by = stoppedBy(loop);
  return make("tr", { "data-loop": loop.name },
    make("th", { scope: "row" }, loop.name),
    cell("Phase", by ? pill("stopped", "bad") : pill(loop.phase, loop.phase === "asking" ? "warn" : loop.phase === "waiting" ? "" : "good")),
    cell("For", loop.since ? age(Date.now() / 1000 - loop.since) : "–"),
    cell("Tries this month", `${count(loop.month.tries)} of ${count(loop.month.budget)}`),
    cell("Note", by ? `stopped by ${by}` : loop.note || (loop.on.length ? "–" : "off: its policy names nothing that opens a try")),
    make("td", {}, make("button", {
      type: "button", "aria-expanded": String(opened), "aria-label": `Details of the loop of ${loop.name}`, click: open,
    }, "Details")));
}

// `at` is the number of the try that is open, `events` those of its job; `on` has what the buttons within do, `compared`
// what a comparison of answers came to, by version.
export function loopCard(loop, { history, at, events, compared }, on, buttons) {
  return make("article", { class: "card", "data-card": loop.name },
    make("div", { class: "top" }, make("h3", {}, loop.name), make("span", { class: "space" }), ...buttons),
    make("p", { class: "note fold" }, facts(loop)),
    ...loop.tries.map((one) => one.try === at ? tryOpen(loop, one, history, events, compared, on) : tryShut(one, on)),
    loop.references.length > 0 && references(loop));
}

function facts(loop) {
  const { month } = loop;
  return [`on ${loop.on.join(", ") || "nothing"}`, `promotes ${loop.policy.promote === "ask" ? "with a person's yes" : "by itself"}`,
    `${count(month.tries)} of ${count(month.budget)} tries this month`,
    `${decimal(month.spent, 4)} of ${decimal(month.alpha, 4)} of its probability of error spent`,
    loop.failures ? `${count(loop.failures)} in a row came to nothing` : "",
    loop.not_before > Date.now() / 1000 ? `none before ${when(loop.not_before)}` : ""].filter(Boolean).join("; ");
}

const heading = (one) => make("p", {}, make("b", {}, `Try ${one.try}: `), pill(one.outcome ?? "goes on", ENDS[one.outcome] ?? ""),
  ` ${one.cause.kind}: ${one.cause.text}`);

function tryShut(one, on) {
  return make("section", { class: "trial", "data-try": one.try }, heading(one), make("div", {}, make("button", {
    type: "button", "aria-label": `Show try ${one.try}`, click: () => on.open(one.try),
  }, "Show")));
}

function tryOpen(loop, one, history, events, compared, on) {
  const candidate = one.candidate ? `v${one.candidate}` : "", report = compared.get(`${loop.name}@${candidate}`);
  const learned = one.data && `${counted(one.data.new, "new example")} and ${count(one.data.replayed)} old ones trained on, `
    + `${count(one.data.held_out)} held out; job ${one.job}`;
  return make("section", { class: "trial", "data-try": one.try }, heading(one),
    one.text && make("p", { class: one.outcome === "promoted" ? "" : "moved" }, one.text, one.by ? ` (${one.by})` : ""),
    steps(one, history),
    learned && make("p", { class: "note" }, learned),
    lossesOf(events),
    one.gate && gate(one, candidate),
    one.canary && make("p", {}, make("b", {}, "Canary: "), pill(one.canary.verdict, one.canary.verdict === "worse" ? "bad" : "good"), ` ${one.canary.reason}`),
    report && answers(report, one.live, candidate),
    candidate && one.outcome !== "promoted" && make("div", {}, make("button", {
      type: "button", "aria-label": `Compare answers of ${loop.name} ${candidate}`, click: () => on.compare(loop, one),
    }, "Compare answers")));
}

// From what opened it to what it came to.
function steps(one, history) {
  const until = one.ended == null ? Infinity : one.ended + SLACK;
  const cause = history.filter((entry) => CAUSES.includes(entry.what) && entry.when <= one.began && entry.from_version === one.live).at(-1);
  const mine = history.filter((entry) => (entry.what === "loop" || (OTHERS.includes(entry.what) && entry.who !== "loop"))
    && entry.when >= one.began && entry.when <= until);
  const opened = cause && ["drift", "ratings"].includes(one.cause.kind) ? [cause] : [], first = (opened[0] ?? mine[0])?.when;
  return make("ol", { class: "events", "aria-label": `Steps of try ${one.try}` }, ...[...opened, ...mine].map((entry) => {
    const [, step, text] = entry.what === "loop" ? /^(\w+): (.*)$/s.exec(entry.why) ?? [] : [];
    const said = text ?? (entry.what === "drift" ? entry.why.split(":")[0] : [entry.who && `by ${entry.who}`, entry.why].filter(Boolean).join(": "));
    return make("li", {}, make("span", { class: "muted" }, when(entry.when)),
      make("span", {}, make("b", {}, (step ?? entry.what).replaceAll("_", " ")),
        entry.when > first ? ` after ${age(entry.when - first)}: ${said}` : `: ${said}`));
  }));
}

function gate(one, candidate) {
  const names = ["Part", "Examples", `v${one.live}`, candidate, "Evidence", ""];
  return make("table", {}, make("caption", { class: "hidden" }, `Gate of try ${one.try}`),
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name || make("span", { class: "hidden" }, "Result"))))),
    make("tbody", {}, ...one.gate.parts.map((part) => gateRow(part, one.live, candidate))));
}

function gateRow(part, live, candidate) {
  const cell = (label, ...content) => make("td", { "data-label": label }, ...content);
  const name = [part.part === "new" ? "new traffic" : part.part, part.label].filter(Boolean).join(" ");
  const text = `${decimal(part.log_evidence)} of ${decimal(part.log_threshold)} (ln)`;
  return make("tr", {}, make("th", { scope: "row" }, name), cell("Examples", count(part.examples)),
    cell(`v${live}`, decimal(part.live, 3)), cell(candidate, decimal(part.candidate, 3)),
    cell("Evidence", meter(`Evidence: ${name}`, part.log_evidence / part.log_threshold, part.forgotten ? "bad" : "", text),
      make("span", { class: "note" }, text, part.guaranteed ? "" : "; no guarantee: too few cases")),
    cell("Result", pill(part.passed ? "passed" : part.forgotten ? "forgotten" : "not proved", part.passed ? "good" : "bad")));
}

function answers(report, live, candidate) {
  const cell = (label, text) => make("td", { "data-label": label }, text), names = ["Asked", `v${live}`, candidate, "Should have been"];
  return make("div", {}, make("p", {}, make("b", {}, "Answers: "),
    `${percent(report.agreement.exact ?? 0)} of ${counted(report.requests, "captured request")} are answered the same; those that differ most:`),
  make("table", {}, make("caption", { class: "hidden" }, `Answers of v${live} and ${candidate}`),
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...report.examples.map((one) => make("tr", {}, make("th", { scope: "row" }, one.asked), cell(names[1], one.other),
      cell(names[2], one.candidate), cell(names[3], one.correction ?? "–"))))));
}

function references(loop) {
  const cell = (label, text) => make("td", { "data-label": label }, text);
  return make("section", { class: "trial" }, make("p", {}, make("b", {}, "What later versions must not lose")),
    make("table", {}, make("caption", { class: "hidden" }, `References of ${loop.name}`),
      make("thead", {}, make("tr", {}, ...["Reference", "Examples", "Score", "Made"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...loop.references.map((one) => make("tr", {}, make("th", { scope: "row" }, one.label), cell("Examples", count(one.examples)),
        cell("Score", decimal(one.score, 3)), cell("Made", when(one.made)))))));
}
