// The dashboard: what it asks for, when, and what it shows of it.

import { after, compareAnswers, everyLoop, jobButton, loopButton, restartButton, resultButtons, versionActions } from "/dashboard/actions.js";
import { adapterView, oneAdapter } from "/dashboard/adapter.js";
import { jobAddress, loopAddress, read, TABS } from "/dashboard/addresses.js";
import { adapterPath, call, cardPath, jobPath, keyed, Refused, use } from "/dashboard/api.js";
import { card } from "/dashboard/cards.js";
import { scales } from "/dashboard/charts.js";
import { $, announce, count, counted, make, say } from "/dashboard/dom.js";
import { know as knowGrafana } from "/dashboard/grafana.js";
import { jobCard, jobRow, verbsOf } from "/dashboard/jobs.js";
import { change as changeEntry, engine as engineCard, row } from "/dashboard/lists.js";
import { inOrder, loopCard, loopRow, verbsOf as loopVerbs } from "/dashboard/loops.js";
import * as playground from "/dashboard/playground.js";
import { strip } from "/dashboard/strip.js";

const SECONDS = 10, WHILE_STARTING = 2, ROWS = 50, CHANGES = 25;
const JOBS = 20, EVENTS = 300, LOOPS = 50;
let timer = 0, turn = 0, refused = "", tab = "adapters", offset = 0, about = null, overview = null;
// The adapter that has the page to itself, and the alarm that is looked for.
let single = "", sought = "";
// The row of the table that is open, older versions that were asked for, changes beyond the first page.
let opened = "", openedCard = null, older = new Map(), olderChanges = [];
let openedJob = "", jobsShown = JOBS;
// The loop that is open, which of its tries (0: the latest), and what answers were compared, by version.
let openedLoop = "", openedTry = 0, loopsShown = LOOPS, compared = new Map();
const drawn = new Map();

// ---- what is asked for

async function refresh() {
  const mine = ++turn;
  clearTimeout(timer);
  let soon = false;
  try {
    const search = encodeURIComponent($("filter").value.trim());
    const [answer, more, version] = await Promise.all([
      call(`/v1/overview?search=${search}&offset=${offset}&limit=${ROWS}`), ofTab(), about ?? call("/version"),
    ]);
    const details = opened ? await found(opened) : null;
    if (mine !== turn) return;
    [about, overview, openedCard] = [version, answer, details];
    soon = answer.engines.some((engine) => ["starting", "restarting", "draining"].includes(engine.phase));
    show(more);
    say($("problem"), refused);
  } catch (error) {
    if (mine !== turn) return;
    failed(error);
  }
  timer = setTimeout(refresh, 1000 * (soon ? WHILE_STARTING : SECONDS));
}

async function ofTab() {
  if (tab === "changes") return call(`/v1/overview/changes?limit=${CHANGES}&search=${encodeURIComponent($("changes-filter").value.trim())}`);
  if (tab === "jobs") return jobsShownNow();
  if (tab === "loops") return loopsShownNow();
  if (tab === "adapters" && single) return oneAdapter(single, unlessGone);
  return tab === "engines" ? call("/v1/engines") : null;
}

// The latest jobs, and of the open one what happened.
async function jobsShownNow() {
  const page = await call(`/v1/fine_tuning/jobs?limit=${jobsShown}`);
  const job = page.data.find(({ id }) => id === openedJob) ?? (openedJob && await ifThere(jobPath(openedJob)));
  if (job && !page.data.includes(job) && !page.data.some(({ id }) => id === job.id)) page.data.push(job);
  if (!job) return { ...page, events: [], checkpoints: [] };
  const [events, checkpoints] = await Promise.all([eventsOf(job.id), call(jobPath(job.id, "/checkpoints"))]);
  return { ...page, events, checkpoints: checkpoints.data };
}

async function eventsOf(job) {
  const events = [];
  for (let more = true; more && events.length < EVENTS;) {
    const after = events.length ? `&after=${events.at(-1).id}` : "";
    const some = await call(jobPath(job, `/events?limit=100${after}`));
    events.push(...some.data);
    more = some.has_more;
  }
  return events;
}

