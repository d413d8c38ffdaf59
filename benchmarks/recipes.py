"""Write the tables and the pictures of docs/results.md: `python -m benchmarks.recipes`, after `make run`.

The run in this folder (its seed, tasks, recipes, methods) is merged into docs/recipes.json, which holds of each method which
test items it got right; so seeds and recipes can be run on different days, and every interval computed again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calora.common.files import read_json, write_text
from calora.evaluation.statistics import Estimate, OverSeeds, difference_over_seeds, mean_over_seeds, mean_over_tasks
from stages import plots
from stages.common import BASE, compressed, evaluated
from stages.config import load_params
from stages.tables import Table, interval, short

PAGE, DATA = Path("docs/results.md"), Path("docs/recipes.json")
PICTURES = {Path("docs/recipes.png"): plots.recipes_against_bytes, Path("docs/front.png"): plots.front}
TASKS = ("movies", "tweets", "amazon", "nyt")
REFERENCES = ("llm", "llm_lora", "small_lora")
OURS, BASELINE, FREE, WIDE = "clm_calora", "clm_lora", "clm_calora_free", "clm_wide"
STEP = 10  # MB, of the front
MARKS = "<!-- {} of {} -->"
Key = tuple[str, str]  # recipe (of a reference: ""), method


@dataclass(frozen=True)
class Results:
    """Everything that was run: what `merge` stores.

    Args:
        data: `sizes`: recipe -> bytes of its weights and their share of the base's; `runs`: seed -> task -> recipe
            -> method -> bytes_on_disk, adapter_bytes, trainable_parameters, items and hits.
        order: the tasks that count, in the order of columns.
    """

    data: dict[str, Any]
    order: Sequence[str] = TASKS

    @property
    def tasks(self) -> list[str]:
        """Those that were run."""
        run = {task for tasks in self.data["runs"].values() for task in tasks}
        return [task for task in self.order if task in run]

    @property
    def recipes(self) -> list[str]:
        """In the order of params.yaml."""
        return [name for name in load_params().compressions if name in self.data["sizes"]]

    def rows(self, key: Key) -> dict[str, dict[str, dict[str, Any]]]:
        """task -> seed -> what is stored of a method."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for seed, tasks in sorted(self.data["runs"].items()):
            for task, recipes in tasks.items():
                if key[1] in recipes.get(key[0], {}):
                    found.setdefault(task, {})[seed] = recipes[key[0]][key[1]]
        return found

    def mean(self, key: Key) -> Estimate | None:
        """Over the tasks, and over the seeds that were run; None where a task is missing."""
        rows = self.rows(key)
        if set(rows) != set(self.tasks):
            return None
        return mean_over_tasks([of_task([hits(one) for one in rows[task].values()]) for task in self.tasks])

    def difference(self, ours: Key, theirs: Key) -> tuple[Estimate, list[str]] | None:
        """Over tasks, and the seeds that both were run with in every task, which are given too."""
        a, b = self.rows(ours), self.rows(theirs)
        if not set(self.tasks) <= a.keys() & b.keys():
            return None
        seeds = sorted(set.intersection(*(a[task].keys() & b[task].keys() for task in self.tasks)))
        if not seeds:
            return None
        pairs = [([hits(a[task][s]) for s in seeds], [hits(b[task][s]) for s in seeds]) for task in self.tasks]
        return mean_over_tasks([difference_over_seeds(own, other) for own, other in pairs]), seeds

    def metrics(self, recipe: str) -> dict[str, Any]:
        """What the plots take: the means of a recipe's methods and of the references."""
        keys = {key for tasks in self.data["runs"].values() for of in tasks.values() for key in of.get(recipe, {})}
        methods = {}
        for key in [*(("", name) for name in REFERENCES), *((recipe, name) for name in sorted(keys))]:
            mean = self.mean(key)
            if mean is not None:
                one = next(iter(self.rows(key)[self.tasks[0]].values()))
                methods[key[1]] = {
                    **{name: one[name] for name in one if name.endswith("_bytes") or name == "bytes_on_disk"},
                    "accuracy": mean.value, "ci": list(mean.ci),
                }  # fmt: skip
        return {"methods": methods, "ours": OURS, "baseline": BASELINE}


def of_task(rows: list[Any]) -> OverSeeds:
    """The mean of a task over seeds and items."""
    return mean_over_seeds(rows)


def hits(stored: Mapping[str, Any]) -> Any:
    """Whether each test item was right, as numbers."""
    bits = np.frombuffer(base64.b64decode(stored["hits"]), np.uint8)
    return np.unpackbits(bits, count=stored["items"]).astype(float)


def merge(data: dict[str, Any]) -> dict[str, Any]:
    """Add the run in this folder."""
    params = load_params()
    whole = (BASE / "model.safetensors").stat().st_size
    for recipe in params.recipes:
        size = (compressed(recipe) / "model.safetensors").stat().st_size
        data.setdefault("sizes", {})[recipe] = {"bytes": size, "share": round(size / whole, 4)}
        for task in params.tasks:
            metrics, answers = (
                read_json(evaluated(task, recipe) / f"{part}.json", "run `make run`")
                for part in ("metrics", "predictions")
            )
            of = data.setdefault("runs", {}).setdefault(str(params.seed), {}).setdefault(task, {})
            for method, m in metrics["methods"].items():
                correct = answers[method]["correct"]
                kept = ("bytes_on_disk", "adapter_bytes", "downloaded_bytes", "trainable_parameters")
                of.setdefault("" if method in REFERENCES else recipe, {})[method] = {
                    **{key: m[key] for key in kept if key in m}, "items": len(correct),
                    "hits": base64.b64encode(np.packbits(correct).tobytes()).decode(),
                }  # fmt: skip
    return data


