// One adapter as a card: what is wrong with it, its versions, and the evidence that there is against each.

import { firstTokenChart, interval, meter, requestsChart, traffic } from "/dashboard/charts.js";
import { count, counted, date, decimal, make, percent, pill } from "/dashboard/dom.js";

const STATES = {
  slot: ["loaded", "in a slot of the batch"], host: ["loaded", "in the engine's memory"],
  disk: ["on disk", "loaded when it is asked for"], failed: ["cannot be loaded", "its requests fail"],
};

// `on` has what buttons do: roll back, promote, start and end a canary, show older versions.
export function card(adapter, scale, on, older = null) {
  const id = `adapter-${adapter.tenant}-${adapter.name}`;
  const known = new Set(adapter.versions.map((version) => version.version));
  const versions = [...adapter.versions, ...(older?.versions ?? []).filter((version) => !known.has(version.version))];
  const hidden = adapter.versions_total - versions.length;
  return make("article", { class: `card ${adapter.ready ? "" : "off"}`, "data-adapter": adapter.name, "aria-labelledby": id },
    heading(adapter, id), problems(adapter),
    make("div", { class: "versions", role: "list", "aria-label": `Versions of ${adapter.name}` },
      ...versions.map((version) => versionRow(adapter, version, scale, on))),
    canary(adapter), goldenCanary(adapter), ...adapter.shadow_agreement.map(shadow),
    hidden > 0 && make("div", { class: "fold" }, make("button", {
      type: "button", click: () => on.older(adapter),
      "aria-label": `Show older versions of ${adapter.name}`,
    }, older ? "Show more" : `${counted(hidden, "version")} more: show`)));
}

function heading(adapter, id) {
  const live = adapter.live == null ? pill("nothing live", "warn") : pill(`live: v${adapter.live}`, calm(adapter));
  return make("div", { class: "top" }, make("h3", { id }, adapter.name), live,
    !adapter.ready && pill(`engine ${adapter.engine} is down`, "bad"),
    adapter.tenant !== "default" && pill(`tenant ${adapter.tenant}`),
    adapter.visibility === "shared" && pill("shared"));
}

// Green is for what answers and has no problem.
const calm = (adapter) => adapter.ready && !adapter.problems.length ? "good" : "";

function problems(adapter) {
  if (!adapter.problems.length) return null;
  const one = (problem) => make("li", {}, make("b", {}, problem.version == null ? "" : `v${problem.version} `), problem.text);
  return make("ul", { class: "problems", "aria-label": `Problems of ${adapter.name}` }, ...adapter.problems.map(one));
}

function versionRow(adapter, version, scale, on) {
  const wrong = adapter.problems.some((problem) => problem.version === version.version);
  return make("div", { class: "version", role: "listitem" },
    who(adapter, version, wrong),
    make("div", { class: "charts" },
      version.recent && requestsChart(version.recent, scale), version.recent && firstTokenChart(version.recent, scale),
      traffic(version.recent)),
    make("div", { class: "evidence" }, ...drift(version.drift), golden(version)),
    actions(adapter, version, on));
}

function who(adapter, version, wrong) {
  const [state, title] = STATES[version.state];
  const good = adapter.ready && !wrong ? "good" : "";
  return make("div", { class: "who" }, make("b", {}, `v${version.version}`),
    version.version === adapter.live && pill("live", good),
    version.version === adapter.canary?.version && pill(`canary ${percent(adapter.canary.weight)}`, "warn"),
    version.version === adapter.shadow?.version && pill(`shadow ${percent(adapter.shadow.weight)}`),
    version.pinned && pill("pinned"),
    adapter.ready ? pill(state, version.state === "failed" ? "bad" : "", title) : pill("engine down", "bad"),
    make("span", { class: "note" }, `pushed ${date(version.pushed)}, rank ${version.rank}, ${version.digest}`));
}

// ---- evidence

function drift(report) {
  const signals = report?.signals ?? [];
  if (!signals.length) return [make("p", { class: "note" }, "Drift: nothing seen yet.")];
  const gathering = signals.filter((row) => row.reference_requests < row.reference_needed);
  return [...signals.filter((row) => !gathering.includes(row)).map(signal), gathering.length > 0 && references(gathering),
    report.probe && probe(report.probe),
    ...Object.values(report.alarms).filter(Boolean).map((text) => make("p", { class: "moved" }, text))];
}

// The one that has least of what it needs is drawn.
function references(rows) {
  const part = Math.min(...rows.map((row) => row.reference_requests / row.reference_needed));
  const text = rows.map((row) => `${row.signal} ${count(row.reference_requests)} of ${count(row.reference_needed)}`).join(", ");
  return make("div", { class: "signal" }, meter("References of drift", part, "gather", text),
    make("p", { class: "note" }, `Drift: gathering the reference; requests so far: ${text}`));
}

