// Asks the server. The key lives in this module's memory alone: not in the address, not in any storage.

let key = "";

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }

  get unknown() { return this.status === 401 || this.status === 403; }
}

export const use = (secret) => { key = secret; };
export const keyed = () => key !== "";

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

const OPTIONS = { credentials: "omit", cache: "no-store", redirect: "error" };

export async function call(path, method = "GET", body = undefined) {
  const sent = body === undefined ? {} : { body: JSON.stringify(body) };
  const answer = await fetch(path, { ...OPTIONS, ...sent, method, headers: headers(sent.body ? { "Content-Type": "application/json" } : {}) });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, content.error?.message ?? `${path}: ${answer.status}`);
  return content;
}

// The chunks of a streamed answer, one after another; `signal` ends it, `began` is told the request's id.
export async function* stream(path, body, signal, began) {
  const answer = await fetch(path, {
    ...OPTIONS, method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ ...body, stream: true }), signal,
  });
  if (!answer.ok) {
    const content = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, content.error?.message ?? `${path}: ${answer.status}`);
  }
  began(answer.headers.get("x-request-id"));
  let rest = "";
  for await (const piece of pieces(answer.body.pipeThrough(new TextDecoderStream()).getReader())) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data: ") ? line.slice(6).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* pieces(reader) {
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

// Files of a version, saved by the browser.
export async function download(path, name) {
  const answer = await fetch(path, { ...OPTIONS, headers: headers() });
  if (!answer.ok) {
    const content = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, content.error?.message ?? `${path}: ${answer.status}`);
  }
  const link = document.createElement("a"), address = URL.createObjectURL(await answer.blob());
  [link.href, link.download] = [address, name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

const encoded = (name) => name.split("/").map(encodeURIComponent).join("/");

export const adapterPath = (name, rest = "") => `/v1/adapters/${encoded(name)}${rest}`;
export const cardPath = (name, rest = "") => `/v1/overview/adapters/${encoded(name)}${rest}`;
export const jobPath = (id, rest = "") => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}${rest}`;
export const enginePath = (name, rest) => `/v1/engines/${encoded(name)}${rest}`;
