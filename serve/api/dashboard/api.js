// Asks the server. The key lives in this module's memory alone: not in the address, not in any storage.

let key = "";

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }

  get unknown() { return this.status === 401 || this.status === 403; }
}

export const use = (secret) => { key = secret; };
export const keyed = () => key !== "";

export async function call(path, method = "GET", body = undefined) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body),
    credentials: "omit", cache: "no-store", redirect: "error",
  });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, content.error?.message ?? `${path}: ${answer.status}`);
  return content;
}

const encoded = (name) => name.split("/").map(encodeURIComponent).join("/");

export const adapterPath = (name, rest = "") => `/v1/adapters/${encoded(name)}${rest}`;
export const cardPath = (name, rest = "") => `/v1/overview/adapters/${encoded(name)}${rest}`;
export const jobPath = (id, rest = "") => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}${rest}`;
export const enginePath = (name, rest) => `/v1/engines/${encoded(name)}${rest}`;
