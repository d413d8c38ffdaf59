"""Which code a stage uses: its static imports, followed through stages/ and calora/; of calora the rooms, not the files.

`python -m pipeline.imports` writes them into the `deps` of dvc.yaml.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# These only check values and name paths; the values themselves are tracked as params and deps.
UNTRACKED = {"stages/config.py", "stages/common.py", "stages/__init__.py", "calora/__init__.py", "calora/errors.py"}
BY_FILE = {"base", "download", "calibration", "taken"}


def file_of(module: str) -> str | None:
    """The project file of a module, or None if it is not one of ours."""
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).exists():
            return candidate.as_posix()
    return None


def imports_of(file: str) -> set[str]:
    """Project files that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("calora", "stages", "pipeline") and (path := file_of(name)):
                found.add(path)
    return found


def values_of(file: str) -> list[str]:
    """What stands beside a module under its name, such as stages/tasks.yaml, is a part of it."""
    beside = Path(file).with_suffix(".yaml").as_posix()
    return [beside] if (ROOT / beside).exists() else []


def files_of(stage: str) -> list[str]:
    """All tracked files that `stages/<stage>.py` uses, itself first."""
    seen: set[str] = set()
    todo = [f"stages/{stage}.py"]
    while todo:
        file = todo.pop()
        if file not in seen and file not in UNTRACKED:
            seen |= {file, *values_of(file)}
            todo += imports_of(file)
    return sorted(seen, key=lambda file: (file != f"stages/{stage}.py", file))


def keys_of(stage: str) -> set[str]:
    """The keys of params.yaml that a stage reads, wherever in its files: each chain of attributes behind `params`."""
    found: set[str] = set()
    for file in files_of(stage):
        if file.startswith("stages/") and file.endswith(".py"):
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            chains = (
                chain_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in inner
            )
            found |= {".".join(chain[1:]) for chain in chains if chain[:1] == ["params"]}
    return found


def chain_of(node: ast.AST) -> list[str]:
    """`a.b.c` as its names; empty where it does not begin with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    above = chain_of(node.value) if isinstance(node, ast.Attribute) else []
    return [*above, node.attr] if above and isinstance(node, ast.Attribute) else []


def room_of(file: str) -> str:
    """The folder of a file inside a room of calora; any other file itself."""
    parts = file.split("/")
    return "/".join(parts[:2]) if parts[0] == "calora" and len(parts) > 2 else file


def code_of(stage: str) -> list[str]:
    """What the stage's `deps` name: its files, and rooms of calora, except where whole rooms would run a download anew."""
    files = files_of(stage)
    return files if stage in BY_FILE else list(dict.fromkeys(map(room_of, files)))


def with_deps(text: str) -> str:
    """dvc.yaml with each stage's code among its deps, after its data."""
    lines: list[str] = []
    stage, ours = "", re.compile(r"\s+- (calora|stages)/")
    for line in text.splitlines():
        if match := re.match(r"  (\w+):$", line):
            stage = match[1]
        if ours.match(line):
            continue
        if lines and re.match(r"\s+params: ", line) and stage:
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            lines += [f"{indent}- {file}" for file in code_of(stage)]
        lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = ROOT / "dvc.yaml"
    path.write_text(with_deps(path.read_text(encoding="utf-8")), encoding="utf-8")
