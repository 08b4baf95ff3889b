// Numbers as people read them. All take what JSON has, and show nothing known as a dash.

const NONE = "\u2013";
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

const known = (value) => typeof value === "number" && Number.isFinite(value);

function scaled(value, base, units) {
  let at = 0;
  while (Math.abs(value) >= base && at + 1 < units.length) {
    value /= base;
    at += 1;
  }
  const digits = at === 0 || Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toFixed(digits)}\u00a0${units[at]}`.trim();
}

export const count = (value) => (known(value) ? number.format(value) : NONE);

export const short = (value) =>
  !known(value) ? NONE : Math.abs(value) < 1000 ? number.format(value) : scaled(value, 1000, ["", "k", "M", "G", "T"]);

export const bytes = (value) =>
  known(value) ? scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]) : NONE;

export const byteRate = (value) =>
  known(value) ? `${scaled(value, 1000, ["B", "kB", "MB", "GB", "TB"])}/s` : NONE;

export const perSecond = (value) => (known(value) ? `${short(value)}/s` : NONE);

export const share = (value) => (known(value) ? `${(100 * value).toFixed(value >= 0.9995 || value === 0 ? 0 : 1)} %` : NONE);

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${(value * 1e6).toFixed(value < 1e-5 ? 1 : 0)} \u00b5s`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 0)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

export function ago(at, now) {
  if (!known(at)) return NONE;
  const passed = Math.max(0, Math.round(now - at));
  return passed < 120 ? `${passed} s ago` : `${seconds(passed)} ago`;
}
