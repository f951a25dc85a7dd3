"""From a YAML file and `dotted.key=value` overrides to settings, with one clear line for every mistake."""

import os
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from rayclip.config.base import Config, PathMark
from rayclip.config.fields import marked_values, models_of, rename_keys
from rayclip.config.recipes import find_config
from rayclip.errors import UserError, nearest
from rayclip.io.read_only import check_readable, check_writable, scheme_of

Schema = TypeVar("Schema", bound=Config)


def load(schema: type[Schema], path: str | Path | None, overrides: list[str]) -> Schema:
    """Return the settings: defaults, then the YAML file or the named recipe, if any, then the overrides in order.

    A key may have the name that it had in the last release: a line on stderr says the new one. Raises UserError for a
    file that is missing or no YAML mapping, an unknown key (with the nearest one that exists), and a value of the wrong
    type.
    """
    values = _read_yaml(str(path)) if path is not None else {}
    renamed = rename_keys(schema, values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not of the form key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"'{override}': the value is not YAML: {' '.join(str(error).split())}") from None
        location, of_override = _renamed(schema, key.split("."), value, override)
        renamed += of_override
        _set(values, location, value, override)
    _note_renamed(renamed)
    return _check_addresses(validate(schema, values, str(path or "command line")))


def load_from_python(
    schema: type[Schema], base: str | PathLike[str] | Mapping[str, Any] | Schema | None, overrides: Mapping[str, Any]
) -> Schema:
    """Return the settings that a Python caller gives.

    Args:
        schema: the kind of settings.
        base: a recipe's name, a YAML file, values as nested mappings, settings, or None for defaults alone.
        overrides: values by key. A dotted key sets what it names; a mapping is merged into what is there.

    Raises:
        UserError: as `load` does.
    """
    if isinstance(base, Config):
        if not isinstance(base, schema):
            raise UserError(f"a {schema.__name__} is needed, not a {type(base).__name__}")
        values, source = base.model_dump(exclude_unset=True), schema.__name__
    elif isinstance(base, Mapping):
        values, source = _merge({}, base), "config"
    elif base is None or isinstance(base, str | PathLike):
        values, source = (_read_yaml(os.fspath(base)) if base is not None else {}), str(base or "arguments")
    else:
        raise UserError(f"a config is a YAML file, a mapping or a {schema.__name__}, not a {type(base).__name__}")
    renamed = rename_keys(schema, values)
    for key, value in overrides.items():
        plain = _plain(value)
        location, of_override = _renamed(schema, key.split("."), plain, f"{key}={value}")
        renamed += of_override
        if "." in key:
            _set(values, location, plain, f"{key}={value}")
        else:
            values = _merge(values, {location[0]: plain})
    _note_renamed(renamed)
    return _check_addresses(validate(schema, values, source))


def _check_addresses(config: Schema) -> Schema:
    """The settings. Raises UserError for a path in a store that could not be read, or not be written to."""
    for key, value, mark in marked_values(config):
        if not isinstance(mark, PathMark) or mark.access is None or not scheme_of(value):
            continue
        try:
            check_readable(value) if mark.access == "read" else check_writable(value)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return config


