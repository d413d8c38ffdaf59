"""Values between the command line and params.yaml: whatever reads YAML 1.1 or 1.2 (PyYAML the one, DVC the other) finds the same."""

from __future__ import annotations

import re
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from calora.errors import CaloraError

FLOAT, TEXT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:str"


class Reader(yaml.SafeLoader):
    """As params.yaml is read, but 1e-5 is a number; YAML 1.1 takes it for a text."""


Reader.add_implicit_resolver(FLOAT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


RESOLVER: Any = Reader("")  # PyYAML has no types


def value_of(text: str, where: str) -> Any:
    """A value of the command line.

    Raises:
        CaloraError: it is no YAML.
    """
    try:
        return yaml.load(text, Reader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        found = f"{text!r}: {getattr(error, 'problem', None) or error}"
        raise CaloraError(where, "a value in YAML", found, "such as 0.1, 1e-5, q8 or '[a, b]'") from None


class Representer(RoundTripRepresenter):
    """Writes new floats as both versions of YAML read them: 1.0e-05; those that were in the file stay as they are written."""


def _float(representer: Representer, value: float) -> Any:
    return representer.represent_scalar(FLOAT, yaml.safe_dump(value).splitlines()[0])


def _null(representer: Representer, _: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


Representer.add_representer(float, _float)
Representer.add_representer(type(None), _null)


def editor() -> YAML:
    """Reads and writes params.yaml with its comments: what is not changed stays as it is written, to the letter."""
    found = YAML()
    found.preserve_quotes, found.width, found.Representer = True, 4096, Representer
    found.brace_single_entry_mapping_in_flow_sequence = True
    found.indent(mapping=2, sequence=4, offset=2)
    return found


def quoted(value: Any) -> Any:
    """The value, with quotes around texts that some reader would take for something else: yes, 1e-5, 017, null."""
    if isinstance(value, dict):
        return {key: quoted(one) for key, one in value.items()}
    if isinstance(value, list):
        return [quoted(one) for one in value]
    if isinstance(value, str) and RESOLVER.resolve(yaml.ScalarNode, value, (True, False)) != TEXT:
        return DoubleQuotedScalarString(value)
    return value
