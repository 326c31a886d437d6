// One adapter as a card: what is wrong with it, its versions, and the evidence that there is against each.

import { adapterAddress, alarmAddress, alarmId, askAddress } from "/dashboard/addresses.js";
import { firstTokenChart, interval, requestsChart, traffic } from "/dashboard/charts.js";
import { counted, date, decimal, make, percent, pill } from "/dashboard/dom.js";
import { ofAdapter } from "/dashboard/grafana.js";
import { canarySection, driftSentence, driftStatistics, goldenCanarySection } from "/dashboard/verdicts.js";

const STATES = {
  slot: ["in memory", "in a slot of the batch"], host: ["in memory", "in the engine's memory"],
  disk: ["on disk", "loaded when it is asked"], failed: ["cannot be loaded", "its requests fail"],
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
    canarySection(adapter), goldenCanarySection(adapter), ...adapter.shadow_agreement.map(shadow),
    hidden > 0 && make("div", { class: "fold" }, make("button", {
      type: "button", click: () => on.older(adapter),
      "aria-label": `Show older versions of ${adapter.name}`,
    }, older ? "Show more" : `${counted(hidden, "version")} more: show`)));
}

function heading(adapter, id) {
  const live = adapter.live == null ? pill("nothing live", "warn") : pill(`live: v${adapter.live}`, calm(adapter));
  return make("div", { class: "top" }, make("h3", { id }, make("a", { href: adapterAddress(adapter.name) }, adapter.name)), live,
    !adapter.ready && pill(`engine ${adapter.engine} is down`, "bad"),
    adapter.tenant !== "default" && pill(`tenant ${adapter.tenant}`),
    adapter.visibility === "shared" && pill("shared"), ofAdapter(adapter));
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
    make("div", { class: "evidence" }, ...drift(adapter, version, on), golden(version), validation(version)),
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

function drift(adapter, version, on) {
  const report = version.drift, said = driftSentence(report);
  const alarms = Object.entries(report?.alarms ?? {}).map(([signal, text]) => alarm(adapter, version, signal, text, on));
  return [said && make("p", { class: "note" }, said), ...alarms, driftStatistics(`${adapter.name} v${version.version}`, report)];
}

// An open alarm: what moved, and what can be said to it. Its address is a link of its own.
function alarm(adapter, version, signal, text, on) {
  const tag = `${adapter.name} v${version.version}`, offer = (says, ask) => make("button", {
    type: "button", "aria-label": `${says}: ${signal} of ${tag}`, click: () => ask(adapter, version, signal),
  }, says);
  return make("div", { class: "alarm", id: alarmId(adapter.name, version.version, signal), tabindex: "-1" },
    make("p", { class: "moved" }, make("a", { href: alarmAddress(adapter.name, version.version, signal) }, `Drift, ${signal}`), `: ${text || "it has moved"}`),
    make("div", { class: "do" }, offer("It is here to stay", on.accept), offer("It is over", on.acknowledge)));
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

function validation(version) {
  const report = version.validation;
  if (!report) return null;
  const checks = Object.values(report.checks), bad = checks.filter((check) => check.verdict !== "passed");
  return make("p", { class: "note" }, make("b", { class: bad.length ? "moved" : "" }, `Validation: ${report.verdict}`),
    bad.length ? bad.map((check) => `; ${check.name} ${check.verdict}: ${check.what}`).join("")
      : `, ${counted(checks.length, "check")}`, report.problem ? `; ${report.problem}` : "");
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
  act.append(make("a", {
    class: "button", href: askAddress(adapter.name, version.version), "aria-label": `Ask ${adapter.name} v${version.version}`,
  }, "Ask"));
  if (version.version === adapter.live) {
    if (adapter.before != null) offer("Roll back", on.rollback, ` to v${adapter.before}`);
    return act;
  }
  if (adapter.canary?.version === version.version) offer("End canary", on.endCanary);
  else if (adapter.live != null) offer("Canary", on.startCanary);
  offer("Promote", on.promote);
  return act;
}