// Every loop, and of the open one its tries with what happened; an operator does not see the jobs of a tenant.
async function loopsShownNow() {
  const { data } = await call("/v1/loops");
  const opened = data.some(({ name }) => name === openedLoop) ? openedLoop : "";
  const [loop, adapter] = opened ? await Promise.all([ifThere(adapterPath(opened, "/loop")), ifThere(adapterPath(opened))]) : [];
  if (!loop || !adapter) return { data };
  const one = loop.tries.find((one) => one.try === openedTry) ?? loop.tries[0];
  const events = one?.job ? await eventsOf(one.job).catch(unlessGone) : null;
  return { data, loop, history: adapter.history, at: one?.try, events: events ?? [] };
}

function unlessGone(error) {
  if (error instanceof Refused && error.status === 404) return null;
  throw error;
}

const ifThere = (path) => call(path).catch(unlessGone);
// The card of an adapter; null once it is gone.
const found = (name) => ifThere(cardPath(name));

function failed(error) {
  const unknown = error instanceof Refused && error.unknown;
  if (unknown) {
    $("inside").hidden = $("down").hidden = $("engine").hidden = true;
    say($("model"), "");
    drawn.clear();
    overview = null;
    $("key-form").hidden = false;
    $("key").setAttribute("aria-invalid", String(keyed()));
    const scope = "one with the scope adapters:write shows its tenant's adapters, an admin key all of them.";
    say($("problem"), keyed() ? `The key is refused: ${error.message}.` : `This server asks for a key: ${scope}`);
    return;
  }
  $("inside").classList.add("stale"); // what is shown is what was true before
  say($("problem"), error instanceof Refused ? error.message : "The server does not answer; trying again.");
}

// ---- what is shown

// Draw a part again only when what it shows is another: the reader's place and focus stay.
function draw(id, state, build) {
  const key = JSON.stringify(state);
  if (drawn.get(id) === key) return;
  drawn.set(id, key);
  const held = document.activeElement?.getAttribute("aria-label");
  const inside = $(id).contains(document.activeElement);
  $(id).replaceChildren(...build());
  if (held && inside) $(id).querySelector(`[aria-label="${CSS.escape(held)}"]`)?.focus();
}

function show(more) {
  $("inside").hidden = false;
  $("inside").classList.remove("stale");
  $("key").removeAttribute("aria-invalid");
  $("key-form").hidden = !keyed(); // a server without keys asks for none
  say($("model"), about.model);
  say($("fresh"), `as of ${new Date().toLocaleTimeString()}`);
  $("tab-engines").hidden = !overview.operator;
  if (!overview.operator && tab === "engines") choose("adapters");
  knowGrafana(overview.grafana);
  draw("now", [overview.now, overview.started, overview.engines, Math.floor(Date.now() / 60_000)], () => strip(overview));
  showEngines(more);
  showSingle(more);
  showAdapters();
  showRest();
  if (tab === "changes" && more) showChanges(more);
  if (tab === "jobs" && more) showJobs(more);
  if (tab === "loops" && more) showLoops(more);
  if (tab === "playground") playground.showPlayground(overview).catch(failed);
}

function showEngines(more) {
  const engines = overview.engines, bad = engines.filter((engine) => !engine.ready), one = engines.length === 1;
  const running = engines.reduce((total, engine) => total + (engine.running ?? 0), 0);
  $("engine").hidden = !overview.operator && !bad.length;
  $("engine").textContent = bad.length ? bad.map((engine) => (one ? engine.phase : `${engine.name}: ${engine.phase}`)).join(", ")
    : `${one ? "ready" : `${engines.length} engines ready`}, ${running} running`;
  $("engine").className = `pill ${bad.length ? "bad" : "good"}`;
  $("down").hidden = !bad.length;
  draw("down", [bad.map(({ name, phase, reason }) => [name, phase, reason]), overview.operator], () => bad.map(engineDown));
  if (tab === "engines" && more) draw("engines", more.data, () => more.data.map((base) => engineCard(base, restartButton(base))));
}

