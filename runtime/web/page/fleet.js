// A fleet as its router sees it: engines, decisions and why, shared prefixes, nodes heard.

import { Chart } from "./charts.js";
import { facts, figure, Slot, table } from "./dom.js";
import { ago, bytes, count, perSecond, seconds, share, short } from "./format.js";

const last = (values) => values[values.length - 1];

const cost = (value, unit) => (unit === "s" || unit === "seconds" ? seconds(value) : `${count(value)} ${unit ?? ""}`.trim());

// A decision as a sentence.
export function sentence(made) {
  const found = Object.entries(made.found_tokens).map(([tier, tokens]) => `${short(tokens)} in ${tier.toUpperCase()}`);
  const had = found.length ? `it has ${found.join(", ")}` : "none of it is there";
  const parts = [`${made.policy}: ${had} of ${short(made.prompt_tokens)} tokens`];
  if (made.reason !== "policy") parts.push(made.reason === "session" ? "same session" : "asked for by name");
  if (made.cost !== null) {
    const best = made.next_best;
    const other = best ? `, next best ${best.worker} at ${cost(best.cost, made.unit)}` : "";
    parts.push(`cost ${cost(made.cost, made.unit)}${other}`);
  }
  if (made.prefill) parts.push(`prompt computed by ${made.prefill}`);
  if (made.waited_s > 0.001) parts.push(`waited ${seconds(made.waited_s)}`);
  return parts.join("; ");
}

// What the planner wants, has and expects, where one is named in the settings.
class Plans {
  constructor() {
    const line = (name) => [name, (points) => points[name]];
    this.engines = new Chart("Planned engines, and serving ones", "half", count, [line("target"), line("serving")]);
    const rates = ["rate", "forecast", "low", "high"].map(line);
    this.rates = new Chart("Requests: seen, and expected when an engine started now would serve", "half", perSecond, rates, { band: [4, 3] });
    this.why = new Slot("Planner", "");
    this.parts = [this.engines, this.rates, this.why];
    for (const part of this.parts) part.element.hidden = true;
  }

  show(planner) {
    for (const part of this.parts) part.element.hidden = !planner;
    if (!planner) return;
    const { points } = planner;
    const column = (name) => points.map((point) => point[name]);
    const names = ["at", "target", "serving", "rate", "forecast", "low", "high"];
    const columns = Object.fromEntries(names.map((name) => [name, column(name)]));
    this.engines.draw(columns);
    this.rates.draw(columns);
    this.why.show(
      table(
        [
          ["engines", "", (r) => r.role],
          ["rule", "", (r) => r.kind],
          ["asks for", "n", (r) => (r.engines === 1 ? "1 engine" : `${count(r.engines)} engines`)],
          ["why", "why", (r) => r.text],
        ],
        planner.reasons,
        planner.error ?? "no plan yet",
      ),
      planner.error ?? planner.url,
    );
  }
}

export class FleetView {
  constructor() {
    this.about = "";
    this.numbers = ["Requests", "Prompt tokens found", "Time to first token", "Running"].map(
      (title) => new Slot(title, "quarter"),
    );
    this.charts = [
      new Chart("Requests", "half", perSecond, [
        ["routed", (h) => h.rate("requests")],
        ["refused", (h) => h.rate("rejected")],
      ]),
      new Chart("Prompt tokens found in a tier", "half", share, [
        ["found", (h) => h.ratio("found_tokens", ["prompt_tokens"])],
      ], { max: 1 }),
      new Chart("Time to first token, mean", "half", seconds, [
        ["TTFT", (h) => h.ratio("first_token_s", ["first_tokens"], 10)],
      ]),
      new Chart("Requests on engines and in line", "half", count, [
        ["running", (h) => h.gauge("running")],
        ["waiting", (h) => h.gauge("waiting")],
      ]),
    ];
    this.engines = new Slot("Engines", "");
    this.decisions = new Slot("Last decisions", "");
    this.prefixes = new Slot("Top shared prefixes", "half");
    this.nodes = new Slot("Nodes heard", "half");
    this.plans = new Plans();
    const slots = [this.engines, this.decisions, this.prefixes, this.nodes];
    this.elements = [...this.numbers, ...this.charts, ...this.plans.parts, ...slots].map((one) => one.element);
  }

