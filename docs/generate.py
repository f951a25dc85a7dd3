"""A hook of mkdocs: the reference pages and the notebook's page, made from the code at every build."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rayclip.cli.command import Command
from rayclip.cli.main import COMMANDS, describe_command, get_command
from rayclip.cli.ui import UiConfig
from rayclip.config import Config
from rayclip.config.recipes import find_config, list_recipes
from rayclip.serve.api import build_api
from rayclip.serve.config import ServeConfig
from rayclip.serve.service import Service

DOCS = Path(__file__).parent
_COMPARISONS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LONGEST_DEFAULT = 60
_FROM_THE_REPOSITORY = {
    "explanation/benchmarks.md": "BENCHMARKS.md",
    "explanation/contributing.md": "CONTRIBUTING.md",
    "how-to/infrastructure.md": "infra/README.md",
}
"""Pages that are files of the repository, which people read there too."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of settings in the menu."""
    for section in config.nav or []:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if "Settings" in entry:
                entry["Settings"] = [{name: f"reference/settings/{name}.md"} for name in schemas()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, content in pages():
        files.append(File.generated(config, path, content=content))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path and the Markdown of every page that is made."""
    yield "reference/commands.md", commands_page()
    yield "reference/recipes.md", recipes_page()
    yield "reference/http.md", http_page()
    yield "notebook.md", notebook_page(DOCS / "notebook.ipynb")
    for path, source in _FROM_THE_REPOSITORY.items():
        yield path, (DOCS.parent / source).read_text()
    for name, schema in schemas().items():
        yield f"reference/settings/{name}.md", settings_page(name, schema)


def schemas() -> dict[str, type[Config]]:
    """Return the settings class of every command that has one."""
    found: dict[str, type[Config]] = {}
    for name in COMMANDS:
        command = get_command(name)
        if isinstance(command, Command):
            found[name] = command.schema
    return found | {"serve": ServeConfig, "ui": UiConfig}


def commands_page() -> str:
    """Return the page of commands."""
    known = schemas()
    lines = ["# Commands", "", "`rayclip COMMAND --help` shows the same keys in a terminal.", ""]
    for name in COMMANDS:
        lines += [f"## {name} {{ #{name} }}", "", describe_command(name), "", "```text", _usage(name), "```", ""]
        if name in known:
            lines += [f"Its keys: [settings of {name}](settings/{name}.md).", ""]
    return "\n".join([*lines, (DOCS / "reference" / "_commands.md").read_text()])


def _usage(name: str) -> str:
    command = get_command(name)
    if isinstance(command, Command):
        return command.help().partition("\n\n")[0]
    module = inspect.getmodule(command)
    usage = getattr(module, "_USAGE", getattr(module, "USAGE", f"usage: rayclip {name} [key=value ...]"))
    return str(usage).rstrip()


def recipes_page() -> str:
    """Return the page of recipes."""
    intro = (
        "A recipe is a YAML file in the package, found by its name: `rayclip train demo`. Any path to a YAML works too."
    )
    lines = ["# Recipes", "", intro, ""]
    for name in list_recipes():
        text = find_config(name).read_text()
        comment = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
        lines += [f"## {name} {{ #{name} }}", "", " ".join(comment), ""]
        lines += [
            '??? note "The file"',
            "",
            "    ```yaml",
            *(f"    {line}" for line in text.splitlines()),
            "    ```",
            "",
        ]
    return "\n".join(lines)


def settings_page(name: str, schema: type[Config]) -> str:
    """Return the page of one command's settings."""
    lines = [
        f"# Settings of {name}",
        "",
        f"What [`rayclip {name}`](../commands.md#{name}) takes, as `key=value` or in YAML.",
        "",
    ]
    return "\n".join([*lines, *_section(schema, "")])


def _section(schema: type[Config], prefix: str) -> Iterator[str]:
    nested: list[tuple[str, type[Config]]] = []
    for key, field in schema.model_fields.items():
        models = _models(field.annotation)
        yield from _entry(prefix + key, field, bool(models))
        container = "NAME." if get_origin(field.annotation) is dict else ""
        nested += [(f"{prefix}{key}.{container}", model) for model in models]
    for inner, model in nested:
        kind = model.model_fields.get("kind")
        chosen = f" of kind {kind.default}" if kind is not None else ""
        yield from (f"## {inner.rstrip('.')}{chosen}", "", _first_paragraph(model), "")
        yield from _section(model, inner)


def _entry(key: str, field: FieldInfo, nested: bool) -> Iterator[str]:
    facts = [f"`{format_type(field.annotation)}`{', below' if nested else ''}", *_limits(field)]
    default = _default(field, nested)
    yield f"`{key}`"
    yield f":   {(field.description or '').strip()}"
    yield f"    <small>{' · '.join([*facts, *([default] if default else [])])}</small>"
    yield ""


def _limits(field: FieldInfo) -> list[str]:
    limits = [
        f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in _COMPARISONS.items() if hasattr(m, name)
    ]
    return [f"`{limit}`" for limit in limits]


def _default(field: FieldInfo, nested: bool) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or (nested and field.default is not None):
        return ""
    text = json.dumps(field.default, default=str) if isinstance(field.default, str) else repr(field.default)
    return f"default `{'none' if field.default is None else text[:_LONGEST_DEFAULT]}`"


def format_type(annotation: Any) -> str:
    """Return a field's type as people write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return format_type(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " | ".join("none" if each is type(None) else format_type(each) for each in arguments)
    if origin is tuple:
        return (
            f"list of {format_type(arguments[0])}"
            if arguments[-1] is Ellipsis
            else f"{len(arguments)} x {format_type(arguments[0])}"
        )
    if origin is dict:
        return f"{format_type(arguments[1])} by name"
    return str(getattr(annotation, "__name__", annotation))


def _models(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _first_paragraph(owner: object) -> str:
    return inspect.getdoc(owner).partition("\n\n")[0] if inspect.getdoc(owner) else ""  # type: ignore[union-attr]


def http_page() -> str:
    """Return the page of the service's endpoints, from its OpenAPI description."""
    # Describing it asks none of the deployments.
    service = Service(ServeConfig(model="-"), None, None, None)  # type: ignore[arg-type]
    described = build_api(service, None).openapi()
    lines = ["# HTTP endpoints", "", (DOCS / "reference" / "_http.md").read_text(), ""]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}", "", operation.get("description", "").strip(), ""]
            lines += _body(operation, described["components"]["schemas"])
    return "\n".join(lines)


