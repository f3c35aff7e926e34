"""One declaration of a setting: its type, default and help are a flag, a YAML key and a field.

A setting is a field of a frozen dataclass. Its name, its flag and its YAML key are one word:
`batch_size` is `--batch-size` and `batch_size:`. A command is a list of settings
(`read_arguments`). A flag wins over the YAML file, the file over the default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ConfigError


def setting(
    default: Any,
    help: str,
    *,
    prefix: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = math.inf,
    bare: str | None = None,
) -> Any:
    """A field of `Settings`, with its line for --help.

    Args:
        prefix: stands before the name outside Python: `rank` is `lora_rank`.
        at_least, above, at_most: bounds of a number, the second one exclusive.
        bare: what the flag means that is given without a value.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "bare": bare}
    return field(default=default, metadata={"help": help, "prefix": prefix, **bounds})


@dataclass(frozen=True)
class Settings:
    """Checks types and bounds of every field when it is made, whoever makes it."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _coerce(getattr(self, item.name), hints[item.name], _key(item))
            least, above, most = (item.metadata[key] for key in ("at_least", "above", "at_most"))
            if value is not None and (least is not None or above is not None):
                enough = value >= least if above is None else value > above
                if not enough or not value <= most or value == math.inf:
                    wanted = f"{least} or more" if above is None else f"above {above}"
                    limit = f", at most {most}" if most < math.inf else ""
                    raise wrong(_key(item), value, wanted + limit)
            object.__setattr__(self, item.name, value)


def wrong(key: str, value: object, wanted: str) -> ConfigError:
    """The error for the value of one setting."""
    return ConfigError(f"{key} is {value}", wanted=wanted, do=f"change {key}")


def _key(item: dataclasses.Field) -> str:
    return item.metadata["prefix"] + item.name


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type that a field declares; YAML's `1e-4` is text and becomes a number."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _coerce(value, type(value) if type(value) in options else options[0], key)
    if origin is Literal:
        if str(value) in options:  # YAML has numbers
            return str(value)
        wanted = "one of " + ", ".join(map(str, options))
    elif origin is Sequence:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return [*value]
        wanted = "texts"
    elif origin in (tuple, Mapping):
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        is_list = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        if is_list:
            value = [part for item in value for part in _parts(item, pairs=origin is Mapping)]
        if origin is tuple and is_list:
            return tuple(value)
        if origin is Mapping and is_list and all("=" in pair for pair in value):
            value = dict(pair.split("=", 1) for pair in value)
            if options[1] is int:  # a float takes its text below, and wrong text its message
                value = {name: int(v) if v.isdecimal() else v for name, v in value.items()}
        is_map = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        if origin is Mapping and is_map:
            return {name: _coerce(v, options[1], f"{key}.{name}") for name, v in value.items()}
        wanted = "a list of names" if origin is tuple else "pairs, such as name=value"
    elif kind is float:
        if not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                return float(value)
        wanted = "a number"
    else:
        if isinstance(value, Path):
            value = str(value)
        if type(value) is kind:
            return value
        wanted = {bool: "true or false", int: "a whole number", str: "text"}[kind]
    raise wrong(key, repr(value), wanted)


def _parts(item: str, pairs: bool) -> list[str]:
    """An item of a list that may be a list with commas itself; a comma may be in a pair's value."""
    parts = [part.strip() for part in item.split(",") if part.strip()]
    return parts if not pairs or all("=" in part for part in parts) else [item]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, as a flat mapping of keys to values."""
    import yaml

    wanted, do = "lines of `key: value`", "mend the file"
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        found = f"cannot read {path}: {error}"
        raise ConfigError(found, wanted=wanted, do="check the path") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", wanted=wanted, do=do) from None
    if not isinstance(content, dict | None):
        found = f"{path} holds a {type(content).__name__}"
        raise ConfigError(found, wanted=wanted, do=do)
    return content or {}


def build(
    groups: Sequence[type[Settings]], values: Mapping[str, Any], source: str
) -> tuple[Any, ...]:
    """An instance of every group from one flat mapping, with keys as in YAML.

    Raises:
        ConfigError: an unknown key, which the message says is in `source`, or a wrong value.
    """
    keys = [{_key(item): item.name for item in dataclasses.fields(group)} for group in groups]
    known = sorted(set().union(*keys))
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                f"unknown key {key!r} in {source}",
                wanted="one of " + ", ".join(known),
                do=f"did you mean {near[0]!r}?" if near else "remove it",
            )
    return tuple(
        group(**{names[key]: value for key, value in values.items() if key in names})
        for group, names in zip(groups, keys)
    )


def flatten(*settings: Settings) -> dict[str, Any]:
    """The settings as one flat mapping, the way a YAML file holds them."""
    flat = {}
    for group in settings:
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            flat[_key(item)] = list(value) if isinstance(value, tuple) else value
    return flat


class Part(NamedTuple):
    """Settings of a command: those of a group, under a title in --help.

    Attributes:
        only: names of fields; empty for all.
        positional: names of fields that are given without a flag; "model?" may be left out.
        help: help of its own for single fields, where the command means something else by them.
    """

    group: type[Settings]
    title: str
    only: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    help: Mapping[str, str] = types.MappingProxyType({})


def read_arguments(
    name: str,
    description: str,
    parts: Sequence[Part],
    arguments: Sequence[str] | None = None,
    *,
    usage: str | None = None,
    yaml_groups: Sequence[type[Settings]] = (),
    merge: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = operator.or_,
) -> dict[str, Any]:
    """What was given on the command line of `python -m NAME`, by key; `build` makes settings of it.

    Args:
        arguments: the command line's words; None is sys.argv's.
        usage: for --help, after `python -m NAME`.
        yaml_groups: settings that a file named with --config may hold; empty for no such flag.
        merge: (values of the file, values of the flags) -> both, where flags win.

    Raises:
        ConfigError: a file that cannot be read, or holds an unknown key or a wrong value.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        usage=usage and f"python -m {name} {usage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if yaml_groups:
        text = "a YAML file of these settings; flags win over it"
        parser.add_argument("-c", "--config", metavar="FILE", help=text)
    for part in parts:
        _add_flags(parser, part)
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    from_file = read_yaml(path) if path else {}
    build(yaml_groups, from_file, str(path))
    return merge(from_file, given)


