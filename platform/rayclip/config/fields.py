"""What the marks on the settings' fields say (`config/base.py`), for a class of settings or for given ones."""

from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rayclip.config.base import Config, Effect, PathMark, RenamedFrom, TrackingMark
from rayclip.errors import UserError

Settings = TypeVar("Settings", bound=Config)
Mark = TypeVar("Mark")


class MarkedValue(NamedTuple):
    """A text in the settings, under its dotted key, and the mark of its field. None is an empty text."""

    key: str
    value: str
    mark: PathMark | TrackingMark


def models_of(annotation: Any) -> list[type[Config]]:
    """The settings classes that a field's type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_of(argument)]


def keys_with(schema: type[Config], *effects: Effect) -> frozenset[str]:
    """Dotted keys of the fields that have one of the effects; a section that has it stands for all in it.

    A path that is written decides nothing of what is written there: it counts as Effect.SAME_RESULT.
    """
    return frozenset(_keys_with(schema, effects, ""))


def _keys_with(schema: type[Config], effects: tuple[Effect, ...], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if any(effect in _effects(field) for effect in effects):
            yield prefix + name
        elif get_origin(field.annotation) not in (dict, tuple):
            for model in models_of(field.annotation):
                yield from _keys_with(model, effects, f"{prefix}{name}.")


def _effects(field: FieldInfo) -> set[Effect]:
    effects = {mark for mark in field.metadata if isinstance(mark, Effect)}
    is_output = any(mark.access in ("write", "cache") for mark in marks_in(field, PathMark))
    return effects | ({Effect.SAME_RESULT} if is_output else set())


def marks_in(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    """The field's marks of a kind: its own, and those of the values within it."""
    own = [mark for mark in field.metadata if isinstance(mark, kind)]
    return own + list(_marks_within(field.annotation, kind))


def _marks_within(annotation: Any, kind: type[Mark]) -> Iterator[Mark]:
    if get_origin(annotation) is Annotated:
        yield from (mark for mark in annotation.__metadata__ if isinstance(mark, kind))
    for argument in get_args(annotation):
        yield from _marks_within(argument, kind)


def without(values: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    """Plain settings less what is under the dotted keys."""
    kept = {}
    for name, value in values.items():
        inner = frozenset(key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}."))
        if name not in keys:
            kept[name] = without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


# Paths


def map_paths(config: Settings, change: Callable[[str, PathMark], str]) -> Settings:
    """The settings with `change(value, mark)` for every path in them."""

    def change_path(found: MarkedValue) -> str | None:
        mark = found.mark
        is_path = bool(found.value) and isinstance(mark, PathMark) and mark.access is not None
        return change(found.value, mark) if is_path and isinstance(mark, PathMark) else None

    return _map(config, "", change_path)


def marked_values(config: Config) -> list[MarkedValue]:
    """All texts in the settings whose fields are marked, in the order of the fields."""
    found: list[MarkedValue] = []
    _map(config, "", found.append)
    return found


def _map(config: Settings, prefix: str, change: Callable[[MarkedValue], str | None]) -> Settings:
    """The settings with what `change` gives for marked texts; None leaves one as it is."""
    changes = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        new = _map_value(value, annotation, prefix + name, change)
        if new is not value:
            changes[name] = new
    return config.model_copy(update=changes) if changes else config


def _map_value(value: Any, annotation: Any, key: str, change: Callable[[MarkedValue], str | None]) -> Any:
    if isinstance(value, Config):
        return _map(value, f"{key}.", change)
    if isinstance(value, str) or value is None:
        mark = _text_mark(annotation)
        new = change(MarkedValue(key, value or "", mark)) if mark else None
        return value if new is None else new
    if isinstance(value, dict):
        inner = {k: _map_value(v, _inner(annotation, dict), f"{key}.{k}", change) for k, v in value.items()}
        return inner if any(inner[k] is not value[k] for k in value) else value
    if isinstance(value, tuple):
        items = tuple(_map_value(v, _inner(annotation, tuple), key, change) for v in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def _text_mark(annotation: Any) -> PathMark | TrackingMark | None:
    """The mark of a text that is itself the value, not one in a list."""
    for option in _options(annotation):
        for mark in option.__metadata__ if get_origin(option) is Annotated else ():
            if isinstance(mark, PathMark | TrackingMark):
                return mark
    return None


def _inner(annotation: Any, container: type) -> Any:
    """The type of a container's values."""
    for option in _options(annotation):
        option = option.__origin__ if get_origin(option) is Annotated else option
        if get_origin(option) is container:
            return [argument for argument in get_args(option) if argument is not Ellipsis][-1]
    return None


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; what is said of a union is said of each."""
    if get_origin(annotation) is Annotated:
        for option in _options(annotation.__origin__):
            yield Annotated[option, *annotation.__metadata__] if option is not annotation.__origin__ else annotation
    elif get_origin(annotation) in (Union, UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


# Keys that had other names


def rename_keys(schema: type[Config], values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Give plain settings the keys of this release, in place. Returns (old, new) of each that was renamed, dotted.

    Raises UserError where a value is there under both.
    """
    renamed = []
    for name, field in schema.model_fields.items():
        for before in marks_in(field, RenamedFrom):
            if before.key not in values:
                continue
            if name in values:
                raise UserError(f"'{prefix}{before.key}' is called '{prefix}{name}' now: give it once")
            values[name] = values.pop(before.key)
            renamed.append((f"{prefix}{before.key}", f"{prefix}{name}"))
        for model in models_of(field.annotation):
            for key, inner in _mappings(values.get(name), get_origin(field.annotation) is dict):
                if _is_of(model, inner):
                    renamed += rename_keys(model, inner, f"{prefix}{name}.{key}")
    return renamed


def _mappings(value: Any, by_name: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings of settings that a field holds, with what comes before their keys."""
    if isinstance(value, dict) and by_name:
        yield from ((f"{name}.", inner) for name, inner in value.items() if isinstance(inner, dict))
    elif isinstance(value, dict):
        yield "", value
    elif isinstance(value, list | tuple):
        yield from ((f"{i}.", inner) for i, inner in enumerate(value) if isinstance(inner, dict))


def _is_of(model: type[Config], values: dict[str, Any]) -> bool:
    kind = model.model_fields.get("kind")
    return kind is None or values.get("kind", kind.default) in get_args(kind.annotation)


def describe_change(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """Name the first setting that differs, as "source.seed is 0 there and 1 here"."""
    for key in [*here, *there]:
        a, b = there.get(key), here.get(key)
        if a != b:
            if isinstance(a, dict) and isinstance(b, dict) and a.get("kind") == b.get("kind"):
                return describe_change(a, b, f"{prefix}{key}.")
            if isinstance(a, dict) and isinstance(b, dict):
                key, a, b = f"{key}.kind", a.get("kind"), b.get("kind")
            return f"{prefix}{key} is {a!r} there and {b!r} here"
    raise AssertionError("the settings are equal")


def describe_replaced(before: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """How the summary of an output differs in its settings from the one that takes its place; None where it does not.

    One of an older version does not say its settings.
    """
    if before is None or "settings" not in before or before["settings"] == now["settings"]:
        return None
    return f"it was of other settings ({describe_change(before['settings'], now['settings'])})"
