"use strict";
// The page of a Novella endpoint: a chat, or the continuation of a text, streamed. No library, nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const HINTS = {
  chat: "Write a message. Enter sends it, Shift+Enter begins a new line.",
  text: "Write the beginning of a text; the model goes on where it ends. Ctrl+Enter sends it.",
};

let model = null; // name of the model, once the server has told it
let messages = []; // the conversation so far
let running = null; // AbortController of the answer that is being written

const mode = () => document.querySelector("input[name=mode]:checked").value;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      if (response.status === 401) showSettings(true);
      throw new Error(response.status === 401 ? "needs an API key (Settings)" : await failure(response));
    }
    const card = (await response.json()).data[0];
    model = card.id;
    $("model").textContent = `${card.id} · ${card.max_model_len.toLocaleString("en")} tokens of context`;
    document.title = `${card.id} · Novella`;
  } catch (error) {
    model = null;
    $("model").textContent = error.message;
  }
}

function request() {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const value = $(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if (!("max_tokens" in body)) body.max_tokens = null; // as many as the context has room for
  const stop = $("stop").value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  return body;
}

function article(kind, title) {
  $("empty").hidden = true;
  const box = document.createElement("article");
  box.className = kind;
  if (title) box.append(Object.assign(document.createElement("h2"), { textContent: title }));
  const text = document.createElement("div");
  box.append(text);
  $("log").append(box);
  return [box, text];
}

function note(box, text, bad = false) {
  box.append(Object.assign(document.createElement("p"), { className: bad ? "note bad" : "note", textContent: text }));
}

function follow(change) {
  // Stay at the end while text grows, unless the reader has scrolled up.
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

async function* events(response) {
  // Server-sent events: lines "data: ...", parted by empty lines, in chunks that end anywhere.
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(path, body, box, target, started) {
  // Streams an answer into `target`. Returns its text; what went wrong is written under it.
  let text = "", finish = null, usage = null, first = null;
  running = new AbortController();
  busy(true);
  box.classList.add("growing");
  try {
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        const piece = choice.text ?? choice.delta.content ?? "";
        finish = choice.finish_reason ?? finish;
        if (!piece) continue;
        first ??= performance.now();
        text += piece;
        follow(() => target.append(piece));
      }
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else follow(() => note(box, error.message, true));
  } finally {
    box.classList.remove("growing");
    running = null;
    busy(false);
  }
  if (finish) {
    const seconds = (performance.now() - started) / 1000;
    const words = { stop: "", length: "cut at the token limit", stopped: "stopped" }[finish] ?? finish;
    const count = usage && `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second`;
    const line = [words, count, first && `first after ${Math.round(first - started)} ms`].filter(Boolean).join(" · ");
    if (line) follow(() => note(box, line));
  }
  return finish === null ? null : text;
}

async function send() {
  const prompt = $("prompt").value;
  if (running || (mode() === "chat" && !prompt.trim())) return;
  if (model === null) await connect();
  if (model === null) return;
  const started = performance.now();
  if (mode() === "text") {
    const [box, target] = article("text");
    target.append(Object.assign(document.createElement("span"), { className: "given", textContent: prompt }));
    $("log").scrollTop = $("log").scrollHeight;
    await answer("v1/completions", { ...request(), prompt }, box, target, started);
    return;
  }
  const [mine, text] = article("user", "You");
  text.textContent = prompt;
  $("prompt").value = "";
  const [box, target] = article("assistant", model);
  $("log").scrollTop = $("log").scrollHeight;
  const system = $("system").value.trim();
  const asked = { role: "user", content: prompt };
  const body = { ...request(), messages: [...(system ? [{ role: "system", content: system }] : []), ...messages, asked] };
  const said = await answer("v1/chat/completions", body, box, target, started);
  if (said === null) {
    $("prompt").value ||= prompt; // not lost: it can be sent again
    mine.classList.add("failed");
  } else {
    messages.push(asked, { role: "assistant", content: said });
  }
}

function busy(is) {
  $("log").setAttribute("aria-busy", is);
  $("send").hidden = is;
  $("stop-button").hidden = !is;
  if (!is) $("prompt").focus();
}

function showSettings(is) {
  $("settings").hidden = !is;
  $("toggle").setAttribute("aria-expanded", is);
}

function clear() {
  running?.abort();
  messages = [];
  $("log").querySelectorAll("article").forEach((a) => a.remove());
  $("empty").hidden = false;
  $("empty").textContent = HINTS[mode()];
  $("prompt").placeholder = mode() === "chat" ? "Message" : "Once upon a time";
  $("prompt").rows = mode() === "chat" ? 2 : 5;
  $("prompt").focus();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("keydown", (event) => {
  const sends = mode() === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && sends && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop-button").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("toggle").addEventListener("click", () => showSettings($("settings").hidden));
$("key").addEventListener("change", connect);
document.querySelectorAll("input[name=mode]").forEach((radio) => radio.addEventListener("change", clear));
for (const name of ["temperature", "top_p"]) {
  const show = () => { $(`${name}-shown`).textContent = Number($(name).value).toFixed(2); };
  $(name).addEventListener("input", show);
  show();
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });

clear();
connect();