def means_table(found: Results) -> Table:
    """A line for each recipe: its methods' means, ours with its interval and against the baseline and the teacher."""
    methods = ["clm", "clm_inherited", FREE, BASELINE, OURS, WIDE]
    heads = [*map(short, methods), "95 % interval of CA-LoRA", "CA-LoRA - equal budget", "CA-LoRA - teacher", "seeds"]
    table = Table("means", ["recipe", "MB with CA-LoRA", *heads], {0, *range(8, 12)})
    llm, teacher = found.mean(("", "llm")), found.mean(("", "llm_lora"))
    if llm and teacher:
        size = f"{of_one(found, ('', 'llm_lora'))['bytes_on_disk'] / 1e6:.1f}"
        table.rows.append(["uncompressed", size, f"{llm.value:.3f}", f"{teacher.value:.3f}", *[""] * 4, *[""] * 4])
    for recipe in found.recipes:
        means = [found.mean((recipe, method)) for method in methods]
        own, key = found.mean((recipe, OURS)), (recipe, OURS)
        gain, gap = (found.difference(key, other) for other in ((recipe, BASELINE), ("", "llm_lora")))
        row = [recipe, f"{of_one(found, key)['bytes_on_disk'] / 1e6:.1f}" if own else ""]
        row += [f"{mean.value:.3f}" if mean else "" for mean in means]
        row += [interval(own.ci) if own else "", said(gain), said(gap), ", ".join(gain[1]) if gain else ""]
        table.rows.append(row)
    return table


def of_one(found: Results, key: Key) -> dict[str, Any]:
    """What is stored of a method by its first task and seed: sizes are alike in all."""
    return next(iter(next(iter(found.rows(key).values())).values()))


def said(found: tuple[Estimate, list[str]] | None) -> str:
    """A difference with its interval."""
    return f"{found[0].value:+.3f} {interval(found[0].ci, '+')}" if found else ""


def tasks_table(found: Results) -> Table:
    """Each task by itself: the inherited LoRA, the closed-form start, the fresh LoRA and CA-LoRA of each recipe."""
    methods = ("clm_inherited", FREE, BASELINE, OURS)
    table = Table("tasks", ["recipe", "method", *found.tasks], {0, 1})
    keys = [("", "llm"), ("", "llm_lora"), ("", "small_lora")]
    for recipe, method in [*keys, *((recipe, method) for recipe in found.recipes for method in methods)]:
        rows = found.rows((recipe, method))
        if rows:
            cells = [
                f"{of_task([hits(one) for one in rows[task].values()]).value:.3f}" if task in rows else ""
                for task in found.tasks
            ]
            table.rows.append([recipe or "uncompressed" * (method != "small_lora"), short(method), *cells])
    return table


def front_table(found: Results) -> Table:
    """The best point of each ten MB, for one task and for many on one base."""
    table = Table("front", ["MB", "one task", f"{plots.MANY} tasks"], {1, 2})
    points: dict[int, list[tuple[float, float, str]]] = {}
    for tasks in (1, plots.MANY):
        points[tasks] = [
            (plots.bytes_of(m, tasks) / 1e6, m["accuracy"], f"{short(method)} on {recipe}".removeprefix("+ "))
            for recipe in found.recipes
            for method, m in found.metrics(recipe)["methods"].items()
            if method not in REFERENCES
        ]
    sizes = sorted({int(size // STEP) for of in points.values() for size, *_ in of})
    for low in sizes:
        row = [f"{low * STEP} to {(low + 1) * STEP}"]
        for tasks in (1, plots.MANY):
            inside = [point for point in points[tasks] if point[0] // STEP == low]
            best = max(inside, key=lambda point: point[1]) if inside else None
            row.append(f"{best[2]}: {best[1]:.3f} ({best[0]:.1f} MB)" if best else "")
        table.rows.append(row)
    return table


def bytes_table(found: Results) -> Table:
    """Size of each compressed base's weights against the uncompressed ones."""
    sizes = found.data["sizes"]
    rows = [[name, f"{sizes[name]['bytes'] / 1e6:.1f}", f"{sizes[name]['share']:.3f}"] for name in found.recipes]
    return Table("bytes", ["recipe", "MB", "share"], {0}, rows)


def between(text: str, name: str, new: str, of: str = "benchmarks.recipes") -> str:
    """The text with what stands between two marks of a benchmark replaced."""
    first, last = MARKS.format(f"start: {name}", of), MARKS.format(f"end: {name}", of)
    head, _, rest = text.partition(first)
    return f"{head}{first}\n{new}\n{last}{rest.partition(last)[2]}"


def main() -> None:
    """Merge, then write data, page and pictures."""
    data = merge(json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {})
    write_text(DATA, json.dumps(data, indent=1, sort_keys=True) + "\n")
    found = Results(data)
    text = PAGE.read_text(encoding="utf-8")
    for name, make in (("means", means_table), ("tasks", tasks_table), ("front", front_table), ("bytes", bytes_table)):
        text = between(text, name, make(found).grid())
    write_text(PAGE, text)
    metrics = {recipe: found.metrics(recipe) for recipe in found.recipes}
    title = found.tasks[0] if len(found.tasks) == 1 else f"mean of {len(found.tasks)} tasks"
    for path, draw in PICTURES.items():
        draw(metrics, title).savefig(path, dpi=130)


if __name__ == "__main__":
    main()
