// The dashboard: what it asks for, when, and what its buttons do.

import { adapterPath, call, cardPath, enginePath, jobPath, keyed, Refused, use } from "/dashboard/api.js";
import { card } from "/dashboard/cards.js";
import { scales } from "/dashboard/charts.js";
import { $, count, counted, make, say } from "/dashboard/dom.js";
import { jobCard, jobRow, verbsOf } from "/dashboard/jobs.js";
import { change as changeEntry, engine as engineCard, row } from "/dashboard/lists.js";
import { inOrder, loopCard, loopRow, verbsOf as loopVerbs } from "/dashboard/loops.js";

const SECONDS = 10, WHILE_STARTING = 2, ROWS = 50, CHANGES = 25;
const TABS = ["adapters", "changes", "jobs", "loops", "engines"];
const JOBS = 20, EVENTS = 300, LOOPS = 50;
// Captured requests that both versions are asked, the longest answer in tokens, and how many are shown.
const COMPARED = { against: "live", requests: 20, max_tokens: 128, examples: 5 };
let timer = 0, turn = 0, refused = "", tab = "adapters", offset = 0, about = null, overview = null;
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
    const [answer, more] = await Promise.all([call(`/v1/overview?search=${search}&offset=${offset}&limit=${ROWS}`), ofTab()]);
    const details = opened ? await found(opened) : null;
    about ??= await call("/version");
    if (mine !== turn) return;
    [overview, openedCard] = [answer, details];
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
  return tab === "engines" ? call("/v1/engines") : null;
}

// The latest jobs, and of the open one what happened.
async function jobsShownNow() {
  const page = await call(`/v1/fine_tuning/jobs?limit=${jobsShown}`);
  const job = page.data.find(({ id }) => id === openedJob);
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
  say($("model"), about.model);
  say($("fresh"), `as of ${new Date().toLocaleTimeString()}`);
  $("tab-engines").hidden = !overview.operator;
  if (!overview.operator && tab === "engines") choose("adapters");
  showEngines(more);
  showAdapters();
  showRest();
  if (tab === "changes" && more) showChanges(more);
  if (tab === "jobs" && more) showJobs(more);
  if (tab === "loops" && more) showLoops(more);
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

const restartButton = (engine) => make("button", {
  type: "button", class: "primary", "aria-label": `Restart the engine ${engine.name}`, click: () => change({
    title: `Restart the engine ${engine.name}?`, does: "Restart", path: enginePath(engine.name, "/restart"),
    says: `It is down: ${engine.reason}. It starts as long as it did with the server, and loads its adapters again.`,
    done: `The engine ${engine.name} is being started.`, plain: true,
  }),
}, "Restart");

function showAdapters() {
  const none = overview.adapters === 0;
  $("welcome").hidden = !none;
  $("listed").hidden = none;
  if (none) welcome();
  const shown = overview.first, search = $("filter").value.trim();
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
  const rows = overview.data, last = offset + rows.length;
  $("rest").hidden = !overview.rest && !(overview.matching === 0 && overview.adapters);
  say($("rest-title"), overview.first.length ? `${counted(overview.rest, "other adapter")}` : counted(overview.rest, "adapter"));
  $("paging").hidden = overview.rest <= ROWS;
  say($("place"), rows.length ? `${count(offset + 1)} to ${count(last)} of ${count(overview.rest)}` : "");
  $("previous").disabled = offset === 0;
  $("next").disabled = last >= overview.rest;
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
    const shown = jobRow(job, isOpen, () => { openedJob = isOpen ? "" : job.id; refresh(); });
    if (!isOpen) return [shown];
    const inside = jobCard(job, events, checkpoints, verbsOf(job).map((verb) => jobButton(job, verb)));
    return [shown, make("tr", { class: "opened" }, make("td", { colspan: 6 }, inside))];
  }) : [make("tr", {}, make("td", { colspan: 6, class: "empty" }, "No job was made yet."))]);
}

const VERBS = {
  pause: ["Pause", "Training stops, and goes on from there when the job is resumed.", "paused"],
  resume: ["Resume", "The job is put in the queue again.", "resumed"],
  cancel: ["Cancel", "The job ends; nothing of its training is kept.", "cancelled"],
};

