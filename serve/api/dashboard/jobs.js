// Fine-tuning jobs: a row each, and below the open one its losses, its checkpoints and what happened.

import { age, count, decimal, make, pill, when } from "/dashboard/dom.js";

const KINDS = { succeeded: "good", running: "good", failed: "bad", paused: "warn" };
const OPEN = ["validating_files", "queued", "running", "paused"];
const WIDE = 520, LEFT = 42, TOP = 8, HIGH = 110, BOTTOM = 136;

export const verbsOf = (job) => !OPEN.includes(job.status) ? []
  : job.status === "paused" ? ["resume", "cancel"] : ["pause", "cancel"];

export function jobRow(job, opened, open) {
  const cell = (label, ...content) => make("td", { "data-label": label }, ...content);
  const left = job.estimated_finish && job.estimated_finish - Date.now() / 1000;
  return make("tr", { "data-job": job.id },
    make("th", { scope: "row" }, job.user_provided_suffix ?? job.id), cell("Status", pill(job.status, KINDS[job.status] ?? "")),
    cell("From", job.model), cell("Model", job.fine_tuned_model ?? (left > 0 ? `about ${age(left)} left` : "–")),
    cell("Created", when(job.created_at)),
    make("td", {}, make("button", {
      type: "button", "aria-expanded": String(opened), "aria-label": `Details of ${job.id}`, click: open,
    }, "Details")));
}

export function jobCard(job, events, checkpoints, buttons) {
  const used = job.method[job.method.type]?.hyperparameters ?? {};
  const facts = [job.method.type, ...Object.entries(used).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`), `seed ${job.seed}`];
  return make("article", { class: "card", "data-card": job.id },
    make("div", { class: "top" }, make("h3", {}, job.id), make("span", { class: "space" }), ...buttons),
    job.error?.message && make("p", { class: "reason" }, job.error.message),
    make("div", { class: "job" },
      make("p", { class: "note" }, facts.join(", "), job.trained_tokens ? `; ${count(job.trained_tokens)} tokens trained` : ""),
      lossesOf(events) ?? make("p", { class: "note" }, "No losses yet: two steps are drawn."),
      checkpoints.length > 0 && checkpointTable(checkpoints),
      make("ol", { class: "events", "aria-label": `Events of ${job.id}` }, ...events.map((event) => make("li", {},
        make("span", { class: "muted" }, when(event.created_at)),
        make("span", { class: event.level === "info" ? "" : event.level }, event.message))))));
}

// Drawn from a job's events; null while there is no second step.
export function lossesOf(events) {
  const steps = events.filter((event) => event.data?.step).map((event) => event.data).sort((one, other) => one.step - other.step);
  return steps.length > 1 ? losses(steps) : null;
}

function losses(steps) {
  const lines = [["train_loss", "training"], ["full_valid_loss", "held out"]]
    .map(([key, name]) => [key, name, steps.filter((step) => step[key] != null)]).filter(([, , there]) => there.length);
  const most = Math.max(...lines.flatMap(([key, , there]) => there.map((step) => step[key])), 0.01);
  const last = steps.at(-1).total_steps ?? steps.at(-1).step, first = steps[0].step;
  const x = (step) => LEFT + (WIDE - LEFT - 6) * (step - first) / Math.max(1, last - first), y = (loss) => TOP + HIGH * (1 - loss / most);
  const axes = make("g", { class: "axes", "aria-hidden": "true" });
  for (const part of [0, 0.5, 1]) {
    axes.append(make("line", { x1: LEFT, x2: WIDE, y1: y(part * most), y2: y(part * most) }),
      make("text", { x: LEFT - 4, y: y(part * most) + 3, "text-anchor": "end" }, decimal(part * most)));
  }
  for (const [step, anchor] of [[first, "start"], [last, "end"]]) {
    axes.append(make("text", { x: x(step), y: BOTTOM, "text-anchor": anchor }, `step ${count(step)}`));
  }
  const drawn = lines.map(([key, name, there]) => make("g", { class: `line ${key}` },
    make("polyline", { points: there.map((step) => `${x(step.step).toFixed(1)},${y(step[key]).toFixed(1)}`).join(" ") }),
    ...there.map((step) => make("circle", { cx: x(step.step), cy: y(step[key]), r: 2 },
      make("title", {}, `step ${step.step}: ${name} loss ${decimal(step[key], 4)}`)))));
  const ends = lines.map(([key, name, there]) => `${name} ${decimal(there[0][key], 3)} → ${decimal(there.at(-1)[key], 3)}`).join(", ");
  return make("figure", {}, make("figcaption", {}, `Loss by step: ${ends}`),
    make("svg", { viewBox: `0 0 ${WIDE} ${BOTTOM + 4}`, role: "img", "aria-label": `Loss by step: ${ends}` }, axes, ...drawn));
}

function checkpointTable(checkpoints) {
  const cell = (label, text) => make("td", { "data-label": label }, text);
  return make("div", { class: "trial" }, make("table", {},
    make("caption", { class: "hidden" }, "Checkpoints"),
    make("thead", {}, make("tr", {}, ...["Checkpoint", "Step", "Training loss", "Held-out loss"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...checkpoints.map(({ fine_tuned_model_checkpoint: model, step_number: step, metrics }) => make("tr", {},
      make("th", { scope: "row" }, model), cell("Step", count(step)), cell("Training loss", decimal(metrics.train_loss, 3)),
      cell("Held-out loss", decimal(metrics.full_valid_loss, 3)))))));
}