function engineDown(engine) {
  const then = engine.phase === "failed" ? "Requests for it are refused until it is started again."
    : "Requests for it wait, or are refused.";
  return make("div", { class: "down", role: "alert" },
    make("p", {}, make("b", {}, `The engine ${engine.name} is ${engine.phase}. `), engine.reason ? `${engine.reason}. ` : "", then),
    overview.operator && engine.phase === "failed" && restartButton(engine));
}

// An adapter that has the page to itself; what is left of the view then is hidden.
function showSingle(more) {
  const alone = tab === "adapters" && single !== "";
  $("single").hidden = !alone;
  $("listed").classList.toggle("behind", alone);
  if (!alone) return draw("single", "", () => []);
  if (!more) return draw("single", single, () => [make("p", { class: "empty" }, `There is no adapter ${single}.`), make("a", { href: "#/adapters" }, "All adapters")]);
  draw("single", [more, overview.started, older.get(single)?.versions.length], () => adapterView(more, overview.started, on, older.get(single)));
  if (!sought) return;
  const alarm = document.getElementById(sought);
  sought = "";
  alarm?.scrollIntoView({ block: "center" });
  alarm?.focus();
}

function showAdapters() {
  const none = overview.adapters === 0;
  $("welcome").hidden = !none;
  $("listed").hidden = none || $("listed").classList.contains("behind");
  if (none) welcome();
  const shown = $("listed").hidden ? [] : overview.first, search = $("filter").value.trim();
  say($("summary"), [
    search ? `${count(overview.matching)} of ${counted(overview.adapters, "adapter")} match` : counted(overview.adapters, "adapter"),
    `${count(overview.with_problems)} with problems`, `${count(overview.with_traffic)} with traffic`,
  ].join(", "));
  $("legend").hidden = !shown.length;
  const state = [shown, [...older].map(([name, card]) => [name, card.versions.length])];
  draw("adapters", state, () => {
    const scale = scales([...shown, ...older.values()]);
    return shown.map((adapter) => card(adapter, scale, on, older.get(adapter.name)));
  });
}

function showRest() {
  const rows = $("listed").hidden ? [] : overview.data, last = offset + rows.length;
  $("rest").hidden = !overview.rest && !(overview.matching === 0 && overview.adapters);
  say($("rest-title"), overview.first.length ? counted(overview.rest, "other adapter") : "");
  $("paging").hidden = overview.rest <= ROWS;
  say($("place"), rows.length ? `${count(offset + 1)} to ${count(last)} of ${count(overview.rest)}` : "");
  $("previous").disabled = offset === 0;
  $("next").disabled = last >= overview.rest;
  if ($("listed").hidden) return;
  if (!rows.length && offset && overview.rest) return turnTo(0); // the page is gone
  draw("rows", [rows, opened, openedCard, [...older.keys()]], () => rows.length ? rows.flatMap(rowWithCard) : [
    make("tr", {}, make("td", { colspan: 7, class: "empty" }, overview.matching ? "All of them are shown above." : "No adapter has such a name.")),
  ]);
}

function rowWithCard(adapter) {
  const isOpen = adapter.name === opened && openedCard;
  const shown = [row(adapter, Boolean(isOpen), () => open(isOpen ? "" : adapter.name))];
  if (isOpen) {
    const scale = scales([...overview.first, openedCard]);
    const inside = card(openedCard, scale, on, older.get(adapter.name));
    shown.push(make("tr", { class: "opened" }, make("td", { colspan: 7 }, inside)));
  }
  return shown;
}

function showChanges(more) {
  const entries = [...more.data, ...olderChanges.filter((entry) => entry.id < (more.data.at(-1)?.id ?? 0))];
  draw("swaps", entries.map((entry) => entry.id), () => entries.length ? entries.map(changeEntry)
    : [make("li", { class: "empty" }, "Nothing has changed yet.")]);
  if (!olderChanges.length) $("older-changes").hidden = !more.has_more;
  $("older-changes").dataset.before = entries.at(-1)?.id ?? 0;
}

