// Connects, and hands what comes to the view of what kind of program it is.

import { History } from "./charts.js";
import { FleetView } from "./fleet.js";
import { NodeView } from "./node.js";
import { follow } from "./stream.js";

const VIEWS = { node: NodeView, fleet: FleetView };
const STALE_S = 5;

const main = document.getElementById("main");
const status = document.getElementById("status");
let view = null;
let history = null;
let problems = [];
let heardAt = 0;

function say(state, text) {
  status.dataset.state = state;
  status.textContent = text;
}

function askToken() {
  const form = document.getElementById("token-form");
  form.hidden = false;
  say("warn", "a token is needed");
  return new Promise((given) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      form.hidden = true;
      given(document.getElementById("token").value);
    };
  });
}

follow("../v1/dashboard", {
  token: askToken,

  hello(told) {
    history = new History(told);
    if (view?.kind !== told.kind) {
      view = new VIEWS[told.kind]();
      view.kind = told.kind;
      main.replaceChildren(...view.elements);
    }
    document.title = `${told.name} \u00b7 kvbm`;
    document.getElementById("title").textContent = told.name;
  },

  state(told) {
    heardAt = performance.now();
    history.push(told);
    problems = view.show(told.state, history, told.at);
    document.getElementById("about").textContent = view.about;
    document.body.dataset.states = String(Number(document.body.dataset.states ?? 0) + 1);
    if (problems.length) say("warn", problems.join("; "));
    else say("good", "ready");
  },

  down(why) {
    say("bad", `no connection: ${why}; trying again`);
  },
});

setInterval(() => {
  const silentS = (performance.now() - heardAt) / 1000;
  if (heardAt && silentS > STALE_S && status.dataset.state !== "bad") {
    say("bad", `nothing heard for ${Math.round(silentS)} s`);
  }
}, 1000);