def _merge(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the others in their place; mappings that both have are merged in turn."""
    merged = {key: _plain(value) for key, value in values.items()}
    for key, value in others.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else _plain(value)
    return merged


def _plain(value: object) -> Any:
    """Return the value as YAML would hold it."""
    if isinstance(value, Config):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return os.fspath(value) if isinstance(value, PathLike) else value


def validate(schema: type[Schema], values: dict[str, Any], source: str) -> Schema:
    """The settings from plain values. Raises UserError that names the first wrong key in `source`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        # Where a name or a whole mapping is allowed, a mapping also fails to be a name: that is not the news.
        errors = [e for e in error.errors() if e["type"] != "string_type"] or error.errors()
        raise UserError(f"{source}: {_explain(schema, errors[0])}") from None


def read_record(schema: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """The settings that were recorded with a run, perhaps by the last release. Raises UserError as `validate` does."""
    current = deepcopy(dict(values))
    rename_keys(schema, current)
    return validate(schema, current, source)


def changed(config: Schema, values: Mapping[str, Any], source: str) -> Schema:
    """The settings with other values at dotted keys, checked. What was not set stays unset. Raises UserError."""
    plain = config.model_dump(exclude_unset=True)
    for key, value in values.items():
        location, _ = _renamed(type(config), key.split("."), value, f"{key}={value}")
        _set(plain, location, value, f"{key}={value}")
    return validate(type(config), plain, source)


def describe(schema: type[Config]) -> str:
    """Every key with its default and meaning, a line each."""
    lines = list(_keys(schema, ""))
    width = min(40, max(len(key) for key, _, _ in lines))
    return "\n".join(f"  {key:<{width}}  {default:<14}  {meaning}" for key, default, meaning in lines)


def _read_yaml(path: str) -> dict[str, Any]:
    file = find_config(path)
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' must hold keys and values, not {type(values).__name__}")
    return values


def _set(values: dict[str, Any], path: list[str], value: object, override: str) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{override}' reaches into '{part}', which holds {inner!r} and no keys")
        values = inner
    values[path[-1]] = value


def _renamed(
    schema: type[Config], path: list[str], value: object, override: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """The key of an override in this release's names, those within its value renamed in place; (old, new) of each."""
    nested: dict[str, Any] = {}
    _set(nested, path, value, override)
    renamed = rename_keys(schema, nested)
    location: list[str] = []
    for _ in path:
        ((key, nested),) = nested.items()
        location.append(key)
    return location, renamed


def _note_renamed(renamed: list[tuple[str, str]]) -> None:
    for old, new in dict(renamed).items():
        print(f"note: '{old}' is called '{new}' now; the old name is taken in this release only", file=sys.stderr)


def _explain(schema: type[Config], error: ErrorDetails) -> str:
    owner, key = _locate(schema, error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}': {nearest(str(error['loc'][-1]), list(owner.model_fields))}"
    if error["type"] == "union_tag_not_found":
        return f"the key '{key}.kind' is missing"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"'{key}' is {error['input']!r}: {message}"


def _locate(schema: type[Config], location: tuple[int | str, ...]) -> tuple[type[Config], str]:
    """The model that holds the key at `location`, and the key as people write it.

    Pydantic's locations also name the member of a union that was tried, which is no key.
    """
    candidates, key, named = [schema], [], False
    for depth, part in enumerate(location):
        if named:  # what people chose as a name is no field and no tag, even where it is spelled like one
            key.append(str(part))
            named = False
            continue
        fields = [model.model_fields[str(part)] for model in candidates if str(part) in model.model_fields]
        named = any(get_origin(field.annotation) is dict for field in fields)
        chosen = [model for model in candidates if part == model.__name__ or part in _tags(model)]
        if fields and depth < len(location) - 1:
            candidates = [model for field in fields for model in models_of(field.annotation)] or candidates
        elif chosen and not fields:
            candidates = chosen
            continue
        elif str(part).startswith("tuple["):  # as where a list or a single value is allowed
            continue
        key.append(str(part))
    return candidates[0], ".".join(key)


def _tags(model: type[Config]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def _keys(schema: type[Config], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in schema.model_fields.items():
        models = models_of(field.annotation)
        yield prefix + name, _default(field, bool(models)), field.description or ""
        container = "NAME." if get_origin(field.annotation) is dict else ""
        for model in models:
            yield from _keys(model, f"{prefix}{name}.{container}")


def _default(field: FieldInfo, nested: bool) -> str:
    if field.is_required():
        return "(required)"
    if field.default is PydanticUndefined or (nested and field.default is not None):
        return ""
    return "none" if field.default is None else str(field.default)
