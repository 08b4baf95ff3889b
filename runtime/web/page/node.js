// One node: its tiers, what moves between them, engines, events and the latest requests.

import { Chart } from "./charts.js";
import { bar, facts, figure, Slot, table } from "./dom.js";
import { ago, byteRate, bytes, count, perSecond, seconds, share, short } from "./format.js";
import { Sizes } from "./sizes.js";

const TIERS = ["G2", "G3", "G4"];
const NAMES = { G2: "G2 host memory", G3: "G3 SSD", G4: "G4 S3" };

const last = (values) => values[values.length - 1];

export class NodeView {
  constructor() {
    this.about = "";
    this.tiers = Object.fromEntries(TIERS.map((tier) => [tier, new Slot(NAMES[tier], "third")]));
    this.charts = [
      new Chart("Hits, of the chunks looked up", "half", share, [
        ...TIERS.map((t) => [t, (h) => h.ratio(`hits.${t}`, [`hits.${t}`, `misses.${t}`])]),
      ], { max: 1 }),
      new Chart("Bytes into and out of tiers", "half", byteRate, [
        ["G2 in", (h) => h.rate("stored.G2")],
        ["G3 in", (h) => h.rate("stored.G3")],
        ["G3 out", (h) => h.rate("loaded.G3")],
        ["G4 in", (h) => h.rate("stored.G4")],
        ["G4 out", (h) => h.rate("loaded.G4")],
      ]),
      new Chart("Used", "half", bytes, [
        ["G2", (h) => h.gauge("used.G2")],
        ["G3", (h) => h.gauge("used.G3")],
      ]),
      new Chart("Evicted chunks", "half", perSecond, TIERS.map((t) => [t, (h) => h.rate(`evicted.${t}`)])),
    ];
    this.requests = new Slot("Latest requests", "");
    this.engines = new Slot("Engines connected", "half");
    this.queues = new Slot("Queues", "quarter list");
    this.events = new Slot("Block events", "quarter list");
    this.speeds = new Slot("Measured speeds", "half");
    this.peers = new Slot("Peers", "half");
    this.sizes = new Sizes();
    this.slots = [this.requests, this.engines, this.queues, this.events, this.sizes, this.speeds, this.peers];
    this.elements = [...Object.values(this.tiers), ...this.charts, ...this.slots].map((one) => one.element);
  }

  // What is wrong, in words.
  show(state, history, now) {
    const { process } = state;
    const uptime = seconds(Math.round(now - process.started));
    this.about = `kvbm-daemon ${state.version}, process ${process.pid}, up ${uptime}`;
    this.showTiers(state, history);
    for (const chart of this.charts) chart.draw(history);
    this.showRequests(state.requests, now);
    this.showEngines(state);
    this.showEvents(state, history);
    this.showSpeeds(state.governor);
    this.peers.show(
      table(
        [
          ["node", "id", (p) => p.node],
          ["state", "", (p) => (p.connected ? ["connected", "good"] : [p.problem ?? "not connected", "warn"])],
          ["by", "", (p) => p.mover ?? ""],
          ["chunks", "n", (p) => short(p.chunks)],
        ],
        state.peers,
        "none is configured or found",
      ),
    );
    const failed = Object.entries(state.readiness).filter(([, why]) => why !== null);
    const problems = failed.map(([check, why]) => `${check}: ${why}`);
    if (state.drain.draining) problems.push("draining");
    if (state.quarantined) problems.push(`${state.quarantined} chunks in quarantine`);
    return problems;
  }

