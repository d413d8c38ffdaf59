"""Read a data file as its publisher means it: JSON and tables, every value as the text that stands in the file.

No type is guessed: `0017`, `None` and `1.0` stay as they are. CSV is quoted (RFC 4180); TSV is not, as GLUE's files are.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from calora.errors import CaloraError

OWN = Path("own")
Rows = list[dict[str, Any]]
Cells = list[list[str]]


def own_path(name: str, where: str) -> Path:
    """A path inside own/, which DVC watches; not behind a linked folder, where DVC does not look."""
    path = Path(os.path.normpath(name))
    if len(path.parts) < 2 or path.parts[0] != OWN.name:
        raise CaloraError(where, "a path inside own/", repr(name), "copy it there, or link the file there")
    if not path.exists():
        raise CaloraError(where, "a path inside own/", f"no {path}", "correct the path")
    for folder in (path, *path.parents):
        if folder.is_symlink() and folder.is_dir() and folder != OWN:
            fix = "copy it, or link its files one by one: DVC does not see edits behind a linked folder"
            raise CaloraError(where, "a folder of its own inside own/", f"{folder} is a link", fix)
    return path


def read_file(path: Path, header: Sequence[str] | None = None) -> Rows:
    """The rows of a file by the names of their columns; a value that is missing is None.

    Args:
        header: the names, of a table that has no line of them.

    Raises:
        CaloraError: not one of READERS, or broken; names the row.
    """
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if header is not None and kind not in TABLES:
        raise CaloraError(path, "a csv or tsv file, where columns are given names", kind, "leave their names out")
    if kind == ".parquet":
        return _parquet(path)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise CaloraError(path, f"a file of {known} (.gz too) or .parquet", f"a {kind or 'bare'} file", "convert it")
    opened: Callable[..., Any] = gzip.open if packed else open
    try:
        # A line ends at its line feed: a lone carriage return or a mark of Unicode's is a part of the text.
        with opened(path, "rt", encoding="utf-8-sig", newline="" if kind == ".csv" else "\n") as stream:
            return _table(path, TABLES[kind](path, stream), header) if kind in TABLES else READERS[kind](path, stream)
    except UnicodeDecodeError as error:
        raise CaloraError(path, "text in UTF-8", error, "convert it to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CaloraError(path, "a whole gzip file", error, "fetch it anew") from None


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)


def _json_lines(path: Path, stream: Iterable[str]) -> Rows:
    rows = []
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = _parse(line)
            except ValueError as error:
                raise CaloraError(f"{path}, line {number}", "one JSON object a line", error, "mend the file") from None
            rows.append(row)
    return _objects(path, rows)


def _json(path: Path, stream: TextIO) -> Rows:
    text = stream.read()
    try:
        whole = _parse(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise CaloraError(path, "a JSON list of objects", error, "mend the file") from None
        return _json_lines(path, text.split("\n"))
    if isinstance(whole, dict) and (squad := _squad(path, whole)):
        return squad
    return _objects(path, whole if isinstance(whole, list) else [whole])


def _squad(path: Path, whole: dict[str, Any]) -> Rows:
    """A row for each question of SQuAD's nested file: title, context, question, id, answers; of any other file none."""
    articles = whole.get("data")
    if not isinstance(articles, list) or not all(isinstance(one, dict) and "paragraphs" in one for one in articles):
        return []
    try:
        return [
            {"title": article.get("title"), "context": paragraph["context"], **asked}
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (KeyError, TypeError):
        expected = "SQuAD's nesting: data, paragraphs, each with a context and qas"
        raise CaloraError(path, expected, "another one", "fetch it anew, or write a question a line (jsonl)") from None


def _objects(path: Path, rows: list[Any]) -> Rows:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CaloraError(f"{path}, row {number}", "a JSON object", f"{row!r:.60}", "mend the file")
    return rows


def _csv(path: Path, stream: TextIO) -> Cells:
    csv.field_size_limit(sys.maxsize)  # a text may be long
    try:
        return list(csv.reader(stream, strict=True))
    except csv.Error as error:
        raise CaloraError(path, "fields between commas, quoted as RFC 4180 has it", error, "mend the file") from None


def _tsv(path: Path, stream: TextIO) -> Cells:
    return [line.rstrip("\r\n").split("\t") if line.strip("\r\n") else [] for line in stream]


def _table(path: Path, lines: Cells, names: Sequence[str] | None) -> Rows:
    """Rows below a line of names; an empty cell is missing, and so are those that a short row leaves out."""
    cells = [line for line in lines if line]
    header = list(names) if names is not None else cells.pop(0) if cells else []
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        fix = "rename them, or say `header` (adopt: --columns) where there is no line of names"
        raise CaloraError(path, "a name of its own for each column", f"{', '.join(header):.80}", fix)
    rows = []
    for number, values in enumerate(cells, 1):
        if len(values) > len(header):
            found = f"{len(values)}: {values!r:.80}"
            raise CaloraError(f"{path}, row {number}", f"at most {len(header)} cells", found, "mend the file")
        row: dict[str, Any] = dict.fromkeys(header)
        row.update({name: value for name, value in zip(header, values, strict=False) if value})
        rows.append(row)
    return rows


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: Rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise CaloraError(path, "a whole parquet file", str(error).splitlines()[0], "fetch it anew") from None
    return rows


READERS: dict[str, Callable[[Path, TextIO], Rows]] = {".jsonl": _json_lines, ".json": _json}
TABLES: dict[str, Callable[[Path, TextIO], Cells]] = {".csv": _csv, ".tsv": _tsv}
KINDS = (*READERS, *TABLES)