function showJobs({ data, has_more, events, checkpoints }) {
  $("more-jobs").hidden = !has_more || jobsShown >= 100;
  draw("jobs", [data, events.length, checkpoints, openedJob], () => data.length ? data.flatMap((job) => {
    const isOpen = job.id === openedJob;
    const shown = jobRow(job, isOpen, () => go(isOpen ? "#/jobs" : jobAddress(job.id)));
    if (!isOpen) return [shown];
    const inside = jobCard(job, events, checkpoints, [...verbsOf(job).map((verb) => jobButton(job, verb)), ...resultButtons(job)]);
    return [shown, make("tr", { class: "opened" }, make("td", { colspan: 6 }, inside))];
  }) : [make("tr", {}, make("td", { colspan: 6, class: "empty" }, "No job was made yet."))]);
}

function showLoops({ data, ...details }) {
  const all = data.length && data[0].stopped_everywhere, loops = inOrder(data);
  const asking = data.filter(({ phase }) => phase === "asking").length;
  say($("loops-summary"), [counted(data.length, "loop"), asking ? `${count(asking)} waiting for a yes` : "", all ? `all stopped by ${all}` : ""].filter(Boolean).join(", "));
  draw("loops-switch", [data.length > 0 && overview.operator, all], () => data.length && overview.operator ? [everyLoop(all ? "start" : "stop")] : []);
  $("more-loops").hidden = data.length <= loopsShown;
  draw("loops", [loops.slice(0, loopsShown), details, [...compared]], () => data.length ? loops.slice(0, loopsShown).flatMap((loop) => {
    const isOpen = loop.name === openedLoop;
    const shown = loopRow(loop, isOpen, () => go(isOpen ? "#/loops" : loopAddress(loop.name)));
    if (!isOpen || details.loop?.name !== loop.name) return [shown];
    const inside = loopCard(details.loop, { ...details, compared }, onLoop, loopVerbs(details.loop).map((verb) => loopButton(details.loop, verb)));
    return [shown, make("tr", { class: "opened" }, make("td", { colspan: 6 }, inside))];
  }) : [make("tr", {}, make("td", { colspan: 6, class: "empty" }, "No adapter has a loop: give one a policy with loop."))]);
}

const onLoop = { open: (number) => { openedTry = number; refresh(); }, compare: compareAnswers };

function welcome() {
  const key = keyed() ? '-H "Authorization: Bearer $LORADOCK_KEY" ' : "";
  say($("command"), `loradock adapters push my-adapter ./my-adapter --url ${location.origin}`);
  say($("command-curl"), `curl ${location.origin}/v1/adapters ${key}-F name=my-adapter -F files=@my-adapter/adapter_config.json `
    + "-F files=@my-adapter/adapter_model.safetensors");
  $("command-key").hidden = !keyed();
}

// ---- what is done

const on = {
  ...versionActions,
  // Twenty more, from the latest on; the card leaves out those that it has already.
  older: async (adapter) => {
    const before = older.get(adapter.name)?.versions.at(-1).version ?? 2 ** 31;
    const more = await call(cardPath(adapter.name, `?before=${before}`)).catch(failed);
    if (!more?.versions.length) return;
    // Two clicks, before there is an answer, ask for the same twenty twice.
    const shown = older.get(adapter.name)?.versions ?? [], last = shown.at(-1)?.version ?? 2 ** 31;
    older.set(adapter.name, { ...more, versions: [...shown, ...more.versions.filter((version) => version.version < last)] });
    refresh();
  },
};

after.change = (refusal) => {
  refused = refusal;
  if (!refusal) older.clear();
  return refresh();
};
after.compared = (version, report) => compared.set(version, report);

function open(name) {
  opened = name;
  openedCard = null;
  return refresh();
}

function turnTo(place) {
  offset = Math.max(0, place);
  opened = "";
  return refresh();
}

// A view's address, with what was open in it.
function addressOf(view) {
  if (view === "jobs" && openedJob) return jobAddress(openedJob);
  if (view === "loops" && openedLoop) return loopAddress(openedLoop);
  return view === "playground" ? playground.address() : `#/${view}`;
}

