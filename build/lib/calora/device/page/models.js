// What can be compared: tasks, the columns of their prompts, and the models that fit each.

const METHODS = { lora: "LoRA", clm_inherited: "Inherited LoRA", clm_lora: "Fresh LoRA", calora: "CA-LoRA" };
const TEXT = { column: "text", label: "Text", listed: false };
const PLACE = /\{\{|\}\}|\{([^{}]+)\}/g; // of a template: doubled braces are braces

/** A template with the row's columns filled in, as Task.render does it. */
export function fill(template, row) {
  return template.replace(PLACE, (whole, column) => (column ? row[column] : whole[0]));
}

/** What a model is called at the head of its column. */
export function label(model) {
  const base = model.compressed ? "Compressed" : "Uncompressed";
  if (!model.task) return base;
  const method = METHODS[model.method] ?? model.method?.replaceAll("_", " ") ?? "adapter";
  return model.compressed ? method : `${base} + ${method}`;
}

/**
 * Every choice of the page: a task with the models that have its adapter and the bases; then those without a task.
 * A choice is { id, label, kind, fields, task, owner, models, first }, `first` the models that are compared unless one says otherwise.
 */
export function choicesOf(models) {
  const bases = models.filter((model) => !model.task);
  const tasks = new Map();
  for (const model of models.filter((model) => model.task)) {
    const same = JSON.stringify([model.task.name, model.task.prompt, model.task.answers]);
    tasks.set(same, [...(tasks.get(same) ?? []), model]);
  }
  const some = [...tasks.values()].map((own) => taskChoice(own, bases));
  const names = some.map((choice) => choice.label);
  for (const choice of some) if (names.filter((name) => name === choice.label).length > 1) choice.label += ` (${choice.owner})`;
  const all = sorted(models);
  const first = new Set(bases.map((model) => model.id));
  return [
    ...some,
    { id: "/continue", label: "no task: continue a text", kind: "continue", fields: [TEXT], models: all, first },
    { id: "/chat", label: "no task: answer a message", kind: "chat", fields: [{ ...TEXT, label: "Message" }], models: all, first },
  ];
}

function taskChoice(own, bases) {
  const task = own[0].task;
  const models = sorted([...own, ...bases]);
  const known = new Set(own.filter((model) => model.reference).map((model) => model.compressed));
  // The uncompressed model alone is a column only if its own adapter is none.
  const first = new Set(models.filter((model) => model.task || !model.reference || !known.size).map((model) => model.id));
  const owner = own.find((model) => !model.reference)?.id ?? own[0].id;
  const kind = task.answers.length ? "classify" : "write";
  return { id: `${task.name} ${owner}`, label: task.name, kind, fields: fieldsOf(task), task, owner, models, first };
}

/** The columns that a row needs; the answers of a listed one stand a line each. */
function fieldsOf(task) {
  const columns = new Map();
  for (const [template, listed] of [[task.prompt, false], ...task.answers.map((answer) => [answer, task.answers.length === 1])]) {
    for (const [, column] of template.matchAll(PLACE)) if (column && !columns.has(column)) columns.set(column, listed);
  }
  return [...columns].map(([column, listed]) => ({ column, listed, label: titled(column) + (listed ? ", one a line" : "") }));
}

function titled(column) {
  const words = column.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

/** What is compared with first, then the base, then adapters, CA-LoRA last. */
function sorted(models) {
  const methods = Object.keys(METHODS);
  const place = (model) => (model.reference ? 0 : 10) + (model.task ? 2 + methods.indexOf(model.method) : 0);
  return models.toSorted((one, other) => place(one) - place(other));
}