  showTiers(state, history) {
    for (const tier of TIERS) {
      const found = state.tiers.find((one) => one.tier === tier);
      const slot = this.tiers[tier];
      if (!found) {
        slot.show(facts([["state", "not configured"]]));
        continue;
      }
      const policy = state.policies.find((one) => one.tier === tier);
      const bounded = found.capacity_bytes > 0;
      const hits = last(history.ratio(`hits.${tier}`, [`hits.${tier}`, `misses.${tier}`], 60));
      const reasons = Object.entries(found.evictions).filter(([, n]) => n > 0);
      const errors = Object.entries(found.errors).filter(([, n]) => n > 0);
      slot.show(
        [
          figure(bytes(found.used_bytes), bounded ? `of ${bytes(found.capacity_bytes)}` : "no limit"),
          bar(bounded ? found.used_bytes / found.capacity_bytes : 0),
          facts([
            ["chunks", count(found.chunks)],
            ["hits, last minute", share(hits)],
            ["in, 10 s", byteRate(found.rates[0]?.in_bytes_per_s)],
            ["out, 10 s", byteRate(found.rates[0]?.out_bytes_per_s)],
            ["evicted", reasons.length ? reasons.map(([why, n]) => `${why} ${short(n)}`).join(", ") : "0"],
            ["wrong bytes", count(found.corrupt)],
            ["errors", errors.length ? errors.map(([op, n]) => `${op} ${short(n)}`).join(", ") : "0"],
            ["takes in", policy?.admission ?? "\u2013"],
            ["gives up", policy?.eviction ?? "\u2013"],
          ]),
        ],
        found.mover,
      );
    }
  }

  showRequests(requests, now) {
    const kept = (request) =>
      Object.entries(request.kept_tokens)
        .filter(([, tokens]) => tokens > 0)
        .map(([tier, tokens]) => `${tier} ${short(tokens)}`)
        .join(", ") || "nowhere";
    this.requests.show(
      table(
        [
          ["when", "n", (r) => ago(r.asked_at, now)],
          ["request", "id spare", (r) => r.request || "\u2013"],
          ["engine", "id", (r) => r.engine],
          ["asked for", "n", (r) => short(r.asked_tokens)],
          ["kept in", "", kept],
          ["engine had", "n", (r) => short(r.local_tokens)],
          ["loaded", "n", (r) => [short(r.loaded_tokens), r.loaded_tokens > 0 ? "good" : ""]],
          ["in", "n", (r) => (r.loaded_tokens > 0 ? seconds(r.load_s) : "\u2013")],
          ["decided by", "", (r) => r.why],
          ["became", "", (r) => r.state ?? "open"],
        ],
        requests,
        "no engine has asked yet",
      ),
      "tokens",
    );
  }

  showEngines(state) {
    this.engines.show(
      table(
        [
          ["engine", "id", (s) => s.engine],
          ["role", "", (s) => s.role],
          ["rank", "n", (s) => s.rank],
          ["connected", "n", (s) => seconds(s.connected_s)],
          ["holds", "n", (s) => count(s.claims)],
          ["leased", "n", (s) => bytes(s.leased_bytes)],
          ["worker", "id", (s) => s.worker_id ?? ""],
        ],
        state.sessions,
        "none",
      ),
    );
    this.queues.show(
      table(
        [
          ["queue", "", (q) => q.name],
          ["waits", "n", (q) => [count(q.depth), q.limit && q.depth >= q.limit ? "bad" : ""]],
          ["limit", "n", (q) => short(q.limit)],
        ],
        state.queues,
      ),
    );
  }

  showEvents({ events, stream, process }, history) {
    const pairs = [
      ["plane", process.events_plane],
      ["connected", process.events_plane === "none" ? "\u2013" : events.connected ? "yes" : "no"],
      ["published", short(events.published_total)],
      ["now", perSecond(last(history.rate("events", 10)))],
      ["dropped", count(events.dropped_total)],
    ];
    if (stream) {
      const engines = stream.engines.map((one) => one.blocks).reduce((sum, n) => sum + n, 0);
      pairs.push(["G1 blocks heard", short(engines)]);
      for (const [tier, blocks] of Object.entries(stream.tiers.blocks)) pairs.push([`${tier} announced`, short(blocks)]);
      pairs.push(["snapshots given", count(stream.snapshots_total)]);
    }
    this.events.show(facts(pairs));
  }

  showSpeeds(governor) {
    const lines = governor.tiers.map((line) => [
      `${line.tier} to host memory`,
      line.bytes_per_s === null ? "not measured" : `${byteRate(line.bytes_per_s)} after ${seconds(line.begin_s)}`,
    ]);
    const engines = governor.engines.map((pace) => [
      `${pace.engine} computes`,
      pace.tokens_per_s === null ? "not measured" : `${short(pace.tokens_per_s)} tokens/s`,
    ]);
    this.speeds.show(facts([...lines, ...engines]), `loads are ${governor.mode}`);
  }
}