function signal(row) {
  const part = Math.max(0, row.log_evidence ?? 0) / row.log_threshold;
  const kind = row.alarmed ? "bad" : part > 0.6 ? "warn" : "";
  const text = `evidence ${decimal(row.log_evidence)} of ${decimal(row.log_threshold)} (ln)`;
  const effects = Object.entries(row.effects).map(([name, value]) => `${name.replaceAll("_", " ")} ${decimal(value, 3)}`).join(", ");
  return make("div", { class: "signal" }, meter(`Evidence of drift: ${row.signal}`, part, kind, text),
    make("p", { class: "note", title: effects ? `Effects: ${effects}` : null },
      make("b", {}, `${row.alarmed ? "Drifted" : "Drift"}: ${row.signal}`), ` ${percent(part)} of the threshold, ${text}`,
      row.alarmed && effects ? `; ${effects}` : "", row.since ? `; since ${row.since}` : ""));
}

function probe(row) {
  return make("p", { class: "note" }, `Probe answers: ${decimal(row.noise_ratio)} times their noise, an alarm from ${decimal(row.tolerance)} on`);
}

function golden(version) {
  const row = version.golden;
  if (!row) return null;
  const left = row.errors + row.missing;
  if (row.score == null) return make("p", { class: "note" }, `Golden set: no score yet, ${counted(left, "case")} left`);
  const text = `Golden score ${percent(row.score)}, ${percent(row.low)} to ${percent(row.high)} with ${percent(row.confidence)} `
    + `confidence, ${counted(row.cases, "case")}`;
  return make("div", { class: "signal" }, interval(text, row.score, row.low, row.high),
    make("p", { class: "note" }, text, left ? `; ${left} without a score` : ""));
}

function canary(adapter) {
  const report = adapter.canary_report;
  if (!report) return null;
  const kind = report.verdict === "worse" ? "bad" : report.verdict === "proved" && adapter.ready ? "good" : "";
  const proof = report.requests_to_proof?.expected;
  const says = `Canary v${report.canary} against v${report.live}: `;
  return make("section", { class: "trial" },
    make("p", {}, make("b", {}, says), pill(report.verdict, kind),
      ` ${counted(report.requests, "request")} compared; called worse at evidence ${decimal(report.log_threshold)} (ln), `
      + `by chance in at most ${decimal(100 * report.alpha)} % of canaries.`,
      proof ? ` About ${counted(proof, "request")} more until it is proved.` : ""),
    make("table", {}, make("caption", { class: "hidden" }, `${says}evidence of each check`),
      make("thead", {}, make("tr", {}, ...["Check", "Evidence that it is worse", "Effect", "Canary", "Live"].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...report.checks.map((row) => check(row, report.log_threshold)))));
}

function check(row, threshold) {
  const name = row.check.replaceAll("_", " "), part = Math.max(0, row.log_evidence ?? 0) / threshold;
  const text = `${decimal(row.log_evidence)} of ${decimal(threshold)}`;
  return make("tr", {}, make("th", { scope: "row" }, name),
    make("td", { "data-label": "Evidence" }, meter(`Evidence: ${name}`, part, row.worse ? "bad" : part > 0.6 ? "warn" : "", text),
      make("span", { class: "note" }, text)),
    make("td", { "data-label": "Effect" }, decimal(row.effect, 3)),
    make("td", { "data-label": "Canary" }, counted(row.canary_requests, "request")),
    make("td", { "data-label": "Live" }, counted(row.live_requests, "request")));
}

function goldenCanary(adapter) {
  const row = adapter.golden_canary;
  if (!row) return null;
  const text = `${decimal(row.log_evidence)} of ${decimal(row.log_threshold)} (ln)`;
  return make("section", { class: "trial" },
    make("p", {}, make("b", {}, `Golden set, v${row.canary} against v${row.live}: `), pill(row.verdict, row.verdict === "worse" ? "bad" : ""),
      ` ${percent(row.canary_score)} against ${percent(row.live_score)} on ${counted(row.cases, "case")} of ${count(row.of_cases)}; evidence that it is worse ${text}. ${row.note}`),
    meter("Evidence on the golden set", row.log_evidence / row.log_threshold, row.verdict === "worse" ? "bad" : "", text));
}

function shadow(row) {
  return make("section", { class: "trial" }, make("p", {}, make("b", {}, `Shadow v${row.shadow} beside v${row.live}: `),
    `${percent(row.exact_agreement)} of the answers the same, ${percent(row.edit_agreement)} of their tokens without an edit, `
    + `${decimal(row.length_ratio)} times as long; ${counted(row.requests, `${row.sampling} request`)}.`));
}

// ---- what can be done

function actions(adapter, version, on) {
  const act = make("div", { class: "do" });
  const offer = (text, ask, more = "") => act.append(make("button", {
    type: "button", click: () => ask(adapter, version), "aria-label": `${text} ${adapter.name} v${version.version}${more}`,
  }, text));
  if (version.version === adapter.live) {
    if (adapter.before != null) offer("Roll back", on.rollback, ` to v${adapter.before}`);
    return act;
  }
  if (adapter.canary?.version === version.version) offer("End canary", on.endCanary);
  else if (adapter.live != null) offer("Canary", on.startCanary);
  offer("Promote", on.promote);
  return act;
}
