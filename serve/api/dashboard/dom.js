// Elements, and how numbers are written. Text goes into the page as text alone.

const SVG = ["svg", "g", "rect", "line", "text", "title", "circle", "polyline", "polygon"];

export const $ = (id) => document.getElementById(id);

// An attribute that is a function listens; one that is null, undefined or false is left out.
export function make(tag, attributes = {}, ...content) {
  const made = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...content.filter((part) => part !== null && part !== undefined && part !== false));
  return made;
}

// What a screen reader says now.
export function announce(text) {
  $("announce").textContent = text;
}

const unfolded = new Set();

// What is shown on request; it stays open when it is drawn again. `key` names it on the whole page.
export function fold(key, summary, ...content) {
  const details = make("details", { open: unfolded.has(key) }, make("summary", { "aria-label": `${summary}: ${key}` }, summary), ...content);
  details.addEventListener("toggle", () => { if (details.open) unfolded.add(key); else unfolded.delete(key); });
  return details;
}

// A text is set only when it is another one: screen readers read again what is set again.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  element.hidden = !text;
}

export const pill = (text, kind = "", title = null) => make("span", { class: `pill ${kind}`, title }, text);
export const count = (number) => number.toLocaleString("en");
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
export const percent = (part) => `${Math.round(100 * part)} %`;
export const decimal = (number, digits = 2) => number == null ? "–" : String(Number(number.toFixed(digits)));

export function seconds(value) {
  if (value == null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${decimal(value, 1)} s`;
}

export function bytes(value) {
  const step = value >= 2 ** 30 ? 3 : value >= 2 ** 20 ? 2 : 1;
  return `${decimal(value / 1024 ** step, 1)} ${["", "kB", "MB", "GB"][step]}`;
}

export function age(value) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (value >= size) return `${Math.floor(value / size)} ${unit}`;
  }
  return `${Math.max(0, Math.round(value))} s`;
}

export const when = (at) => new Date(at * 1000).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });
export const date = (at) => new Date(at * 1000).toLocaleDateString(undefined, { dateStyle: "medium" });
