// The page: the key, the text, which models are compared, and running them one after another.

import { Column, duration, element } from "./columns.js";
import { choicesOf, fill, label } from "./models.js";
import { Server, Trouble } from "./server.js";

const KEY = "calora key";
const FORM = "calora form";
const TOKENS = 64; // of an answer that no task limits
const find = (id) => document.getElementById(id);
const [entry, ask, trouble, textSaid, status] = ["entry", "ask", "trouble", "text-said", "status"].map(find);

let server = null;
let choices = [];
let choice = null;
let columns = new Map(); // id of a model -> its column
let running = null; // the AbortController of a run
const form = { choice: null, texts: {}, shown: {}, tokens: {}, ...kept(FORM, {}) };

// What is kept: for this tab alone, until it is closed.

function kept(name, other) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? other;
  } catch {
    return other;
  }
}

function keep(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // without storage the page works until it is reloaded
  }
}

// The key: from the address that calora serve prints, whose fragment no server sees, or typed in.

function keyOfAddress() {
  const found = location.hash.match(/^#key=(.+)$/);
  if (found) history.replaceState(null, "", location.pathname);
  return found?.[1];
}

async function open(key) {
  if (!key) return needKey("");
  server = new Server(key);
  try {
    choices = choicesOf(await server.models());
  } catch (error) {
    if (error.where === "key") return needKey(error.message);
    return say(trouble, error.message);
  }
  keep(KEY, key);
  say(trouble, "");
  entry.hidden = true;
  ask.hidden = false;
  find("choice").replaceChildren(...choices.map((one) => element("option", { value: one.id, textContent: one.label })));
  choose(choices.find(({ id }) => id === form.choice) ?? choices[0]);
  find("fields").querySelector("textarea").focus();
}

function needKey(why) {
  entry.hidden = false;
  find("entry-said").textContent = why || "Paste the key that calora serve printed, or open the address that it printed with it.";
  find("entry-said").className = why ? "trouble" : "quiet";
  find("key").value = "";
  find("key").focus();
}

function say(place, message) {
  place.hidden = !message;
  place.textContent = message;
}

// The form: its fields are those of the chosen task.

function choose(chosen) {
  running?.abort();
  choice = chosen;
  form.choice = choice.id;
  find("choice").value = choice.id;
  find("fields").replaceChildren(...choice.fields.flatMap(field));
  find("length").hidden = choice.kind === "classify";
  const most = choice.models[0].max_tokens;
  find("tokens").max = most;
  find("tokens").value = Math.min(form.tokens[choice.id] ?? choice.task?.max_new_tokens ?? TOKENS, most);
  find("models").replaceChildren(...choice.models.map(box));
  columns = new Map(choice.models.map((model) => [model.id, new Column(model, choice.kind)]));
  say(textSaid, "");
  status.textContent = "";
  say(find("hint"), hint());
  arrange();
  keep(FORM, form);
}

function field({ column, label: name }) {
  const id = `text-${column}`;
  const text = element("textarea", { id, value: form.texts[column] ?? "", placeholder: "Type or paste a text", name: column });
  text.setAttribute("aria-describedby", textSaid.id);
  return [element("label", { htmlFor: id, textContent: name }), text];
}

function box(model) {
  const input = element("input", { type: "checkbox", value: model.id, checked: isShown(model) });
  const twice = choice.models.filter((other) => label(other) === label(model)).length > 1;
  return element("label", {}, [input, twice ? `${label(model)} (${model.id})` : label(model)]);
}

function isShown(model) {
  return form.shown[choice.id]?.[model.id] ?? choice.first.has(model.id);
}

function hint() {
  const models = choice.models;
  if (choices.every((one) => !one.task)) return "This folder has a base without adapters. An export with adapters has a task for each here.";
  if (models.some((model) => model.reference || !model.compressed)) return "";
  return "Start calora serve with --reference FOLDER, an export of the uncompressed base, to compare with that too.";
}

function arrange() {
  find("columns").replaceChildren(...choice.models.filter(isShown).map((model) => columns.get(model.id).element));
}

function row() {
  const texts = choice.fields.map(({ column, listed }) => {
    const text = find(`text-${column}`).value;
    return [column, listed ? text.split("\n").filter((line) => line.trim()) : text];
  });
  return Object.fromEntries(texts);
}

/** The first field that lacks a text, marked; else null. */
function empty(texts) {
  const missing = choice.fields.find(({ column, listed }) => (listed ? texts[column].length < 2 : !texts[column].trim()));
  for (const { column } of choice.fields) find(`text-${column}`).ariaInvalid = String(column === missing?.column);
  if (missing) {
    say(textSaid, missing.listed ? `${missing.label}: two or more are needed.` : `${missing.label}: type or paste one first.`);
    find(`text-${missing.column}`).focus();
  }
  return missing;
}

// A run: the shown models, one after another.

async function run() {
  const texts = row();
  say(textSaid, "");
  say(trouble, "");
  if (running || empty(texts)) return;
  const some = choice.models.filter(isShown).map((model) => columns.get(model.id));
  if (!some.length) return void (status.textContent = "Tick a model first.");
  const mine = (running = new AbortController());
  const began = performance.now();
  setBusy(true);
  some.forEach((column) => column.wait());
  some[0].element.scrollIntoView({ block: "nearest" });
  try {
    const end = await through(some, texts, mine.signal);
    const failed = some.filter((column) => column.failed).length;
    const done = failed ? `${failed} of ${some.length} gave no answer` : "done";
    status.textContent = end || `${done} in ${duration((performance.now() - began) / 1000)}`;
  } finally {
    running = null;
    setBusy(false);
  }
}

/** One column after another; why they ended early, or nothing. */
async function through(some, texts, signal) {
  for (const [index, column] of some.entries()) {
    status.textContent = `${index + 1} of ${some.length}, one after another: ${column.label}`;
    const end = await one(column, texts, signal);
    if (end) {
      some.slice(index + 1).forEach((other) => (signal.aborted ? other.stopped() : other.clear()));
      return end;
    }
  }
  return "";
}

/** One column; what ends the whole run is returned, or nothing. */
async function one(column, texts, signal) {
  column.busy();
  try {
    const answer = await (choice.kind === "classify" ? classify : write)(column, texts, signal);
    find("heard").textContent = `${column.label}: ${answer}`;
  } catch (error) {
    if (signal.aborted) {
      column.stopped();
      return "stopped";
    }
    if (!(error instanceof Trouble)) throw error;
    return failed(column, error);
  }
  return "";
}

/** Say what went wrong where the reader looks: at the text, the key, the column. */
function failed(column, error) {
  if (error.where === "model") {
    column.fail(error.message);
    find("heard").textContent = `${column.label}: ${error.message}`;
    return "";
  }
  if (error.where === "server") column.stopped();
  else column.clear();
  if (error.where === "key") needKey(error.message);
  if (error.where === "server") say(trouble, error.message);
  if (error.where === "text") {
    find(`text-${choice.fields[0].column}`).ariaInvalid = "true";
    say(textSaid, error.message);
  }
  return "not run";
}

async function classify(column, texts, signal) {
  const began = performance.now();
  const own = column.model.task ? {} : { task: choice.owner };
  const asked = { model: column.model.id, input: texts, cache_prompt: false, ...own };
  const { data, usage } = await server.classify(asked, signal);
  return column.answers(data[0], (performance.now() - began) / 1000, usage.prompt_tokens, choice.task.max_tokens);
}

async function write(column, texts, signal) {
  const chat = choice.kind === "chat";
  const prompt = choice.task ? fill(choice.task.prompt, texts) : texts.text;
  const asked = {
    model: column.model.id, max_tokens: Number(find("tokens").value), temperature: 0, cache_prompt: false,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const began = performance.now();
  let [text, pieces, first, timings, cut] = ["", 0, null, null, false];
  for await (const piece of server.write(chat ? "/v1/chat/completions" : "/v1/completions", asked, signal)) {
    const said = piece.choices?.[0];
    const more = (chat ? said?.delta?.content : said?.text) ?? "";
    timings = piece.timings ?? timings;
    cut ||= said?.finish_reason === "length";
    if (!more) continue;
    first ??= performance.now();
    text += more;
    pieces += 1;
    column.write(text, pieces, (first - began) / 1000, (performance.now() - first) / 1000);
  }
  const wait = ((first ?? performance.now()) - began) / 1000;
  return column.written(text, { tokens: timings?.predicted_n ?? pieces, wait, speed: timings?.predicted_per_second, cut });
}

function setBusy(busy) {
  const stop = find("stop");
  const focused = document.activeElement;
  find("run").disabled = busy;
  stop.hidden = !busy;
  for (const control of [find("compared"), find("choice"), find("tokens")]) control.disabled = busy;
  if (busy && focused === find("run")) stop.focus();
  if (!busy && focused === stop) find("run").focus();
}

// What the reader does.

entry.addEventListener("submit", (event) => {
  event.preventDefault();
  open(find("key").value.trim());
});
ask.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
ask.addEventListener("input", ({ target }) => {
  if (target.matches("textarea")) {
    form.texts[target.name] = target.value;
    target.ariaInvalid = "false";
    say(textSaid, "");
  }
  if (target.matches("#tokens")) form.tokens[choice.id] = target.value;
  if (target.matches("[type=checkbox]")) {
    form.shown[choice.id] = { ...form.shown[choice.id], [target.value]: target.checked };
    arrange();
  }
  keep(FORM, form);
});
find("choice").addEventListener("change", ({ target }) => choose(choices.find(({ id }) => id === target.value)));
find("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !ask.hidden) {
    event.preventDefault();
    ask.requestSubmit();
  }
});
window.addEventListener("hashchange", () => {
  const key = keyOfAddress();
  if (key) open(key);
});

open(keyOfAddress() ?? kept(KEY, null));
