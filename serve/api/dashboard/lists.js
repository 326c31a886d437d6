// Rows of the table of adapters, changes, and engines.

import { adapterAddress } from "/dashboard/addresses.js";
import { age, bytes, count, counted, date, make, pill, when } from "/dashboard/dom.js";
import { difference } from "/dashboard/verdicts.js";

const WORDS = {
  add: "pushed", fallback: "fell back", unshare: "made private", promote: "promoted", rollback: "rolled back", canary: "canary",
  canary_end: "canary ended", shadow: "shadow", shadow_end: "shadow ended", delete: "deleted", pin: "pinned", unpin: "unpinned",
  share: "shared", drift: "drifted", drift_accepted: "drift accepted", golden_hold: "held by its golden score", validated: "validated", validation_hold: "held: not validated", unload: "unloaded",
  rename: "was renamed", rename_end: "is no longer asked as", alias: "has the alias", alias_end: "lost the alias", tag: "tagged", golden_fell: "scores less", loop: "loop",
};
const ALIASES = ["alias", "alias_end"];
// Who the server is in the history when it acts by itself.
const SERVER = ["wayback", "watcher", "golden"];

export function row(adapter, opened, open) {
  const live = adapter.live == null ? pill("nothing live", "warn") : pill(`v${adapter.live}`, adapter.ready ? "good" : "");
  const loaded = adapter.ready ? (["slot", "host"].includes(adapter.state) ? "in memory" : "on disk") : "engine down";
  const cell = (label, ...content) => make("td", { "data-label": label }, ...content);
  return make("tr", { "data-row": adapter.name },
    make("th", { scope: "row" }, make("a", { href: adapterAddress(adapter.name) }, adapter.name), adapter.tenant !== "default" && pill(`tenant ${adapter.tenant}`),
      adapter.visibility === "shared" && pill("shared"), adapter.canary && pill(`canary v${adapter.canary.version}`, "warn"),
      ...adapter.problems.map((problem) => pill(problem.kind, "bad", problem.text))),
    cell("Live", live), cell("Weights", adapter.ready ? loaded : pill(loaded, "bad")),
    cell("Requests, 30 min", count(adapter.requests)), cell("Versions", count(adapter.versions_total)),
    cell("Last push", date(adapter.pushed)),
    make("td", {}, make("button", {
      type: "button", "aria-expanded": String(opened), "aria-label": `Details of ${adapter.name}`, click: open,
    }, "Details")));
}

// What the server did by itself it says as `reason: {evidence}`.
function reason(why) {
  const [, word, json] = /^(\w+): (\{.*\})$/s.exec(why ?? "") ?? [];
  try {
    const evidence = JSON.parse(json);
    if (evidence.text) return evidence.text;
    if (evidence.checks?.length) return `v${evidence.canary} is worse than v${evidence.live}: ${evidence.checks.map(difference).join(", ")}`;
    return `${word}; ` + Object.entries(evidence).map(([name, value]) =>
      `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
  } catch {
    return why;
  }
}

export function change(entry) {
  const way = entry.from_version != null && entry.to_version != null ? `v${entry.from_version} → v${entry.to_version}`
    : `v${entry.to_version ?? entry.from_version ?? "-"}`;
  const own = SERVER.includes(entry.who);
  return make("li", {}, make("span", { class: "muted" }, when(entry.when)),
    make("span", {}, make("b", {}, entry.adapter), ` ${way} `,
      pill([WORDS[entry.what] ?? entry.what, ALIASES.includes(entry.what) && entry.label].filter(Boolean).join(" "), own ? "bad" : "")),
    make("span", { class: "why muted" },
      [entry.who && `by ${own ? "the server" : entry.who}`, reason(entry.why)].filter(Boolean).join(": ")));
}

function restarts({ restarts: times, last_restart: last }) {
  return last ? `${count(times)}, the last ${when(last.at)}: ${last.reason || "nobody knows why"}` : count(times);
}

export function engine(base, restart) {
  const ready = base.phase === "ready", busy = base.swapping ? `swapping to ${base.swapping.model ?? "another model"}` : "";
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  return make("article", { class: `card ${ready ? "" : "off"}`, "data-engine": base.name },
    make("div", { class: "top" }, make("h3", {}, base.name), pill(base.phase, ready ? "good" : "bad"), busy && pill(busy, "warn"),
      base.phase === "failed" && restart),
    base.reason && make("p", { class: "reason" }, `Why: ${base.reason}`),
    make("dl", {},
      fact("Model", base.model),
      fact("Weights", base.weights || "–"),
      fact("Answers under way", `${count(base.running)} of ${counted(base.seats, "seat")}`),
      fact("Waiting", counted(base.waiting, "request")),
      fact("Memory", bytes(base.memory_bytes)),
      fact("Adapters in memory", `${count(base.resident.length)} of ${count(base.max_resident)}, ${counted(base.slots, "slot")} in a batch`),
      fact("Up for", ready ? age(base.uptime_seconds) : "–"),
      fact("Restarts", restarts(base))));
}
