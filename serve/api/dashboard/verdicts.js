// What statistics say, in sentences; the numbers themselves are shown on request.

import { meter } from "/dashboard/charts.js";
import { count, counted, decimal, fold, make, percent } from "/dashboard/dom.js";

// How a canary differs, by check: what is said when it is more and when it is less, and in what it is counted.
const RATIO = (effect) => [effect >= 1, `${decimal(100 * Math.abs(effect - 1), 0)} %`];
const RATE = (effect) => [effect >= 0, `${decimal(100 * Math.abs(effect), 0)} in 100 answers`];
const PLAIN = (effect) => [effect >= 0, decimal(Math.abs(effect), 2)];
const CHECKS = {
  inter_token: ["its tokens come slower", "its tokens come faster", RATIO],
  first_token: ["its first token comes later", "its first token comes sooner", RATIO],
  error: ["it fails more often", "it fails less often", RATE],
  mean_logprob: ["it is surer of its words", "it is less sure of its words", PLAIN],
  length: ["its answers are longer", "its answers are shorter", RATIO],
  ended_by_length: ["its answers are cut more often", "its answers are cut less often", RATE],
  refusal: ["it refuses more often", "it refuses less often", RATE],
  rating: ["it is rated better", "it is rated worse", PLAIN],
};
const SIGN = 0.25, STRONG = 0.6;

const part = (row, threshold) => Math.max(0, row.log_evidence ?? 0) / threshold;

// Evidence as odds: what a bettor against it would have made of 1.
export function odds(log, threshold) {
  const takes = `the ${count(round(threshold))} that it takes`;
  return log > 1.5 * threshold ? `far beyond ${takes}` : log > 0 ? `${count(round(log))} of ${takes}` : "none";
}
const round = (log) => Number(Math.exp(log).toPrecision(3));

// How a canary differs by one check.
export function difference(row) {
  const [more, less, unit] = CHECKS[row.check] ?? [`its ${row.check} is higher`, `its ${row.check} is lower`, PLAIN];
  if (row.effect == null) return "not measured yet";
  const [higher, amount] = unit(row.effect);
  return /^0( |$)/.test(amount) ? "no difference" : `${higher ? more : less} (by ${amount})`;
}

function strength(row, threshold) {
  const of = part(row, threshold);
  if (row.worse) return "worse";
  if (row.proved) return "proved no worse";
  if (row.effect == null) return "–";
  return of > STRONG ? "a strong sign that it is worse, not enough yet" : of > SIGN ? "a weak sign that it is worse" : "no more than chance so far";
}

export function canarySentence(report) {
  const name = `v${report.canary}`, live = `v${report.live}`, strongest = (rows) => rows.map(difference).join(", ");
  const worse = report.checks.filter((row) => row.worse);
  if (report.verdict === "worse") return `${name} is worse than ${live}: ${strongest(worse) || "the comparison says so"}.`;
  if (report.verdict === "proved") return `${name} is proved: it is no worse than ${live} by more than is tolerated. It can be promoted.`;
  if (!report.requests) return `${name} has just begun: no answers are compared yet.`;
  const suspect = report.checks.filter((row) => part(row, report.log_threshold) > STRONG);
  if (suspect.length) return `${name} may be worse than ${live}: ${strongest(suspect)}. That is not sure yet, after ${counted(report.requests, "request")}.`;
  return `${name} looks fine so far, after ${counted(report.requests, "request")}; ${untilProved(report.requests_to_proof)}.`;
}

function untilProved(proof) {
  if (!proof) return "it is too early to say how many more it takes until it can be promoted";
  if (proof.expected == null) return "proof that it is no worse is not in sight yet";
  return `about ${counted(Math.max(proof.expected, 1), "more request")} until it can be promoted`;
}

export function canarySection(adapter) {
  const report = adapter.canary_report;
  if (!report) return null;
  const threshold = report.log_threshold, says = `Canary v${report.canary} against v${report.live}`;
  const kind = report.verdict === "worse" ? "moved" : report.verdict === "proved" && adapter.ready ? "fine" : "";
  const head = ["Check", "Difference so far", "What that shows", "Evidence that it is worse"];
  return make("section", { class: "trial" }, make("p", { class: kind }, make("b", {}, "Canary: "), canarySentence(report)),
    fold(`canary of ${adapter.name}`, "Statistics",
      make("table", {}, make("caption", { class: "hidden" }, `${says}: each check`),
        make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...report.checks.map((row) => checkRow(row, threshold, head)))),
      make("p", { class: "note" }, `Called worse by chance in at most ${decimal(100 * report.alpha)} % of canaries, however long they run.`)));
}