function jobButton(job, verb) {
  const [does, says, done] = VERBS[verb];
  return make("button", { type: "button", "aria-label": `${does} ${job.id}`, click: () => change({
    title: `${does} this job?`, does: `${does} job`, path: jobPath(job.id, `/${verb}`), says, done: `${job.id} is ${done}.`, plain: true,
  }) }, does);
}

function showLoops({ data, ...details }) {
  const all = data.length && data[0].stopped_everywhere, loops = inOrder(data);
  const asking = data.filter(({ phase }) => phase === "asking").length;
  say($("loops-summary"), [counted(data.length, "loop"), asking ? `${count(asking)} waiting for a yes` : "", all ? `all stopped by ${all}` : ""].filter(Boolean).join(", "));
  draw("loops-switch", [data.length > 0 && overview.operator, all], () => data.length && overview.operator ? [everyLoop(all ? "start" : "stop")] : []);
  $("more-loops").hidden = data.length <= loopsShown;
  draw("loops", [loops.slice(0, loopsShown), details, [...compared]], () => data.length ? loops.slice(0, loopsShown).flatMap((loop) => {
    const isOpen = loop.name === openedLoop;
    const shown = loopRow(loop, isOpen, () => { openedLoop = isOpen ? "" : loop.name; openedTry = 0; refresh(); });
    if (!isOpen || details.loop?.name !== loop.name) return [shown];
    const inside = loopCard(details.loop, { ...details, compared }, onLoop, loopVerbs(details.loop).map((verb) => loopButton(details.loop, verb)));
    return [shown, make("tr", { class: "opened" }, make("td", { colspan: 6 }, inside))];
  }) : [make("tr", {}, make("td", { colspan: 6, class: "empty" }, "No adapter has a loop: give one a policy with loop."))]);
}

const onLoop = {
  open: (number) => { openedTry = number; refresh(); },
  compare: ({ name }, { candidate, live }) => change({
    title: `Compare the answers of ${name}?`, does: "Compare", path: adapterPath(name, `/versions/${candidate}/replay`), plain: true, body: COMPARED,
    says: `v${live} and v${candidate} answer the latest ${COMPARED.requests} captured requests, in the gaps of traffic. Nobody sees it, and nothing is kept.`,
    waits: "They are being asked.", done: "The answers are compared.", got: (report) => compared.set(`${name}@v${candidate}`, report),
  }),
};

const LOOP_VERBS = {
  run: ["Open a try", "It trains a version on what was asked lately; gate, canary and the month's budget stay as its policy says.", "asked to open a try"],
  approve: ["Say yes", "The candidate becomes the live version.", "told yes"],
  reject: ["End the try", "The candidate does not become live. The next try waits longer.", "told no"],
  stop: ["Stop", "A try that goes on ends, and none is opened until it is started again.", "stopped"],
  start: ["Start", "It may open tries again.", "started"],
};

function loopButton({ name }, verb) {
  const [does, says, done] = LOOP_VERBS[verb];
  return make("button", { type: "button", class: verb === "approve" && "primary", "aria-label": `${does}: the loop of ${name}`, click: () => change({
    title: `${does}: the loop of ${name}?`, does, path: adapterPath(name, `/loop/${verb}`), says, done: `The loop of ${name} is ${done}.`, plain: verb !== "reject",
  }) }, does);
}

function everyLoop(verb) {
  const [does, says, done] = LOOP_VERBS[verb];
  return make("button", { type: "button", "aria-label": `${does} every loop`, click: () => change({
    title: `${does} every loop?`, does: `${does} all`, path: `/v1/loops/${verb}`, plain: true, done: `Every loop is ${done}.`,
    says: verb === "stop" ? "On every server of the registry: tries that go on end, and none is opened until loops are started again."
      : `${says} Those that are stopped by themselves stay so.`,
  }) }, `${does} every loop`);
}

function welcome() {
  const key = keyed() ? '-H "Authorization: Bearer $LORADOCK_KEY" ' : "";
  say($("command"), `loradock adapters push my-adapter ./my-adapter --url ${location.origin}`);
  say($("command-curl"), `curl ${location.origin}/v1/adapters ${key}-F name=my-adapter -F files=@my-adapter/adapter_config.json `
    + "-F files=@my-adapter/adapter_model.safetensors");
  $("command-key").hidden = !keyed();
}

// ---- what is done

