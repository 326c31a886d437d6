// Addresses within the page: each view, adapter, alarm, job and loop has one, behind the #.

export const TABS = ["adapters", "changes", "jobs", "loops", "playground", "engines"];

const encoded = (name) => name.split("/").map(encodeURIComponent).join("/");

export const adapterAddress = (name) => `#/adapters/${encoded(name)}`;
export const alarmAddress = (name, version, signal) => `#/alarms/${encoded(name)}@v${version}/${signal}`;
export const alarmId = (name, version, signal) => `alarm-${name}-v${version}-${signal}`;
export const jobAddress = (id) => `#/jobs/${encodeURIComponent(id)}`;
export const loopAddress = (name) => `#/loops/${encoded(name)}`;
export const askAddress = (name, version = null) => `#/playground/${encoded(name)}${version == null ? "" : `@v${version}`}`;

// Which view an address is of, and what is open in it; `alarm` is the id of what is looked for.
export function read(address) {
  let path = "";
  try {
    path = decodeURIComponent(address.replace(/^#\/?/, ""));
  } catch { /* half an escape: the first view */ }
  const [, tab, rest = ""] = /^([a-z]+)(?:\/(.*))?$/s.exec(path) ?? [];
  const [, name, version, signal] = tab === "alarms" ? /^(.+)@v(\d+)\/(\w+)$/s.exec(rest) ?? [] : [];
  if (name) return { tab: "adapters", open: name, alarm: alarmId(name, version, signal) };
  return TABS.includes(tab) ? { tab, open: rest, alarm: "" } : { tab: "adapters", open: "", alarm: "" };
}
