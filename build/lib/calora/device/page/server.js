// Requests to this server, and its errors in plain words.

/** Something that went wrong; `where` says what it is about: the key, the text, the model, or the server as a whole. */
export class Trouble extends Error {
  constructor(message, where) {
    super(message);
    this.where = where;
  }
}

const GONE = "The server does not answer. Is calora serve still running? What you typed is kept.";

export class Server {
  constructor(key) {
    this.key = key;
  }

  /** The models that are served. */
  async models() {
    return (await (await this.#request("/v1/models")).json()).data;
  }

  /** The answers to one row, with their probabilities. */
  async classify(body, signal) {
    return (await this.#request("/v1/classify", body, signal)).json();
  }

  /** The pieces of a completion as they are written. */
  async *write(path, body, signal) {
    const response = await this.#request(path, { ...body, stream: true }, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { value, done } = await reached(() => reader.read());
        if (done) throw new Trouble("The answer broke off: the server has ended.", "server");
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          const data = event.slice("data: ".length);
          if (data === "[DONE]") return;
          const piece = JSON.parse(data);
          if (piece.error) throw told(null, piece.error);
          yield piece;
        }
      }
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  async #request(path, body, signal) {
    const headers = { Authorization: `Bearer ${this.key}` };
    const options = body ? { method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" } } : { headers };
    const response = await reached(() => fetch(path, { ...options, signal, cache: "no-store", credentials: "omit" }));
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    throw told(response.status, said.error ?? { message: `status ${response.status}` });
  }
}

/** The result of work that needs the network. */
async function reached(work) {
  try {
    return await work();
  } catch (error) {
    throw error instanceof TypeError ? new Trouble(GONE, "server") : error;
  }
}

/** What an error of the server means. */
function told(status, { message, code }) {
  if (status === 401) return new Trouble("That is not the key: calora serve prints a new one whenever it starts.", "key");
  if (status === 413) return new Trouble(`The text is too long for one request. ${message}.`, "text");
  if (code === "model_not_found") return new Trouble("The server no longer has this model: reload the page.", "model");
  if (code === "queue_full" || code === "queue_timeout") return new Trouble("The server is busy with other requests. Try again in a moment.", "model");
  if (code === "timeout") return new Trouble("It took longer than the server lets a request run.", "model");
  const [, has, room] = message.match(/\((\d+) tokens\) exceeds .*\((\d+) tokens\)/) ?? [];
  if (room) return new Trouble(`The text is too long: it has ${has} tokens, and the server reads ${room} at most (calora serve --context).`, "text");
  if (/does not answer/.test(message)) return new Trouble("llama.cpp does not answer any more: start calora serve again.", "model");
  return new Trouble(message, "model");
}
