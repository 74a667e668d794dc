// Numbers as people read them, always with their unit.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

// 537990016 -> "513.1 MiB"; the exact number of bytes is for titles: exactBytes.
export function bytes(count) {
  if (count == null) return "–";
  let size = Math.abs(count);
  let unit = 0;
  while (size >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : size < 10 ? 2 : 1;
  return `${count < 0 ? "−" : ""}${size.toFixed(digits)} ${UNITS[unit]}`;
}

export const exactBytes = (count) => (count == null ? "" : `${whole(count)} bytes`);

export const whole = (count) => Math.round(count).toLocaleString("en-US");

// 134515008 -> "134.5 M"
export function short(count) {
  for (const [size, unit] of [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e3, " k"]]) {
    if (count >= size) return `${(count / size).toFixed(1)}${unit}`;
  }
  return whole(count);
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export const rate = (perSecond) => perSecond.toFixed(perSecond < 100 ? 1 : 0);

export function seconds(count) {
  if (count < 0.0095) return `${(count * 1000).toFixed(1)} ms`;
  if (count < 0.995) return `${Math.round(count * 1000)} ms`;
  return `${count < 10 ? count.toFixed(1) : Math.round(count)} s`;
}

// How long ago a moment in ISO 8601 was, in words.
export function ago(moment, now = Date.now()) {
  const passed = Math.max(0, Math.round((now - Date.parse(moment)) / 1000));
  if (passed < 60) return `${passed} s ago`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  return `${Math.floor(passed / 3600)} h ${Math.floor((passed % 3600) / 60)} min ago`;
}

export const clock = (moment) => new Date(moment).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
