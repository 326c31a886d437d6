// The dashboard. The key lives in this module's memory alone: not in the address, not in any storage.

const SECONDS = 10, SHOWN = 30, CHANGES = 25, MINUTES = 30;
const $ = (id) => document.getElementById(id);
let key = "", timer = 0, turn = 0, adapters = [], refused = "";

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function call(path, method = "GET", body = undefined) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body),
    credentials: "omit", cache: "no-store", redirect: "error",
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, told.error?.message ?? `${path}: ${answer.status}`);
  return told;
}

// What this key may not see, or this server does not have, is left out of the page.
const maybe = (path) => call(path).catch((error) => {
  if (error instanceof Refused && [401, 403, 404].includes(error.status)) return null;
  throw error;
});

const path = (name, rest = "") => `/v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}${rest}`;

function make(tag, attributes = {}, ...content) {
  const svg = ["svg", "rect", "line", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...content);
  return made;
}

const pill = (text, kind = "") => make("span", { class: `pill ${kind}` }, text);
const time = (seconds) => seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds} s`;
const when = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });

function bars(minutes) {
  const now = Math.floor(Date.now() / 60000) * 60, wide = 240 / MINUTES, high = 30;
  const highest = Math.max(0.001, ...minutes.map((one) => one.first_token_p95 ?? 0));
  const drawn = make("svg", { class: "bars", viewBox: `0 0 240 ${high}`, preserveAspectRatio: "none", role: "img" });
  drawn.append(make("title", {}, "First token, 95th percentile, of each of the last 30 minutes"));
  drawn.append(make("line", { x1: 0, x2: 240, y1: high - 0.5, y2: high - 0.5 }));
  for (const one of minutes) {
    const ago = Math.round((now - one.at) / 60);
    if (ago < 0 || ago >= MINUTES) continue;
    const tall = Math.max(2, high * (one.first_token_p95 ?? 0) / highest);
    const says = `${new Date(one.at * 1000).toLocaleTimeString()}: ${one.requests} requests, ${one.errors} errors` +
      (one.first_token_p95 == null ? "" : `, first token p95 ≤ ${time(one.first_token_p95)}`);
    drawn.append(make("rect", {
      x: (MINUTES - 1 - ago) * wide + 1, y: high - tall, width: wide - 2, height: tall, class: one.errors ? "bad" : "",
    }, make("title", {}, says)));
  }
  return drawn;
}

function traffic(minutes) {
  const sum = (name) => minutes.reduce((total, one) => total + one[name], 0);
  const last = minutes.findLast((one) => one.first_token_p95 != null);
  const asked = sum("requests"), failed = sum("errors");
  const said = make("div", { class: "said" });
  said.append(make("span", {}, asked ? `${asked} requests in 30 min${failed ? `, ${failed} failed` : ""}` : "no requests in 30 min"));
  if (last) said.append(make("span", { title: "First token, 95th percentile" }, `p95 ≤ ${time(last.first_token_p95)}`));
  return make("div", {}, bars(minutes), said);
}

function drift(report) {
  const all = Object.entries(report?.signals ?? {}).map(([signal, row]) => ({ signal, ...row }));
  const rows = all.filter((row) => row.log_evidence != null && row.reference_requests >= row.reference_needed);
  if (!all.length) return make("div", { class: "said" }, "drift: nothing seen yet");
  if (!rows.length) {
    const slowest = all.reduce((a, b) => (a.reference_requests < b.reference_requests ? a : b));
    return make("div", { class: "said" }, `drift: baseline ${slowest.reference_requests} of ${slowest.reference_needed} requests`);
  }
  const part = (row) => Math.max(0, row.log_evidence / row.log_threshold);
  const alarm = rows.find((row) => row.alarmed);
  const worst = alarm ?? rows.reduce((a, b) => (part(b) > part(a) ? b : a));
  const level = Math.min(1, part(worst)), kind = alarm ? "bad" : level > 0.6 ? "warn" : "";
  const effects = Object.entries(worst.effects ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
  const drawn = make("svg", { class: "meter", viewBox: "0 0 100 6", preserveAspectRatio: "none", role: "img" },
    make("title", {}, `The strongest evidence of drift, as a part of the threshold. ${effects}`),
    make("rect", { class: "track", width: 100, height: 6 }),
    make("rect", { class: `level ${kind}`, width: 100 * level, height: 6 }));
  return make("div", {}, drawn, make("div", { class: "said" },
    make("span", {}, alarm ? `drifted: ${alarm.signal}` : `drift: ${worst.signal}`),
    make("span", {}, `${Math.round(100 * level)} % of threshold`)));
}

function version(adapter, one) {
  const who = make("div", { class: "who" }, make("b", {}, `v${one.version}`));
  const canary = adapter.canary?.version === one.version, shadow = adapter.shadow?.version === one.version;
  if (one.live) who.append(pill("live", "good"));
  if (canary) who.append(pill(`canary ${Math.round(100 * adapter.canary.weight)} %`, "warn"));
  if (shadow) who.append(pill("shadow"));
  if (one.pinned) who.append(pill("pinned"));
  who.append(pill(one.resident ? "loaded" : "on disk"));
  const act = make("div", { class: "do" });
  const offer = (text, ask) => act.append(make("button", { type: "button", click: () => change(ask),
    "aria-label": `${text} ${adapter.name} v${one.version}` }, text));
  if (one.live) {
    offer("Roll back", {
      title: `Roll ${adapter.name} back?`, does: "Roll back", path: path(adapter.name, "/rollback"),
      says: `Version ${one.version} stops answering; the version that was live before answers again.`,
      body: { expected_version: one.version },
    });
  } else {
    if (canary) offer("End canary", {
      title: `End the canary of ${adapter.name}?`, does: "End canary", path: path(adapter.name, "/canary"),
      says: `Version ${one.version} gets no more traffic.`, body: { version: one.version, weight: 0 },
    });
    else if (adapter.live != null) offer("Canary", {
      title: `Give ${adapter.name} v${one.version} a share?`, does: "Start canary", path: path(adapter.name, "/canary"),
      says: "The same askers get it each time.", body: { version: one.version }, weight: true,
    });
    offer("Promote", {
      title: `Promote ${adapter.name} v${one.version}?`, does: "Promote", path: path(adapter.name, "/promote"),
      says: "Requests from now on answer from it; those under way finish where they began.",
      body: { version: one.version, expected_version: adapter.live ?? 0 },
    });
  }
  return make("div", { class: "version" }, who, traffic(one.recent ?? []),
    drift(adapter.drift?.versions.find((row) => row.version === `v${one.version}`)), act);
}

function card(adapter) {
  const top = make("div", { class: "top" }, make("h3", {}, adapter.name),
    pill(adapter.live == null ? "nothing live" : `live: v${adapter.live}`, adapter.live == null ? "warn" : "good"));
  if (adapter.tenant !== "default") top.append(pill(`tenant ${adapter.tenant}`));
  if (adapter.visibility === "shared") top.append(pill("shared"));
  const trial = adapter.drift?.canary;
  if (trial) top.append(pill(`v${trial.canary} against v${trial.live}: ${trial.verdict}`, trial.verdict === "worse" ? "bad" : ""));
  const versions = [...adapter.versions].sort((a, b) => b.live - a.live || b.version - a.version).slice(0, 8);
  return make("article", { class: "card", "data-adapter": adapter.name }, top,
    ...versions.map((one) => version(adapter, one)));
}

const WORDS = {
  add: "pushed", fallback: "fell back", unshare: "made private", promote: "promoted", rollback: "rolled back", canary: "canary", canary_end: "canary ended",
  shadow: "shadow", shadow_end: "shadow ended", delete: "deleted", pin: "pinned", unpin: "unpinned", share: "shared",
  drift: "drifted",
};

// What the server did by itself it says as `reason: {evidence}`.
function reason(why) {
  const [, word, json] = /^(\w+): (\{.*\})$/s.exec(why ?? "") ?? [];
  try {
    return `${word}; ` + Object.entries(JSON.parse(json)).map(([name, value]) =>
      `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
  } catch {
    return why;
  }
}

