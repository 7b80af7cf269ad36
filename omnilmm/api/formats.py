"""`response_format` (and `text.format` of the responses route): the form an answer must have.

`strict` false and true mean the same here: a form that is asked for is kept. What a schema may say is the business of
whoever keeps it; here it only has to be an object of at most MAX_SCHEMA_BYTES.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from omnilmm.api.fields import Strict
from omnilmm.api.strict_json import MAX_MEMBERS
from omnilmm.messages import Grammar, GrammarKind

MAX_SCHEMA_BYTES = 64 * 1024


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as compact JSON, members in the order they came."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class _Compact:
    """A JSON document that is not too large when written out."""

    max_bytes: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if len(schema_text(value).encode()) > self.max_bytes:
            raise PydanticCustomError(
                "invalid_value", "is larger than {limit} bytes of JSON", {"limit": self.max_bytes}
            )
        return value


SchemaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", max_length=64)]
Schema = Annotated[
    dict[Annotated[str, Field(max_length=512)], Any],
    Field(alias="schema", max_length=MAX_MEMBERS),
    _Compact(MAX_SCHEMA_BYTES),
]
Description = Annotated[str, Field(max_length=4096)]


class TextFormat(Strict):
    type: Literal["text"]

    def grammar(self) -> Grammar | None:
        return None


class JsonObjectFormat(Strict):
    type: Literal["json_object"]

    def grammar(self) -> Grammar | None:
        return Grammar(GrammarKind.JSON_OBJECT)


class _SchemaFields(Strict):
    model_config = ConfigDict(serialize_by_alias=True)

    name: SchemaName
    document: Schema
    description: Description | None = None
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        return Grammar(GrammarKind.JSON_SCHEMA, schema_text(self.document))


class JsonSchema(_SchemaFields):
    """The inner object of chat completions."""


class JsonSchemaFormat(Strict):
    """``{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}``."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> Grammar | None:
        return self.json_schema.grammar()


class FlatJsonSchemaFormat(_SchemaFields):
    """``{"type": "json_schema", "name": ..., "schema": ...}``."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Discriminator("type")]
FlatFormat = Annotated[TextFormat | JsonObjectFormat | FlatJsonSchemaFormat, Discriminator("type")]