  // What is wrong, in words.
  show(state, history, now) {
    this.about = `namespace ${state.namespace}, policy ${state.policy}, version ${state.version}`;
    this.showNumbers(state, history);
    for (const chart of this.charts) chart.draw(history);
    this.showEngines(state.models);
    this.showDecisions(state.decisions, now);
    this.showPrefixes(state.prefixes);
    this.showNodes(state);
    this.plans.show(state.planner);
    const failed = Object.entries(state.readiness).filter(([, why]) => why !== null);
    return failed.map(([check, why]) => `${check}: ${why}`);
  }

  showNumbers(state, history) {
    const minute = (name) => last(history.rate(name, 60));
    const [requests, found, first, running] = this.numbers;
    requests.show([figure(perSecond(minute("requests"))), facts([["in all", short(last(history.gauge("requests")))]])]);
    const part = last(history.ratio("found_tokens", ["prompt_tokens"], 60));
    found.show([figure(share(part)), facts([["prompt tokens", perSecond(minute("prompt_tokens"))]])]);
    const ttft = last(history.ratio("first_token_s", ["first_tokens"], 60));
    first.show([figure(seconds(ttft)), facts([["output tokens", perSecond(minute("output_tokens"))]])]);
    const gauge = (name) => count(last(history.gauge(name)));
    running.show([figure(gauge("running"), `on ${gauge("engines")} engines`), facts([["in line", gauge("waiting")]])]);
    for (const slot of this.numbers) slot.small.textContent = slot === running ? "now" : "last minute";
  }

  showEngines(models) {
    const rows = models.flatMap((model) => model.workers.map((worker) => ({ ...worker, model: model.model })));
    const held = (tier) => (worker) => short(worker.held_blocks[tier]);
    this.engines.show(
      table(
        [
          ["worker", "id", (w) => w.worker],
          ["model", "", (w) => w.model],
          ["role", "", (w) => w.role],
          ["state", "", (w) => [w.busy ?? w.state, w.busy ? "bad" : w.state === "serving" ? "good" : "warn"]],
          ["requests", "n", (w) => count(w.load.requests)],
          ["prefill tokens", "n", (w) => short(w.load.prefill_tokens)],
          ["active blocks", "n", (w) => `${short(w.load.blocks)} of ${short(w.capacity.kv_blocks)}`],
          ...["g1", "g2", "g3", "g4"].map((tier) => [`${tier.toUpperCase()} blocks`, "n", held(tier)]),
          ["a prefill token", "n", (w) => `${seconds(w.speed.prefill_s_per_token)}, ${w.speed.prefill_from}`],
        ],
        rows,
        "no engine was found yet",
      ),
    );
  }

  showDecisions(decisions, now) {
    this.decisions.show(
      table(
        [
          ["when", "n", (d) => ago(d.at, now)],
          ["request", "id spare", (d) => d.request.slice(0, 24)],
          ["model", "spare", (d) => d.model],
          ["worker", "id", (d) => d.worker],
          ["why", "why", sentence],
        ],
        decisions,
        "none yet",
      ),
    );
  }

  showPrefixes(prefixes) {
    this.prefixes.show(
      table(
        [
          ["prefix", "id", (p) => p.prefix],
          ["model", "", (p) => p.model],
          ["at least", "n", (p) => `${short(p.tokens)} tokens`],
          ["requests", "n", (p) => count(p.requests)],
          ["found it", "n", (p) => share(p.found_requests / p.requests)],
        ],
        prefixes,
        "no two of the latest prompts begin alike",
      ),
      "of the latest 1,024 prompts",
    );
  }

  showNodes({ nodes, index, exact, plane }) {
    const about = exact === null ? "no events are followed" : exact ? "the index is exact" : "the index is not exact";
    this.nodes.show(
      [
        table(
          [
            ["node", "id", (n) => n.node],
            ["state", "", (n) => [n.error ?? n.state, n.state === "live" ? "good" : "warn"]],
            ["blocks", "n", (n) => short(n.blocks)],
            ["behind", "n", (n) => count(n.behind)],
            ["delay", "n", (n) => seconds(n.delay_s)],
            ["gaps", "n", (n) => count(n.gaps_total)],
            ["snapshots", "n", (n) => count(n.snapshots_total)],
          ],
          nodes,
          "none",
        ),
        facts([
          ["index", `${short(index.blocks)} of ${short(index.capacity)} blocks, ${bytes(index.bytes)}`],
          ["event plane", plane.kind === "none" ? "none" : plane.connected ? `${plane.kind}, connected` : String(plane.error)],
        ]),
      ],
      about,
    );
  }
}