def _add_flags(parser: argparse.ArgumentParser, part: Part) -> None:
    """One flag per field; a flag that is not given leaves no value."""
    section = parser.add_argument_group(part.title)
    hints = typing.get_type_hints(part.group)
    for item in dataclasses.fields(part.group):
        if part.only and item.name not in part.only:
            continue
        kind, key = hints[item.name], _key(item)
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = typing.get_args(kind)[0]  # the others are None, or words for a number
        origin, choices = typing.get_origin(kind), typing.get_args(kind)
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        options["help"] = part.help.get(item.name, item.metadata["help"]) + _shown(item.default)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif origin is Literal:
            options.update(choices=choices, type=type(choices[0]))
            if bare := item.metadata["bare"]:
                options.update(nargs="?", const=bare)
        elif origin is Sequence:
            options.update(nargs="+", metavar="TEXT")
        elif origin in (tuple, Mapping):
            options.update(nargs="+", metavar="NAME" if origin is tuple else "NAME=VALUE")
        else:
            options.update(type=kind, metavar={int: "N", float: "X"}.get(kind, "TEXT"))
        if item.name in part.positional:
            section.add_argument(key, **options | {"metavar": key.upper()})
        elif f"{item.name}?" in part.positional:
            section.add_argument(key, **options | {"metavar": key.upper(), "nargs": "?"})
        else:
            section.add_argument("--" + key.replace("_", "-"), dest=key, **options)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if isinstance(default, tuple):
        default = " ".join(default)
    return "" if default is None else f" (default: {default})"