def _body(operation: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if schema is not None:
        yield from ("The body, as JSON:", "")
        yield from _properties(_resolved(schema, known), known)
    others = [kind for kind in content if kind != "application/json"]
    if others:
        yield from (f"It is also taken as {' and '.join(f'`{kind}`' for kind in others)}.", "")
    answer = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
    found = _resolved(answer.get("items", answer), known)
    if "properties" in found:
        yield from (f"The answer{', a list of' if 'items' in answer else ''}:", "")
        yield from _properties(found, known)


def _properties(schema: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        default = "required" if name in required else f"default `{json.dumps(value.get('default'))}`"
        meaning = value.get("description") or _resolved(value, known).get("description") or ""
        yield from (f"`{name}`", f":   {meaning.splitlines()[0] if meaning else ''}")
        yield from (f"    <small>`{_json_type(value)}` · {default}</small>", "")


def _json_type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " | ".join("none" if each.get("type") == "null" else _json_type(each) for each in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    return (
        f"list of {_json_type(schema.get('items', {}))}"
        if schema.get("type") == "array"
        else str(schema.get("type", "any"))
    )


def _resolved(schema: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return known.get(schema["$ref"].rpartition("/")[2], {}) if "$ref" in schema else schema


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text, its code, and what each cell printed."""
    notebook = json.loads(path.read_text())
    lines = [f"[Download this notebook]({path.name})", ""]
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            lines += _output(output)
    title, *rest = lines[2:]
    return "\n".join([title, "", *lines[:2], *rest])


def _output(output: dict[str, Any]) -> list[str]:
    data = output.get("data", {})
    if "image/png" in data:
        return [f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})", ""]
    text = "".join(output.get("text", data.get("text/plain", "")))
    return ["```text", text.rstrip(), "```", ""] if text.strip() else []
