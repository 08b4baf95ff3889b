// Elements. Text goes in as text, whatever an engine calls itself.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const figure = (value, unit = "") => el("div", { class: "number" }, value, el("small", {}, unit));

export const facts = (pairs) =>
  el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));

export function bar(part) {
  const fill = el("i", part > 0.97 ? { "data-level": "full" } : {});
  fill.style.width = `${Math.min(100, Math.max(0, 100 * part))}%`;
  return el("div", { class: "bar" }, fill);
}

// Columns are [heading, class, value of a row]; a value is text, or [text, further class].
export function table(columns, rows, none = "none") {
  if (!rows.length) return el("p", { class: "none" }, none);
  const head = columns.map(([heading, kind]) => el("th", { class: kind, scope: "col" }, heading));
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      ...columns.map(([, kind, value]) => {
        const [text, more] = [value(row)].flat();
        return el("td", { class: `${kind} ${more ?? ""}`.trim() }, String(text));
      }),
    ),
  );
  return el(
    "div",
    { class: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)),
  );
}

// A place in the page whose content is made anew with each state.
export class Slot {
  constructor(title, width) {
    this.title = title;
    this.body = el("div");
    this.small = el("small");
    this.element = el("section", { class: width }, el("h2", {}, title, this.small), this.body);
  }

  show(content, small = "") {
    this.body.replaceChildren(...[content].flat());
    this.small.textContent = small;
  }
}