function swap(row) {
  const way = row.from_version != null && row.to_version != null ? `v${row.from_version} → v${row.to_version}`
    : `v${row.to_version ?? row.from_version ?? "-"}`;
  const bad = row.who === "wayback" || row.who === "watcher";
  return make("li", {}, make("span", { class: "muted" }, when(row.when)),
    make("span", {}, make("b", {}, row.adapter), ` ${way} `, pill(WORDS[row.what] ?? row.what, bad ? "bad" : "")),
    make("span", { class: "why muted" }, [row.who && `by ${bad ? "the server" : row.who}`, reason(row.why)].filter(Boolean).join(": ")));
}

async function change(ask) {
  const dialog = $("ask");
  refused = "";
  $("ask-title").textContent = ask.title;
  $("ask-says").textContent = ask.says;
  $("ask-do").textContent = ask.does;
  for (const id of ["ask-weight", "ask-weight-label"]) $(id).hidden = !ask.weight;
  $("ask-weight").disabled = !ask.weight;
  $("ask-why").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "do") return;
  const body = { ...ask.body, why: $("ask-why").value };
  if (ask.weight) body.weight = Number($("ask-weight").value) / 100;
  try {
    await call(ask.path, "POST", body);
  } catch (error) {
    refused = error.message; // stays until the next attempt
  }
  await refresh();
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function refresh() {
  const mine = ++turn;
  clearTimeout(timer);
  try {
    const [told, engines, about] = await Promise.all([call("/v1/adapters"), maybe("/v1/engines"), call("/version")]);
    adapters = told.data;
    const chosen = filtered();
    const details = await Promise.all(chosen.map(async (one) => {
      const [detail, drift] = await Promise.all([maybe(path(one.name)), maybe(path(one.name, "/drift"))]);
      return { ...(detail ?? one), drift };
    }));
    if (mine !== turn) return;
    $("model").textContent = about.model;
    show(details);
    engine(engines?.data);
    $("fresh").textContent = new Date().toLocaleTimeString();
    problem(refused);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Refused && [401, 403].includes(error.status)) {
      adapters = [];
      show([]);
      engine(null);
      problem(key ? error.message : "This server asks for a key: one with the scope adapters:write shows its tenant's "
        + "adapters, an admin key all of them.");
    } else problem(error instanceof Refused ? error.message : "The server does not answer; trying again.");
  }
  timer = setTimeout(refresh, SECONDS * 1000);
}

