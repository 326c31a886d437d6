// The row above everything: how much is asked now, how fast it is answered, what waits, what memory it takes.

import { bytes, count, decimal, make, percent, seconds } from "/dashboard/dom.js";
import { dashboards, named } from "/dashboard/grafana.js";

export function strip({ now, engines, operator, started }) {
  const sum = (field) => engines.reduce((total, engine) => total + (engine[field] ?? 0), 0);
  const facts = [
    ["Requests/s", decimal(now.requests_per_second, now.requests_per_second < 1 ? 2 : 1), "last three minutes", "requests"],
    ["Tokens/s", decimal(now.tokens_per_second, 0), "last three minutes", "tokens"],
    ["First token", seconds(now.first_token_p95), "95 % within, last 30 min", "firstToken"],
    ["Errors", now.requests ? `${count(now.errors)} of ${count(now.requests)}` : "0", errors(now), "errors"],
  ];
  if (operator) {
    facts.push(["Queue", `${count(sum("waiting"))} waiting`, `${count(sum("running"))} being answered`, "queue"], ["Memory", bytes(sum("memory_bytes")), "of the engines"]);
  }
  return [make("dl", { class: "card strip", "aria-label": "Now" }, ...facts.map(([name, value, of, panel]) => make("div", {},
    make("dt", {}, named(name, panel)), make("dd", {}, make("b", { class: name === "Errors" && now.errors ? "moved" : "" }, value), make("span", { class: "note" }, of))))),
  dashboards(), young(started)];
}

const errors = (now) => now.errors ? `${percent(now.errors / now.requests)}, last 30 min` : "last 30 min";

// Half an hour after a start the charts are whole again.
function young(started) {
  if (Date.now() / 1000 - started > 1800) return "";
  const at = new Date(started * 1000).toLocaleTimeString(undefined, { timeStyle: "short" });
  return make("p", { class: "note" }, `The server started at ${at}: charts begin there. What happened before is under `,
    make("a", { href: "#/changes" }, "Changes"), " and on each adapter's page.");
}
