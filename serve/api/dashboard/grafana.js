// Where Grafana has the same, over a longer time: dashboards by their uids, panels by their numbers and titles.

import { make } from "/dashboard/dom.js";

const PANELS = {
  requests: ["loradock-overview", 4, "Requests"],
  errors: ["loradock-overview", 5, "Errors"],
  firstToken: ["loradock-overview", 6, "First token, p95"],
  queue: ["loradock-engine", 2, "Waiting for a seat"],
  tokens: ["loradock-engine", 13, "Tokens"],
};
const DASHBOARDS = ["overview", "adapters", "drift", "swap", "quality", "engine", "batches", "usage"];
let grafana = null;

// Its address, of whoever may see all tenants; null where there is none.
export function know(address) {
  grafana = address;
}

function link(text, label, uid, search = {}) {
  const query = new URLSearchParams(search).toString();
  return make("a", { href: `${grafana}/d/${uid}${query && `?${query}`}`, "aria-label": label, target: "_blank", rel: "noopener" }, text);
}

// The name of a number as a link to the panel that draws it; the name alone where there is no Grafana.
export function named(name, panel) {
  const [uid, number, title] = PANELS[panel] ?? [];
  return grafana && uid ? link(name, `${name}: ${title} in Grafana`, uid, { viewPanel: number }) : name;
}

// All dashboards, below the numbers.
export function dashboards() {
  if (!grafana) return "";
  const links = DASHBOARDS.flatMap((name) => [" ", link(name, `Grafana: ${name}`, `loradock-${name}`)]);
  return make("p", { class: "note" }, "In Grafana:", ...links);
}

// What it has of one adapter: latency and errors; a canary beside the live version.
export function ofAdapter({ name, live, canary }) {
  if (!grafana) return null;
  return make("span", { class: "note" }, link("Grafana", `Grafana: adapter ${name}`, "loradock-adapters", { "var-adapter": name }), " ",
    link("drift", `Grafana: drift of ${name}`, "loradock-drift", { "var-adapter": name }), " ",
    canary && link(`v${live} beside v${canary.version}`, `Grafana: canary of ${name}`, "loradock-swap", {
      "var-adapter": name, "var-old": `v${live}`, "var-new": `v${canary.version}`,
    }));
}
