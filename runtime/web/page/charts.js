// Figures over time, drawn by uPlot. Counters become rates here.

import { el } from "./dom.js";
import { bytes } from "./format.js";

const KEPT = 600;
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);
const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5"];
export const AXIS = 28; // of the axis below a chart

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The figures of the last minutes, by name, in columns as long as `at`.
export class History {
  constructor(hello) {
    this.at = hello.at.slice();
    this.columns = new Map(Object.entries(hello.figures));
  }

  push({ at, figures }) {
    if (this.at.length && at <= this.at[this.at.length - 1]) return;
    this.at.push(at);
    for (const name of Object.keys(figures)) {
      if (!this.columns.has(name)) this.columns.set(name, new Array(this.at.length - 1).fill(null));
    }
    for (const [name, column] of this.columns) column.push(figures[name] ?? null);
    while (this.at.length > KEPT) {
      this.at.shift();
      for (const column of this.columns.values()) column.shift();
    }
  }

  gauge(name) {
    return this.columns.get(name) ?? this.at.map(() => null);
  }

  // A counter's growth a second, over the last `span` samples; none where the program began anew.
  rate(name, span = 5) {
    const column = this.gauge(name);
    return column.map((value, i) => {
      const first = Math.max(0, i - span);
      const before = column[first];
      if (i === first || value === null || before === null || value < before) return null;
      return (value - before) / (this.at[i] - this.at[first]);
    });
  }

  // Of two counters' growth, the first one's part of both together, or of the second.
  ratio(part, others, span = 30) {
    const [a, b] = [this.rate(part, span), others.map((name) => this.rate(name, span))];
    return a.map((value, i) => {
      const whole = b.reduce((sum, column) => sum + (column[i] ?? 0), 0);
      return value === null || whole <= 0 ? null : value / whole;
    });
  }
}

// Colours are taken when a chart is made: `again` makes it anew.
export const onScheme = (again) => matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);

export class Chart {
  // `lines` are [label, history => values]; `text` writes a value. `limits.band`: two lines, the
  // higher first, that are the edges of an area.
  constructor(title, width, text, lines, limits = {}) {
    this.text = text;
    this.lines = lines;
    this.limits = limits;
    this.place = el("div", { class: "chart" });
    this.element = el("section", { class: width }, el("h2", {}, title), this.place);
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.place);
    onScheme(() => this.plot && this.build());
  }

  build() {
    const data = this.plot?.data ?? [[], ...this.lines.map(() => [])];
    this.plot?.destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const clock = (at) => new Date(at * 1000).toTimeString().slice(0, 8);
    const options = {
      ...this.size(),
      cursor: { drag: { x: false, y: false } },
      scales: { y: { range: (_, low, high) => [0, this.limits.max ?? (high > 0 ? high * 1.08 : 1)] } },
      axes: [
        { ...axis, space: 80, size: AXIS, values: (_, ticks) => ticks.map(clock) },
        {
          ...axis,
          size: 64,
          values: (_, ticks) => ticks.map((tick) => this.text(tick)),
          ...(this.text === bytes ? { incrs: POWERS } : {}),
        },
      ],
      bands: this.limits.band ? [{ series: this.limits.band, fill: `${colour("--c2")}22` }] : [],
      series: [
        { value: (_, at) => (at === null ? "" : clock(at)) },
        ...this.lines.map(([label], i) => ({
          label,
          stroke: colour(COLOURS[i % COLOURS.length]),
          width: 1.5,
          points: { show: false },
          value: (_, value) => (value === null ? "" : this.text(value)),
        })),
      ],
    };
    this.plot = new uPlot(options, data, this.place);
  }

  size() {
    return { width: Math.max(120, this.place.clientWidth), height: 160 };
  }

  resize() {
    this.plot?.setSize(this.size());
  }

  draw(history) {
    if (!this.plot) {
      this.build();
    }
    this.plot.setData([history.at, ...this.lines.map(([, values]) => values(history))]);
    // Where no pointer is, the legend tells what is now.
    if (this.plot.cursor.idx == null) this.plot.setLegend({ idx: history.at.length - 1 });
  }
}
