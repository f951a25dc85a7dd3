"""Prompt templates: the sentences a class name is put into before the text tower reads it."""

from collections.abc import Sequence

from rayclip.errors import UserError, nearest

PLACEHOLDER = "{}"

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "photo_ensemble": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a blurry photo of a {}.",
        "a bright photo of a {}.",
        "a dark photo of a {}.",
        "a photo of a large {}.",
        "a photo of a small {}.",
        "a drawing of a {}.",
        "a painting of a {}.",
    ),
    "glyphs": ("{}", "the character {}", "a picture of {}", "a glyph: {}", "one {}", "the symbol {}"),
    "emoji": ("{}", "an emoji of {}", "a picture of {}"),
}

DEFAULT_TEMPLATES = "photo_ensemble"
"""What the service and `Model.classify` put labels into where nothing else is asked for."""


def resolve_templates(value: str | Sequence[str]) -> tuple[str, ...]:
    """Templates from a set's name, one template, or a list of templates; each holds "{}" where the name goes.

    Raises UserError for an unknown set, an empty list, and a template without the placeholder.
    """
    if isinstance(value, str):
        if value in TEMPLATES:
            return TEMPLATES[value]
        if PLACEHOLDER not in value:
            raise UserError(f"unknown template set '{value}': {nearest(value, list(TEMPLATES))}")
        return (value,)
    if not value:
        raise UserError(f"the list of templates is empty: give at least one, or a set: {', '.join(sorted(TEMPLATES))}")
    for index, template in enumerate(value):
        if PLACEHOLDER not in template:
            raise UserError(f"template {index} '{template}' has no {PLACEHOLDER} where the class name goes")
    return tuple(value)


def fill(template: str, class_name: str) -> str:
    """The template with the class name in every placeholder. Other braces, in either text, stay as they are."""
    return template.replace(PLACEHOLDER, class_name)
