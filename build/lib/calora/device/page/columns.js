// A column: one model, what it answered, how large it is and how fast it was.

import { label } from "./models.js";

export class Column {
  constructor(model, kind) {
    this.model = model;
    this.time = kind === "classify" ? "time" : "first token";
    this.label = label(model);
    this.result = element("div", { className: "result quiet" });
    this.facts = element("dl", { className: "facts" });
    this.element = element("section", { className: "column" }, [
      element("div", {}, [element("h2", { textContent: this.label }), element("p", { className: "name", textContent: model.id })]),
      this.result,
      this.facts,
    ]);
    this.element.setAttribute("aria-label", this.label);
    this.clear();
  }

  clear() {
    this.#show("", "quiet", "");
    this.#tell(["–"], ["–"]);
  }

  wait() {
    this.clear();
    this.#show("waiting", "quiet", "waiting");
  }

  busy() {
    this.#show("busy", "quiet", "…");
  }

  /** The answers with their probabilities, in the order of the labels. */
  answers({ labels, probs }, seconds, tokens, limit) {
    const best = probs.indexOf(Math.max(...probs));
    const list = element("dl", { className: "answers" });
    labels.forEach((text, index) => {
      const kind = index === best ? "best" : "";
      const fill = element("i");
      fill.style.inlineSize = `${100 * probs[index]}%`;
      const bar = element("div", { className: `bar ${kind}`, ariaHidden: "true" }, [fill]);
      list.append(element("dt", { className: kind, textContent: text }), element("dd", { className: kind, textContent: percent(probs[index]) }), bar);
    });
    this.#show("done", "", list);
    const read = tokens >= limit ? `the text's last ${counted(tokens)}` : counted(tokens);
    this.#tell([duration(seconds)], [`${rate(tokens / seconds)} tokens/s`, `${read} read`]);
    return `${labels[best]}, ${percent(probs[best])}`;
  }

  /** What is written so far. */
  write(text, tokens, wait, seconds) {
    this.#show("busy", "said", text);
    this.#tell([duration(wait)], [tokens > 1 ? `${rate((tokens - 1) / seconds)} tokens/s` : "…", counted(tokens)]);
  }

  /** The whole of it. */
  written(text, { tokens, wait, speed, cut }) {
    this.#show("done", text ? "said" : "quiet", text || "nothing");
    this.#tell([duration(wait)], [speed ? `${rate(speed)} tokens/s` : "–", counted(tokens) + (cut ? ", as many as asked for" : "")]);
    return text || "nothing";
  }

  /** Ended by the reader; what was written stays. */
  stopped() {
    if (this.#written) this.facts.lastElementChild.append(", stopped");
    else this.#show("stopped", "quiet", this.element.dataset.state === "waiting" ? "not run" : "stopped");
    this.element.dataset.state = "stopped";
  }

  get failed() {
    return this.element.dataset.state === "trouble";
  }

  /** What went wrong; what was written stays. */
  fail(message) {
    const note = element("p", { className: "trouble", textContent: message });
    if (this.#written) this.result.append(note);
    else this.#show("trouble", "", note);
    this.element.dataset.state = "trouble";
  }

  get #written() {
    return this.element.dataset.state === "busy" && this.result.classList.contains("said");
  }

  #show(state, kind, content) {
    this.element.dataset.state = state;
    this.result.className = `result ${kind}`;
    this.result.replaceChildren(content);
  }

  /** The size, a time and a speed; a note below each has its place even where it is empty, so that columns stay in line. */
  #tell([time], [speed, note = ""]) {
    const { base, adapter } = this.model.bytes;
    const parts = adapter ? `base ${megabytes(base)} + adapter ${megabytes(adapter)}` : "no adapter";
    const rows = [["size", `${megabytes(base + adapter)} MB`, parts], [this.time, time], ["speed", speed, note]];
    this.facts.replaceChildren(
      ...rows.flatMap(([name, value, below]) => [
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
        ...(below === undefined ? [] : [element("dd", { className: "note", textContent: below })]),
      ]),
    );
  }
}

/** A new element; text comes in as text, never as HTML. */
export function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function duration(seconds) {
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
}

function counted(tokens) {
  return `${tokens} token${tokens === 1 ? "" : "s"}`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function rate(value) {
  return value < 100 ? value.toFixed(1) : value.toFixed(0);
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}