function checkRow(row, threshold, head) {
  const name = row.check.replaceAll("_", " "), text = odds(row.log_evidence ?? 0, threshold), of = part(row, threshold);
  const cell = (at, ...content) => make("td", { "data-label": head[at] }, ...content);
  return make("tr", {}, make("th", { scope: "row" }, name), cell(1, difference(row)), cell(2, strength(row, threshold)),
    cell(3, meter(`Evidence: ${name}`, of, row.worse ? "bad" : of > STRONG ? "warn" : "", text),
      make("span", { class: "note" }, `${text}; ${count(row.canary_requests)} and ${counted(row.live_requests, "answer")}`)));
}

export function goldenCanarySection(adapter) {
  const row = adapter.golden_canary;
  if (!row) return null;
  const text = odds(row.log_evidence, row.log_threshold), worse = row.verdict === "worse";
  return make("section", { class: "trial" },
    make("p", { class: worse ? "moved" : "" }, make("b", {}, "Golden set: "),
      `v${row.canary} scores ${percent(row.canary_score)}, v${row.live} ${percent(row.live_score)}, on ${counted(row.cases, "case")} of ${count(row.of_cases)}${worse ? ": worse" : ""}. ${row.note ?? ""}`),
    fold(`golden set of ${adapter.name}`, "Statistics",
      meter("Evidence on the golden set", row.log_evidence / row.log_threshold, worse ? "bad" : "", text),
      make("p", { class: "note" }, `Evidence that it is worse: ${text}`)));
}

// ---- drift

const LEFT_OUT = {
  near_duplicate: "nearly the same as earlier ones", repeated: "repeats of earlier ones",
  same_conversation: "from askers who asked a moment ago", warming_up: "among the first 64, which are never counted",
};

// "46 seen, 0 counted, because ..."
export function seen(thinning) {
  if (!thinning) return "";
  const all = Object.values(thinning).reduce((total, number) => total + number, 0);
  const why = Object.entries(LEFT_OUT).filter(([reason]) => thinning[reason]).sort(([one], [other]) => thinning[other] - thinning[one])
    .map(([reason, text]) => `${count(thinning[reason])} ${thinning[reason] === 1 ? "is" : "are"} ${text}`);
  return `${count(all)} seen, ${count(thinning.accepted)} counted${why.length ? `, because ${why.join(" and ")}` : ""}`;
}

export function driftSentence(report) {
  const signals = report?.signals ?? [], gathering = signals.filter((row) => row.reference_requests < row.reference_needed);
  if (Object.keys(report?.alarms ?? {}).length) return "";
  if (!signals.length) return "Drift: nothing seen yet.";
  const said = seen(report.thinning), prompt = gathering.find((row) => row.signal === "prompt");
  if (prompt) {
    return `Drift: learning what is usual, ${count(prompt.reference_requests)} of ${counted(prompt.reference_needed, "request")} so far${said ? `; ${said}` : ""}.`;
  }
  const near = signals.filter((row) => !gathering.includes(row) && part(row, row.log_threshold) > STRONG).map((row) => row.signal);
  return near.length ? `Drift: something may be changing in the ${near.join(" and the ")}; not sure yet.` : "Drift: requests and answers look as usual.";
}

export function driftStatistics(name, report) {
  if (!report?.signals.length) return null;
  const gathering = report.signals.filter((row) => row.reference_requests < row.reference_needed);
  return fold(`drift of ${name}`, "Statistics", ...report.signals.map((row) => gathering.includes(row) ? reference(row) : signal(row)),
    report.probe && make("p", { class: "note" }, `Probe answers moved by ${decimal(report.probe.noise_ratio)} times their noise; ${decimal(report.probe.tolerance)} is an alarm.`),
    report.thinning && make("p", { class: "note" }, `Requests: ${seen(report.thinning)}.`));
}

function reference(row) {
  const text = `${row.signal}: ${count(row.reference_requests)} of ${counted(row.reference_needed, "request")} for a reference`;
  return make("div", { class: "signal" }, meter(`Reference of drift: ${row.signal}`, row.reference_requests / row.reference_needed, "gather", text),
    make("p", { class: "note" }, text));
}

function signal(row) {
  const of = part(row, row.log_threshold), text = `evidence ${odds(row.log_evidence ?? 0, row.log_threshold)}`;
  const effects = Object.entries(row.effects).map(([name, value]) => `${name.replaceAll("_", " ")} ${decimal(value, 3)}`).join(", ");
  return make("div", { class: "signal" }, meter(`Evidence of drift: ${row.signal}`, of, row.alarmed ? "bad" : of > STRONG ? "warn" : "", text),
    make("p", { class: "note" }, make("b", {}, `${row.alarmed ? "Drifted" : "Drift"}: ${row.signal}`), ` ${text}`,
      effects ? `; ${effects}` : "", row.since ? `; since ${row.since}` : ""));
}
