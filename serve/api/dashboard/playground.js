// The playground: one prompt, answered side by side by the base model, the live version and a candidate.

import { call, cardPath, stream } from "/dashboard/api.js";
import { askAddress } from "/dashboard/addresses.js";
import { $, announce, count, decimal, make, pill, say, seconds } from "/dashboard/dom.js";

const PATH = "/v1/chat/completions", LONGEST = 4096;
let asked = null; // ends the answers that are under way
let open = ""; // NAME or NAME@vN, as in the page's address
let shown = null; // the address for which the choice was filled in
let filling = null, filled = null; // until the columns of what is open are there

// The address that was arrived at. Its columns come with the next overview; a question waits for them.
export function opens(address) {
  open = address;
  if (shown !== open && !filled) filling = new Promise((resolve) => { filled = resolve; });
}

export const address = () => (open ? askAddress(open) : "#/playground");

// `overview` knows adapters and engines.
export async function showPlayground(overview) {
  const names = [...overview.first, ...overview.data].map(({ name }) => name);
  $("play-names").replaceChildren(...names.map((name) => make("option", { value: name })));
  if (shown === open && ($("play-name").value || !names.length)) return;
  shown = open;
  const [, name = open, version = ""] = /^(.+)@v(\d+)$/s.exec(open) ?? [];
  $("play-name").value = name || names[0] || "";
  await drawing(overview, version);
}

async function drawing(overview, version = "") {
  const done = fill(overview, version);
  if (!filled) filling = done;
  await done;
  if (shown !== open) return; // another came meanwhile
  filled?.();
  filled = null;
}

// The versions of the adapter that is named, the one that matters most first.
async function fill(overview, version = "") {
  const name = $("play-name").value.trim();
  const card = name ? await call(cardPath(name)).catch(() => null) : null;
  if (name !== $("play-name").value.trim()) return; // another was named meanwhile
  say($("play-problem"), name && !card ? `There is no adapter ${name}.` : "");
  const base = card?.engine ?? overview.engines[0]?.name ?? "";
  const others = (card?.versions ?? []).map((each) => each.version).filter((each) => each !== card.live);
  if (version && !others.includes(Number(version)) && Number(version) !== card?.live) others.unshift(Number(version));
  const chosen = Number(version) || card?.canary?.version || others[0];
  $("play-version").replaceChildren(make("option", { value: "" }, "none"),
    ...others.map((each) => make("option", { value: each, selected: each === chosen }, `v${each}${each === card.canary?.version ? ", canary" : ""}`)));
  draw(base, name, card);
}

// A column each: its title, the model that is asked, and what it said.
function draw(base, name, card) {
  const candidate = $("play-version").value;
  const columns = [["Base model", base]];
  if (card?.live != null) columns.push([`Live, v${card.live}`, `${name}@v${card.live}`]);
  if (candidate) columns.push([`Candidate, v${candidate}`, `${name}@v${candidate}`]);
  $("play-answers").dataset.base = base;
  $("play-answers").replaceChildren(...columns.filter(([, model]) => model).map(([title, model]) => make("section",
    { class: "card answer", "data-model": model, "aria-label": title },
    make("div", { class: "top" }, make("h3", {}, title), make("span", { class: "muted" }, model)),
    make("p", { class: "said" }), make("p", { class: "note" }), make("div", { class: "do" }))));
}

export function changed(overview) {
  shown = open = $("play-name").value.trim();
  if (open) history.replaceState(null, "", askAddress(open));
  return drawing(overview);
}

export async function versionChanged() {
  const name = $("play-name").value.trim(), card = await call(cardPath(name)).catch(() => null);
  draw($("play-answers").dataset.base, name, card);
}

export async function ask() {
  stop();
  const prompt = $("play-prompt").value.trim();
  if (!prompt) return;
  await filling;
  asked = new AbortController();
  const mine = asked, columns = [...$("play-answers").children];
  $("play-stop").hidden = false;
  announce("They are being asked.");
  await Promise.all(columns.map((column) => answer(column, prompt, mine.signal)));
  if (asked === mine) {
    stop();
    announce(`${count(columns.length)} answers are there.`);
  }
}

export function stop() {
  asked?.abort();
  asked = null;
  $("play-stop").hidden = true;
}

async function answer(column, prompt, signal) {
  const [said, note, act] = [column.querySelector(".said"), column.querySelector(".note"), column.querySelector(".do")];
  said.textContent = note.textContent = "";
  act.replaceChildren();
  column.setAttribute("aria-busy", "true");
  const began = performance.now(), body = { model: column.dataset.model, messages: [{ role: "user", content: prompt }], user: "playground" };
  body.max_tokens = Math.min(LONGEST, Math.max(1, Number($("play-tokens").value) || 128));
  if ($("play-temperature").value !== "") body.temperature = Number($("play-temperature").value);
  let first = 0, tokens = 0, id = "", why = "";
  try {
    for await (const chunk of stream(PATH, body, signal, (request) => { id = request; })) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices?.[0], text = choice?.delta?.content;
      if (text) {
        first ||= performance.now();
        tokens += 1;
        said.append(text);
      }
      why = choice?.finish_reason ?? why;
    }
    const last = performance.now();
    note.textContent = [first ? `first token after ${seconds((first - began) / 1000)}` : "nothing said",
      tokens > 1 ? `${decimal((tokens - 1) / ((last - first) / 1000), 0)} pieces/s` : "",
      why === "length" ? "cut at the longest answer" : ""].filter(Boolean).join(", ");
    if (id) act.append(...rating(id, column.getAttribute("aria-label"), act));
  } catch (error) {
    note.textContent = signal.aborted ? "stopped" : error.message;
    note.classList.toggle("moved", !signal.aborted);
  }
  column.removeAttribute("aria-busy");
}

function rating(id, title, act) {
  const rate = (text, value) => make("button", { type: "button", "aria-label": `${text} answer: ${title}`, click: async () => {
    try {
      await call("/v1/feedback", "POST", { request_id: id, rating: value });
      act.replaceChildren(pill(`rated ${text.toLowerCase()}`, value ? "good" : "bad"));
      announce(`${title}: rated ${text.toLowerCase()}.`);
    } catch (error) {
      act.replaceChildren(make("p", { class: "moved" }, error.message));
    }
  } }, text);
  return [rate("Good", 1), rate("Bad", 0)];
}