// Another view: its address says which, and what is open in it.
function go(address, focus = false) {
  if (location.hash !== address) history.pushState(null, "", address);
  return arrive(focus);
}

function arrive(focus = false) {
  const at = read(location.hash), before = [tab, single].join();
  [single, sought] = at.tab === "adapters" ? [at.open, at.alarm] : ["", ""];
  if (at.tab === "jobs") openedJob = at.open;
  if (at.tab === "loops" && openedLoop !== at.open) [openedLoop, openedTry] = [at.open, 0];
  if (at.tab === "playground") playground.opens(at.open);
  choose(at.tab, focus);
  if ([tab, single].join() !== before) scrollTo(0, 0);
  return refresh();
}

function choose(name, focus = false) {
  tab = name;
  document.title = `${single || (name === "adapters" ? "" : $(`tab-${name}`).textContent)} loradock`.trim();
  for (const each of TABS) {
    const chosen = each === name;
    $(`view-${each}`).hidden = !chosen;
    $(`tab-${each}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${each}`).tabIndex = chosen ? 0 : -1;
    if (chosen && focus) $(`tab-${each}`).focus();
  }
}

async function copy(id) {
  try {
    await navigator.clipboard.writeText($(id).textContent);
    announce("Copied.");
  } catch { // without TLS a browser has no clipboard: mark it for the reader's own keys
    getSelection().selectAllChildren($(id));
    announce("Press Ctrl+C to copy.");
  }
}

// ---- listeners

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  use($("key").value.trim());
  $("key").value = "";
  $("key").placeholder = keyed() ? "key in use" : "API key";
  offset = 0;
  refused = opened = "";
  older.clear();
  compared.clear();
  olderChanges = [];
  refresh();
});
for (const each of TABS) {
  $(`tab-${each}`).addEventListener("click", () => go(addressOf(each)));
  $(`tab-${each}`).addEventListener("keydown", (event) => {
    const seen = TABS.filter((name) => !$(`tab-${name}`).hidden), at = seen.indexOf(each);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(addressOf(seen.at(to % seen.length)), true);
  });
}
const later = (then) => { clearTimeout(timer); timer = setTimeout(then, 250); };
$("filter").addEventListener("input", () => later(async () => {
  await turnTo(0);
  if (overview) announce($("filter").value.trim() ? `${counted(overview.matching, "adapter")} found.` : "");
}));
$("changes-filter").addEventListener("input", () => { olderChanges = []; later(refresh); });
$("previous").addEventListener("click", () => turnTo(offset - ROWS));
$("next").addEventListener("click", () => turnTo(offset + ROWS));
$("older-changes").addEventListener("click", async () => {
  const search = $("changes-filter").value.trim();
  const more = await call(`/v1/overview/changes?limit=${CHANGES}&search=${encodeURIComponent(search)}&before=${$("older-changes").dataset.before}`).catch(failed);
  if (!more || search !== $("changes-filter").value.trim()) return;
  const last = olderChanges.at(-1)?.id ?? Infinity;
  olderChanges = [...olderChanges, ...more.data.filter((entry) => entry.id < last)];
  $("older-changes").hidden = !more.has_more;
  await refresh();
});
$("more-jobs").addEventListener("click", () => { jobsShown = 100; refresh(); });
$("more-loops").addEventListener("click", () => { loopsShown += LOOPS; refresh(); });
$("copy").addEventListener("click", () => copy("command"));
$("copy-curl").addEventListener("click", () => copy("command-curl"));
$("play-form").addEventListener("submit", (event) => { event.preventDefault(); playground.ask(); });
$("play-prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) playground.ask(); });
$("play-name").addEventListener("change", () => playground.changed(overview).catch(failed));
$("play-version").addEventListener("change", () => playground.versionChanged().catch(failed));
$("play-stop").addEventListener("click", playground.stop);
addEventListener("hashchange", () => arrive());
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); else clearTimeout(timer); });
arrive();
