// Server-sent events over fetch, because an EventSource cannot send a token.

const PAUSE_MS_MAX = 10000;

function headers() {
  const token = sessionStorage.getItem("kvbm-token");
  return token ? { authorization: `Bearer ${token}` } : {};
}

// A question with an answer in JSON; status 0 where there is none.
export async function ask(url) {
  try {
    const response = await fetch(url, { headers: headers(), cache: "no-store" });
    return { status: response.status, body: await response.json() };
  } catch (error) {
    return { status: 0, body: { detail: `not reached: ${error.message}` } };
  }
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const event = { name: "message", data: "" };
      for (const line of text.slice(0, end).split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      text = text.slice(end + 2);
      yield event;
    }
  }
}

// Follow the stream for ever; `on` has hello, state, down(why) and token(), which gives a new one.
export async function follow(url, on) {
  let pauseMs = 500;
  for (;;) {
    try {
      const response = await fetch(url, { headers: headers(), cache: "no-store" });
      if (response.status === 401) {
        sessionStorage.setItem("kvbm-token", await on.token());
        continue;
      }
      if (!response.ok) throw new Error(`answered ${response.status}`);
      for await (const { name, data } of events(response)) {
        pauseMs = 500;
        on[name]?.(JSON.parse(data));
      }
      throw new Error("the stream ended");
    } catch (error) {
      on.down(error instanceof TypeError ? "not reached" : error.message);
    }
    await new Promise((resume) => setTimeout(resume, pauseMs));
    pauseMs = Math.min(2 * pauseMs, PAUSE_MS_MAX);
  }
}
