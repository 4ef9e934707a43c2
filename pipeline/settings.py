"""Typed settings: YAML files and `key.sub=value` overrides in, frozen pydantic sections out.

Knows no stage. A knob is declared in a `Section` beside the code it turns, and the root config composes
sections. Validation runs in pydantic's strict JSON mode: `"3"` is no integer and `1` is no boolean, but a
list may fill a tuple and an integer a float. Numbers follow YAML 1.2, so `1e-4` is a float although
YAML 1.1, which PyYAML implements, calls it a string.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic_core import ErrorDetails

COMMAND_LINE = "command line"


class UserError(ValueError):
    """Bad input. The message is the one line the user reads: what is wrong, where, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SettingsError(UserError):
    """A setting is wrong: the line names the file (or the command line), the field and the remedy."""


class Section(pydantic.BaseModel):
    """A group of settings: immutable, strictly typed, without unknown keys, infinities or NaNs."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def load(root: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """The settings in the YAML file `path`, with each override `key.sub=value` laid over them in order.

    An override's value is read as YAML; a number in its key is a place in a list. One that picks another `type` for
    a section of the file leaves the settings behind that the new type does not know.

    Raises:
        SettingsError: the file cannot be read, or a key or value does not fit `root`.
    """
    data = _read(Path(path))
    laid = [_override(data, override) for override in overrides]
    retyped = {
        key.removesuffix(".type"): section
        for key, section, old in laid
        if key.endswith(".type") and old not in (None, section["type"])
    }
    while True:
        try:
            return root.model_validate_json(json.dumps(data, default=str))
        except pydantic.ValidationError as error:
            # A misspelt required field is also missing; the misspelling is the cause.
            first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        field, message = _explain(root, first)
        overridden = any(f"{field}.".startswith(f"{key}.") for key, _, _ in laid)
        section, _, name = field.rpartition(".")
        if overridden or section not in retyped or first["type"] != "extra_forbidden":
            raise SettingsError(f"{COMMAND_LINE if overridden else path}: {message}")
        del retyped[section][name]


def dump(section: Section) -> str:
    """`section` as YAML that `load` reads back to an equal one, every default spelled out."""
    data = section.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error line: the known word nearest to `word` after `prefix`, or all when none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known) or 'nothing'}"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is an error instead of a silent winner."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep=True).items()}


class _Dumper(yaml.SafeDumper):
    """Safe YAML in which a string that `_Loader` would read as a number is quoted."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _parse(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{source}: broken YAML{place}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SettingsError(f"{source}: broken YAML: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: expected `key: value` lines, found {_kind(data)}")
    return data


def _override(data: dict[str, Any], override: str) -> tuple[str, Any, Any]:
    """Lay `key.sub=value` over `data` in place; the dotted key, what now holds the value, and what stood there."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise SettingsError(f"{COMMAND_LINE}: {override!r} is no setting; write key.sub=value")
    *parents, last = key.split(".")
    node: Any = data
    for depth, step in enumerate([*parents, last]):
        if isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            place: Any = int(step)
        elif isinstance(node, dict):
            place = step
        else:
            above = ".".join(parents[:depth])
            raise SettingsError(f"{COMMAND_LINE}: {key}: {above} is {_kind(node)} and has no {step}")
        if depth < len(parents):
            if isinstance(node, dict) and node.get(place) is None:
                node[place] = {}
            node = node[place]
    before = node.get(place) if isinstance(node, dict) else node[place]
    node[place] = _parse(text, f"{COMMAND_LINE}: {key}")
    return key, node, before


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {dict: "a section", list: "a list"}.get(type(value), repr(value))


def _explain(root: type[Section], error: ErrorDetails) -> tuple[str, str]:
    """The dotted name of the field that pydantic's `error` is about, and the line to print."""
    keys, holders, options = _locate(root, error["loc"])
    field = ".".join(keys)
    match error["type"]:
        case "extra_forbidden":
            known = [name for holder in holders for name in holder.model_fields]
            return field, f"unknown key {field}; {suggest(keys[-1], known, field.removesuffix(keys[-1]))}"
        case "missing":
            return field, f"{field} is required"
        case "union_tag_not_found":
            known = [tag for option in options for tag in _tags(option)]
            return field, f"{field}.type is required; known here: {', '.join(known)}"
        case "union_tag_invalid":
            known = [tag for option in options for tag in _tags(option)]
            tag = str(error["ctx"]["tag"])
            return f"{field}.type", f"{field}.type: unknown {tag}; {suggest(tag, known)}"
        case "model_type" | "model_attributes_type":
            return field, f"{field}: expected a section, not {_kind(error['input'])}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not field:  # the root's own validators name what they are about
        return message.partition(":")[0], message
    scalar = not isinstance(error["input"], dict | list)
    return field, f"{field}: {message}" + (f", not {_kind(error['input'])}" if scalar else "")


def _locate(root: type[Section], location: Sequence[str | int]) -> tuple[list[str], list[Any], list[Any]]:
    """Walk pydantic's `location` down the types of `root`.

    Where the type is a union, pydantic inserts a step that names the member it tried (the `type` of a
    tagged section, the class or type otherwise); it is no key in the file and is left out of the name.

    Returns:
        The keys a user would write, the types that hold the last of them, and the types of its value.
    """
    keys: list[str] = []
    holders: list[Any] = []
    options: list[Any] = [root]
    for step in location:
        if len(options) > 1:
            options = [option for option in options if step in (*_tags(option), _name(option))] or options
            continue
        keys.append(str(step))
        holders = options
        options = [member for option in options for member in _members(option, step)]
    return keys, holders, options


def _members(option: Any, step: str | int) -> list[Any]:
    """The types that may stand at key or index `step` of a value of type `option`."""
    if isinstance(option, type) and issubclass(option, Section):
        field = option.model_fields.get(str(step))
        return _flatten(field.annotation) if field else []
    arguments = [argument for argument in get_args(option) if argument is not Ellipsis]
    if get_origin(option) is dict:
        return _flatten(arguments[1])
    if get_origin(option) is tuple and isinstance(step, int) and step < len(arguments):
        return _flatten(arguments[step])
    return _flatten(arguments[0]) if arguments else []


def _flatten(annotation: Any) -> list[Any]:
    """The members of a union without None; any other type is its own only member."""
    if get_origin(annotation) is Annotated:
        return _flatten(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _flatten(part)]
    return [] if annotation is type(None) else [annotation]


def _tags(option: Any) -> tuple[Any, ...]:
    """The values of `type` that pick the section `option` out of a tagged union."""
    if isinstance(option, type) and issubclass(option, Section) and "type" in option.model_fields:
        return get_args(option.model_fields["type"].annotation)
    return ()


def _name(option: Any) -> str:
    return getattr(option, "__name__", str(option))
