// One adapter at its own address: its card, what was used of it this month, and what happened to it, also before a restart.

import { call, cardPath } from "/dashboard/api.js";
import { card } from "/dashboard/cards.js";
import { scales } from "/dashboard/charts.js";
import { count, counted, make, when } from "/dashboard/dom.js";
import { change } from "/dashboard/lists.js";

const CHANGES = 50;

// The card, changes and usage of an adapter; null once it is gone.
export async function oneAdapter(name, unlessGone) {
  const adapter = await call(cardPath(name)).catch(unlessGone);
  if (!adapter) return null;
  const [changes, usage] = await Promise.all([
    call(`/v1/overview/changes?limit=${CHANGES}&search=${encodeURIComponent(name)}`), call("/v1/usage").catch(() => null),
  ]);
  return { adapter, changes: changes.data.filter((entry) => entry.adapter === name), usage: used(usage, adapter), month: usage?.month };
}

function used(usage, { name, tenant }) {
  const short = tenant === "default" ? name : name.replace(`${tenant}/`, "");
  const rows = (usage?.data ?? []).filter((row) => [name, short, `${tenant}/${short}`].includes(row.adapter));
  const sum = (field) => rows.reduce((total, row) => total + (row[field] ?? 0), 0);
  return { requests: sum("requests"), tokens: sum("generated_tokens") || sum("completion_tokens") };
}

export function adapterView({ adapter, changes, usage, month }, started, on, older) {
  return [
    make("p", {}, make("a", { href: "#/adapters" }, "All adapters")),
    make("h2", { class: "hidden" }, `Adapter ${adapter.name}`),
    card(adapter, scales([adapter, ...older ? [older] : []]), on, older),
    make("p", { class: "note" }, month ? `In ${month}: ${counted(usage.requests, "request")}${usage.tokens ? `, ${count(usage.tokens)} tokens generated` : ""}. ` : "",
      `Charts are in memory, since the server started ${when(started)}; what is below is kept.`),
    make("h2", {}, "What happened"),
    make("ol", { class: "changes", "aria-label": `History of ${adapter.name}` },
      ...changes.length ? changes.map(change) : [make("li", { class: "empty" }, "Nothing has changed yet.")]),
  ];
}
