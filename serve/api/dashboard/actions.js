// What buttons do: each asks first, says what will happen, and why may be given for the history.

import { adapterPath, call, download, enginePath, jobPath } from "/dashboard/api.js";
import { askAddress } from "/dashboard/addresses.js";
import { $, announce, make } from "/dashboard/dom.js";

// Captured requests that both versions are asked, the longest answer in tokens, and how many are shown.
const COMPARED = { against: "live", requests: 20, max_tokens: 128, examples: 5 };

// What the page does after a change, with the sentence of a refusal or ""; set by the page.
export const after = { change: async () => {}, compared: () => {} };

export async function change(ask) {
  const dialog = $("ask"), from = document.activeElement?.getAttribute("aria-label");
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
  const body = ask.plain ? ask.body : { ...ask.body, [ask.note ?? "why"]: $("ask-why").value };
  if (ask.weight) body.weight = Number($("ask-weight").value) / 100;
  if (ask.waits) announce(ask.waits);
  let refusal = "";
  try {
    const answer = await call(ask.path, "POST", body);
    ask.got?.(answer);
    announce(ask.done);
  } catch (error) {
    refusal = error.message; // stays until the next attempt
  }
  await after.change(refusal);
}

const button = (text, label, click, kind = "") => make("button", { type: "button", class: kind, "aria-label": label, click }, text);

export const versionActions = {
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
  accept: (adapter, version, signal) => change({
    title: `Take the change of ${adapter.name} v${version.version} as usual?`, does: "It is here to stay", path: adapterPath(adapter.name, "/drift/accept"),
    says: "Recent requests become what later ones are compared with; what is missing of them is gathered first.", note: "note",
    body: { version: version.version, signals: ["output", "logprob", "probe"].includes(signal) ? "output" : "prompt" },
    done: `The drift of ${adapter.name} v${version.version} is accepted.`,
  }),
  acknowledge: (adapter, version) => change({
    title: `Close the alarms of ${adapter.name} v${version.version}?`, does: "It is over", path: adapterPath(adapter.name, "/drift/acknowledge"),
    says: "The evidence begins again at nothing, against the same reference. If the change goes on, so do the alarms.",
    body: { version: version.version }, plain: true, done: `The alarms of ${adapter.name} v${version.version} are closed.`,
  }),
};

export const restartButton = (engine) => button("Restart", `Restart the engine ${engine.name}`, () => change({
  title: `Restart the engine ${engine.name}?`, does: "Restart", path: enginePath(engine.name, "/restart"),
  says: `It is down: ${engine.reason}. It starts as long as it did with the server, and loads its adapters again.`,
  done: `The engine ${engine.name} is being started.`, plain: true,
}), "primary");

// ---- jobs

const VERBS = {
  pause: ["Pause", "Training stops, and goes on from there when the job is resumed.", "paused"],
  resume: ["Resume", "The job is put in the queue again.", "resumed"],
  cancel: ["Cancel", "The job ends; nothing of its training is kept.", "cancelled"],
};

export function jobButton(job, verb) {
  const [does, says, done] = VERBS[verb];
  return button(does, `${does} ${job.id}`, () => change({
    title: `${does} this job?`, does: `${does} job`, path: jobPath(job.id, `/${verb}`), says, done: `${job.id} is ${done}.`, plain: true,
  }));
}

const FILES = ["adapter_config.json", "adapter_model.safetensors"];

// What can be done with the version that a job made: ask it, promote it, take it along.
export function resultButtons(job) {
  const [, name, version] = /^(.+)@v(\d+)$/s.exec(job.fine_tuned_model ?? "") ?? [];
  if (!name) return [];
  const model = job.fine_tuned_model;
  return [
    make("a", { class: "button", href: askAddress(name, version), "aria-label": `Ask ${model}` }, "Ask"),
    button("Promote", `Promote ${model}`, () => change({
      title: `Promote ${name} v${version}?`, does: "Promote", path: adapterPath(name, "/promote"), body: { version: Number(version) },
      says: "Requests from now on answer from it; those under way finish where they began.", done: `${name} v${version} is promoted.`,
    })),
    button("Download", `Download ${model}`, async () => {
      try {
        for (const file of FILES) await download(adapterPath(name, `/versions/${version}/files/${file}`), file);
        announce(`${model} is downloaded.`);
      } catch (error) {
        await after.change(error.message);
      }
    }),
  ];
}

// ---- loops

const LOOP_VERBS = {
  run: ["Open a try", "It trains a version on what was asked lately; gate, canary and the month's budget stay as its policy says.", "asked to open a try"],
  approve: ["Say yes", "The candidate becomes the live version.", "told yes"],
  reject: ["End the try", "The candidate does not become live. The next try waits longer.", "told no"],
  stop: ["Stop", "A try that goes on ends, and none is opened until it is started again.", "stopped"],
  start: ["Start", "It may open tries again.", "started"],
};

export function loopButton({ name }, verb) {
  const [does, says, done] = LOOP_VERBS[verb];
  return button(does, `${does}: the loop of ${name}`, () => change({
    title: `${does}: the loop of ${name}?`, does, path: adapterPath(name, `/loop/${verb}`), says, done: `The loop of ${name} is ${done}.`, plain: verb !== "reject",
  }), verb === "approve" ? "primary" : "");
}

export function everyLoop(verb) {
  const [does, says, done] = LOOP_VERBS[verb];
  return button(`${does} every loop`, `${does} every loop`, () => change({
    title: `${does} every loop?`, does: `${does} all`, path: `/v1/loops/${verb}`, plain: true, done: `Every loop is ${done}.`,
    says: verb === "stop" ? "On every server of the registry: tries that go on end, and none is opened until loops are started again."
      : `${says} Those that are stopped by themselves stay so.`,
  }));
}

export const compareAnswers = ({ name }, { candidate, live }) => change({
  title: `Compare the answers of ${name}?`, does: "Compare", path: adapterPath(name, `/versions/${candidate}/replay`), plain: true, body: COMPARED,
  says: `v${live} and v${candidate} answer the latest ${COMPARED.requests} captured requests, in the gaps of traffic. Nobody sees it, and nothing is kept.`,
  waits: "They are being asked.", done: "The answers are compared.", got: (report) => after.compared(`${name}@v${candidate}`, report),
});
