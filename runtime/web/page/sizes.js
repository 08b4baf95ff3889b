// What tiers of other sizes would find: the curve, and a question that is answered in seconds.

import { AXIS, colour, onScheme } from "./charts.js";
import { el, facts } from "./dom.js";
import { bytes, perSecond, seconds, share } from "./format.js";
import { ask } from "./stream.js";

const EVERY_MS = 15000;
const HEIGHT = 200;

const around = ({ value, error }, text = share) => `${text(value)} \u00b1 ${text(error)}`;
const points = ({ value, error }) => `${(100 * value).toFixed(1)} \u00b1 ${(100 * error).toFixed(1)} points`;

// The section, which feeds itself while the page is shown.
export class Sizes {
  constructor() {
    this.place = el("div", { class: "chart sizes" });
    this.about = el("p", { class: "none" }, "no lookups yet");
    this.answer = el("div", { role: "status" });
    this.form = this.makeForm();
    this.element = el(
      "section",
      { class: "half tall" },
      el("h2", {}, "What another size would find"),
      this.about,
      this.place,
      this.form,
      this.answer,
    );
    this.plot = null;
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.place);
    onScheme(() => {
      this.plot?.destroy();
      this.plot = null;
      this.look();
    });
    this.look();
    setInterval(() => document.hidden || this.look(), EVERY_MS);
  }

  makeForm() {
    const tier = el("select", { name: "tier", "aria-label": "tier" }, ...["G2", "G3"].map((one) => el("option", {}, one)));
    const add = el("input", { name: "add", value: "64GiB", size: 8, "aria-label": "bytes more or less", required: "" });
    const form = el("form", { class: "line" }, tier, " with ", add, " more: ", el("button", {}, "ask"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.question(tier.value, add.value);
    });
    return form;
  }

  async look() {
    const { status, body } = await ask("../v1/curve");
    this.place.hidden = this.form.hidden = status !== 200;
    if (status !== 200) {
      this.about.textContent = body.detail ?? "not known";
      return;
    }
    const { sample, tiers } = body;
    const own = tiers.map((one) => `${one.tier} found ${share(one.found)}`).join(", ");
    this.about.textContent = sample.asked_chunks_total
      ? `Hits of an LRU cache by its size, of what was asked for in the last ${seconds(Math.min(sample.seconds, sample.window_s))}, with its bound. Really: ${own}. 1 key in ${(1 / sample.rate).toFixed(1)} is sampled.`
      : "no lookups yet";
    this.draw(body.points);
    await null; // a plot that is new is made at the end of this turn
    this.tell(body.points, tiers[0]);
  }

  draw(curve) {
    const column = (of) => curve.map(of);
    const data = [
      column((one) => one.size_bytes),
      column((one) => one.hit_rate.value),
      column((one) => Math.min(1, one.hit_rate.value + one.hit_rate.error)),
      column((one) => Math.max(0, one.hit_rate.value - one.hit_rate.error)),
    ];
    if (this.plot) {
      this.plot.setData(data);
      return;
    }
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const bound = { stroke: "transparent", points: { show: false }, value: (_, v) => (v === null ? "" : share(v)) };
    this.plot = new uPlot(
      {
        ...this.size(),
        cursor: { drag: { x: false, y: false } },
        scales: { x: { time: false, distr: 3, log: 2 }, y: { range: [0, 1] } },
        axes: [
          { ...axis, space: 70, size: AXIS, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : bytes(tick))) },
          { ...axis, size: 64, values: (_, ticks) => ticks.map(share) },
        ],
        bands: [{ series: [2, 3], fill: `${colour("--c1")}33` }],
        series: [
          { label: "size", value: (_, v) => (v === null ? "" : bytes(v)) },
          { label: "hits", stroke: colour("--c1"), width: 1.5, points: { show: false }, value: (_, v) => (v === null ? "" : share(v)) },
          { label: "at most", ...bound },
          { label: "at least", ...bound },
        ],
      },
      data,
      this.place,
    );
  }

  // Where no pointer is, the legend tells of the first tier as it is.
  tell(curve, tier) {
    if (!tier || this.plot.cursor.idx != null) return;
    const off = curve.map((one) => Math.abs(Math.log(one.size_bytes / tier.at.size_bytes)));
    this.plot.setLegend({ idx: off.indexOf(Math.min(...off)) });
  }

  size() {
    return { width: Math.max(120, this.place.clientWidth), height: HEIGHT };
  }

  async question(tier, add) {
    this.answer.replaceChildren(el("p", { class: "none" }, "it takes some seconds"));
    const query = new URLSearchParams({ tier, add });
    const { status, body } = await ask(`../v1/what-if?${query}`);
    if (status !== 200) {
      this.answer.replaceChildren(el("p", { class: "none" }, body.detail ?? `answered ${status}`));
      return;
    }
    const { answer } = body;
    const flows = answer.flows.map((flow) => [
      `${flow.source} \u2192 ${flow.target}`,
      `${around(flow.tokens, perSecond)} tokens` + (flow.saved_s ? `, saves ${around(flow.saved_s, seconds)} a second` : ""),
    ]);
    this.answer.replaceChildren(
      facts([
        [`${answer.tier} ${bytes(answer.now_bytes)} \u2192 ${bytes(answer.then_bytes)}`, points(answer.gain)],
        ["found now", around(answer.hit_now)],
        ["found then", around(answer.hit_then)],
        ...flows,
      ]),
    );
  }
}
