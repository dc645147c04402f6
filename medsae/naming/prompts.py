"""Prompts are files: versioned by name, hashed into every result.

A prompt file is text with the line `[[images]]` where the images go and, optionally, `{{ variables }}` (Jinja). What is the same for all neurons stands
first, so that the engine's prefix cache serves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from medsae.artifacts import fingerprint
from medsae.errors import ConfigError

KINDS = ("finding", "anatomy", "device", "position", "image quality", "other")
"""What a concept can be."""

NAME_ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "maxLength": 300},
        "shared": {"type": "boolean"},
        "concept": {"type": "string", "minLength": 1, "maxLength": 80},
        "kind": {"type": "string", "enum": list(KINDS)},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["description", "shared", "concept", "kind", "confidence"],
    "additionalProperties": False,
}
"""JSON schema of a name, enforced while the answer is decoded. The description comes first: the name then follows from what was seen."""

IMAGES = "[[images]]"


@dataclass(frozen=True)
class Prompt:
    """A prompt file: `name` as configured, its `text`, and the schema of the answer (None: no JSON)."""

    name: str
    text: str
    schema: dict[str, Any] | None

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change with the text or the schema."""
        return fingerprint({"text": self.text, "schema": self.schema})

    def messages(self, images: list[str], captions: list[str] | None = None, **variables: Any) -> list[dict[str, Any]]:
        """One user message: the text before the images, the images (data URLs) each after its caption, the text after them."""
        # Stripped: Gemma3 puts newlines around images itself, and vLLM 0.29 loses an image whose newlines run into those of the text.
        before, after = (_render(part, variables).strip() for part in self.text.split(IMAGES))
        content: list[dict[str, Any]] = [{"type": "text", "text": before}]
        for index, image in enumerate(images):
            if captions and captions[index]:
                content.append({"type": "text", "text": captions[index].strip()})
            content.append({"type": "image_url", "image_url": {"url": image}})
        content.append({"type": "text", "text": after})
        return [{"role": "user", "content": content}]


def _render(text: str, variables: dict[str, Any]) -> str:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text).render(**variables)


def load_prompt(name: str, schema: dict[str, Any] | None = None) -> Prompt:
    """A prompt of the package by name (`name-v1`), or a file by path.

    Raises:
        ConfigError: there is no such prompt, or it does not hold exactly one `[[images]]`.
    """
    folder = resources.files("medsae.naming") / "prompts"
    packaged = folder / f"{name}.md"
    if packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        known = ", ".join(sorted(f.name[:-3] for f in folder.iterdir() if f.name.endswith(".md")))
        raise ConfigError(f"prompt {name!r} is neither one of the package's ({known}) nor a file")
    if text.count(IMAGES) != 1:
        raise ConfigError(f"prompt {name!r} must hold the line {IMAGES} exactly once, where the images go")
    return Prompt(name, text, schema)