const on = {
  rollback: (adapter, version) => change({
    title: `Roll ${adapter.name} back?`, does: "Roll back", path: adapterPath(adapter.name, "/rollback"),
    says: `Version ${version.version} stops answering; version ${adapter.before}, which was live before, answers again.`,
    body: { expected_version: version.version }, done: `${adapter.name} is rolled back to v${adapter.before}.`,
  }),
  endCanary: (adapter, version) => change({
    title: `End the canary of ${adapter.name}?`, does: "End canary", path: adapterPath(adapter.name, "/canary"),
    says: `Version ${version.version} gets no more traffic.`, body: { version: version.version, weight: 0 },
    done: `The canary of ${adapter.name} has ended.`,
  }),
  startCanary: (adapter, version) => change({
    title: `Give ${adapter.name} v${version.version} a share?`, does: "Start canary", path: adapterPath(adapter.name, "/canary"),
    says: "The same askers get it each time.", body: { version: version.version }, weight: true,
    done: `${adapter.name} v${version.version} is a canary.`,
  }),
  promote: (adapter, version) => change({
    title: `Promote ${adapter.name} v${version.version}?`, does: "Promote", path: adapterPath(adapter.name, "/promote"),
    says: "Requests from now on answer from it; those under way finish where they began.",
    body: { version: version.version, expected_version: adapter.live ?? 0 }, done: `${adapter.name} v${version.version} is promoted.`,
  }),
  // Twenty more, from the latest on; the card leaves out those that it has already.
  older: async (adapter) => {
    const before = older.get(adapter.name)?.versions.at(-1).version ?? 2 ** 31;
    const more = await call(cardPath(adapter.name, `?before=${before}`)).catch(failed);
    if (!more?.versions.length) return;
    older.set(adapter.name, { ...more, versions: [...older.get(adapter.name)?.versions ?? [], ...more.versions] });
    showAdapters();
    showRest();
  },
};

async function change(ask) {
  const dialog = $("ask"), from = document.activeElement?.getAttribute("aria-label");
  refused = "";
  $("ask-title").textContent = ask.title;
  $("ask-says").textContent = ask.says;
  $("ask-do").textContent = ask.does;
  for (const id of ["ask-weight", "ask-weight-label"]) $(id).hidden = !ask.weight;
  for (const id of ["ask-why", "ask-why-label"]) $(id).hidden = Boolean(ask.plain);
  $("ask-weight").disabled = !ask.weight;
  $("ask-why").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  // What was drawn again meanwhile cannot get the focus back by itself.
  if (from) document.querySelector(`[aria-label="${CSS.escape(from)}"]`)?.focus();
  if (dialog.returnValue !== "do") return;
  const body = ask.plain ? ask.body : { ...ask.body, why: $("ask-why").value };
  if (ask.weight) body.weight = Number($("ask-weight").value) / 100;
  if (ask.waits) announce(ask.waits);
  try {
    const answer = await call(ask.path, "POST", body);
    ask.got?.(answer);
    older.clear();
    announce(ask.done);
  } catch (error) {
    refused = error.message; // stays until the next attempt
  }
  await refresh();
}

function announce(text) {
  $("announce").textContent = text;
}

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

function choose(name, focus = false) {
  tab = name;
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
  refused = opened = openedJob = openedLoop = "";
  older.clear();
  compared.clear();
  olderChanges = [];
  refresh();
});
for (const each of TABS) {
  $(`tab-${each}`).addEventListener("click", () => { choose(each); refresh(); });
  $(`tab-${each}`).addEventListener("keydown", (event) => {
    const seen = TABS.filter((name) => !$(`tab-${name}`).hidden), at = seen.indexOf(each);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(seen.at(to % seen.length), true);
    refresh();
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
  const search = encodeURIComponent($("changes-filter").value.trim());
  const more = await call(`/v1/overview/changes?limit=${CHANGES}&search=${search}&before=${$("older-changes").dataset.before}`).catch(failed);
  if (!more) return;
  olderChanges = [...olderChanges, ...more.data];
  $("older-changes").hidden = !more.has_more;
  await refresh();
});
$("more-jobs").addEventListener("click", () => { jobsShown = 100; refresh(); });
$("more-loops").addEventListener("click", () => { loopsShown += LOOPS; refresh(); });
$("copy").addEventListener("click", () => copy("command"));
$("copy-curl").addEventListener("click", () => copy("command-curl"));
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); else clearTimeout(timer); });
refresh();