function filtered() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = adapters.filter((one) => one.name.toLowerCase().includes(wanted));
  $("more").hidden = found.length <= SHOWN;
  $("more").textContent = `${found.length - SHOWN} more: filter by name to see them.`;
  return found.slice(0, SHOWN);
}

function show(chosen) {
  const held = document.activeElement?.getAttribute("aria-label");
  const cards = chosen.map(card);
  $("adapters").replaceChildren(...(cards.length ? cards : [make("div", { class: "card empty" }, "No adapters.")]));
  const rows = chosen.flatMap((one) => (one.history ?? []).map((row) => ({ ...row, adapter: one.name })));
  rows.sort((a, b) => b.when - a.when);
  $("swaps").replaceChildren(...(rows.length ? rows.slice(0, CHANGES).map(swap)
    : [make("li", { class: "empty" }, "Nothing has changed yet.")]));
  if (held) document.querySelector(`[aria-label="${CSS.escape(held)}"]`)?.focus();
}

function engine(rows) {
  $("engine").hidden = !rows?.length;
  if (!rows?.length) return;
  const running = rows.reduce((total, row) => total + row.running, 0), bad = rows.filter((row) => row.phase !== "ready");
  const one = rows.length === 1;
  $("engine").textContent = bad.length ? bad.map((row) => (one ? row.phase : `${row.name}: ${row.phase}`)).join(", ")
    : `${one ? "ready" : `${rows.length} engines ready`}, ${running} running`;
  $("engine").className = `pill ${bad.length ? "bad" : "good"}`;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  $("key").placeholder = key ? "key in use" : "API key";
  refresh();
});
$("filter").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refresh, 200); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); else clearTimeout(timer); });
refresh();
