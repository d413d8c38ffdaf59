"""Which files, or which splits of a hub dataset, are for training, validation and test; and their rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calora.errors import CaloraError
from pipeline.adopt.columns import headless
from pipeline.adopt.own import Own
from pipeline.adopt.wanted import Entry, Wanted, asked, hub_id, plain
from stages.files import KINDS, TABLES, read_file

NAMES = {  # split -> what the name of its file may have
    "train": r"train(ing)?", "validation": r"valid(ation)?|val|dev(elopment)?|eval", "test": r"test(ing)?|held_?out",
}  # fmt: skip


@dataclass
class Source:
    """Rows by split, and how params.yaml names them.

    Args:
        name: what the task may be called.
        rows: of train, and of validation and test where there are such.
        entry: source, repo, revision and subset of the hub, or source alone.
        places: split -> the file, or the hub's name of the split.
        label_names: column -> the publisher's names of the labels 0, 1, ...
    """

    name: str
    rows: dict[str, list[Entry]]
    entry: Entry
    places: dict[str, Path | str]
    label_names: dict[str, list[str]] = field(default_factory=dict)

    def placed(self, split: str, name: str, own: Own) -> str | None:
        """How params.yaml names a split; a file is put into own/<name>."""
        place = self.places.get(split)
        return own.file(place, Path("own") / name).as_posix() if isinstance(place, Path) else place


def gather(wanted: Wanted) -> Source:
    """What `--data`, `--validation` and `--test` name.

    Raises:
        CaloraError: nothing is there, or no telling which file is which.
    """
    paths = [Path(text).expanduser() for text in wanted.data]
    if len(paths) == 1 and not paths[0].exists() and paths[0].suffix not in (*KINDS, ".gz", ".parquet"):
        return _of_hub(wanted.data[0], wanted)
    for path in paths:
        if not path.exists():
            raise CaloraError("--data", "files, a folder, or a hub id", f"no {path}", "correct the path")
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    places = by_name(files_in(folder) if folder else paths, folder or Path("--data"))
    for split, text in (("validation", wanted.validation), ("test", wanted.test)):
        if text is not None:
            places[split] = Path(text).expanduser()
            if not places[split].is_file():
                raise CaloraError(f"--{split}", "a file", f"no {text}", "correct the path")
    if "train" not in places:
        raise CaloraError("--data", "a file for training", ", ".join(map(str, places.values())), "give it to --data")
    stem = plain(_stem(places["train"]))
    name = (
        plain(folder.resolve().name)
        if folder
        else plain(places["train"].parent.resolve().name)
        if stem in ("", "train")
        else stem
    )
    header = list(wanted.columns) or None
    rows = {split: read_file(path, header) for split, path in places.items()}
    if header is None and _kind(places["train"]) in TABLES and headless(rows["train"]):
        found = f"{', '.join(rows['train'][0]):.80}"
        fix = 'name them: --columns "label,text"'
        raise CaloraError(
            places["train"], "a first line that names the columns", f"one that looks like a row: {found}", fix
        )
    return Source(name, rows, {"source": "files", **({"header": header} if header else {})}, dict(places))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0]


def files_in(folder: Path) -> list[Path]:
    """The data files of a folder; raises `CaloraError` where it has none."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and _kind(path) in (*KINDS, ".parquet")]
    if not files:
        raise CaloraError(folder, f"files of {', '.join(KINDS)} or .parquet", "none", "name the folder that has them")
    return files


def _kind(path: Path) -> str:
    return "." + path.name.removesuffix(".gz").rpartition(".")[2].lower()


def by_name(files: list[Path], where: Path) -> dict[str, Path]:
    """Split -> file, by the files' names; one alone is for training.

    Args:
        where: what a message calls the place.

    Raises:
        CaloraError: a name says nothing, or two say the same.
    """
    found: dict[str, Path] = {}
    for path in files:
        words = [word for word in re.split(r"[^A-Za-z]+", _stem(path)) if word]
        split = next(
            (s for s, names in NAMES.items() if any(re.fullmatch(names, w, re.IGNORECASE) for w in words)), None
        )
        if split is None and len(files) > 1:
            fix = "give one to --data, the others to --validation and --test"
            raise CaloraError(where, "files called train, validation (or dev) and test", path.name, fix)
        split = split if len(files) > 1 and split else "train"
        if split in found:
            raise CaloraError(
                where, f"one file for {split}", f"{found[split].name} and {path.name}", "name one of them"
            )
        found[split] = path
    return found


def _of_hub(text: str, wanted: Wanted) -> Source:
    from datasets import get_dataset_config_names, load_dataset

    found = hub_id(text, "dataset", "--data")
    where = f"--data {text}"
    subset = wanted.subset
    subsets = asked(where, lambda: get_dataset_config_names(found.repo, revision=found.revision))
    if len(subsets) > 1 and subset not in subsets:
        several = ", ".join(subsets[:12])
        raise CaloraError(where, f"--subset, one of {several}", repr(subset), "name the one that is your task")
    loaded: Any = asked(where, lambda: load_dataset(found.repo, subset, revision=found.revision))
    places = {
        split: next((n for n in loaded if re.fullmatch(names, n, re.IGNORECASE)), None)
        for split, names in NAMES.items()
    }
    for split, given in (("validation", wanted.validation), ("test", wanted.test)):
        places[split] = given or places[split]
        if given and given not in loaded:
            raise CaloraError(f"--{split}", f"a split among {', '.join(loaded)}", given, "correct it")
    if places["train"] is None:
        raise CaloraError(where, "a split called train", ", ".join(loaded), "name another dataset")
    kept = {split: place for split, place in places.items() if place}
    features = loaded[kept["train"]].features
    names = {column: list(kind.names) for column, kind in features.items() if getattr(kind, "names", None)}
    entry = {"source": "hub", "repo": found.repo, "revision": found.revision, "subset": subset}
    rows = {split: list(loaded[place]) for split, place in kept.items()}
    return Source(plain(subset or found.repo.rpartition("/")[2]), rows, entry, dict(kept), names)
