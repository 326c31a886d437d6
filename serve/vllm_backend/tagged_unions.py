"""Unions of vLLM's request models that look at what an item says it is before they look at the item.

Pydantic compares an item with every choice of a union, in turn: an item of `input` of /v1/responses with more than
thirty. Most of them say in a literal which `type` (or `role`) they take; of those that do not take the item's own none
could win. So only the others are compared, by the same rules: what is valid gives the same value, and what is not is
compared with the choices that were meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from serve.asgi.wrong_field import CHOICE

_KEYS = ("type", "role")
_NO_DICT, _ABSENT, _UNKNOWN = (CHOICE + what for what in ("no object", "absent", "unknown"))
# What of a schema holds no schemas.
OTHER = frozenset({"metadata", "serialization", "cls", "default", "expected"})

Schema: TypeAlias = dict[str, Any]
# Values of the key that a choice takes, `_ABSENT` among them; None if it may take any.
_Values: TypeAlias = frozenset[str | None] | None


def tagged(schema: Schema) -> Schema:
    """The same core schema with such unions."""
    unions = _Unions(schema)
    copy = unions.copied(schema)
    definitions = list(unions.definitions.values())
    return {"type": "definitions", "schema": copy, "definitions": definitions} if definitions else copy


class _Unions:
    def __init__(self, schema: Schema) -> None:
        self._named: dict[str, Schema] = {}
        # References that a part of the schema defines for all others.
        self._defined: set[str] = set()
        self._gather(schema, set())
        self._copies: dict[int, Any] = {}
        # Choices that several groups share, by their reference.
        self.definitions: dict[str, Schema] = {}

    def _gather(self, part: Any, seen: set[int]) -> None:
        if isinstance(part, list | tuple):
            for each in part:
                self._gather(each, seen)
        elif isinstance(part, dict) and id(part) not in seen:
            seen.add(id(part))
            if isinstance(part.get("type"), str) and isinstance(part.get("ref"), str):
                self._named[part["ref"]] = part
            if part.get("type") == "definitions":
                self._defined |= {each["ref"] for each in part["definitions"]}
            for name, value in part.items():
                if name not in OTHER:
                    self._gather(value, seen)

    def copied(self, part: Any) -> Any:
        if isinstance(part, list | tuple):
            return type(part)(map(self.copied, part))
        if not isinstance(part, dict):
            return part
        if id(part) not in self._copies:
            self._copies[id(part)] = copy = {}
            kind = part["type"] if isinstance(part.get("type"), str) else None
            for name, value in part.items():
                copy[name] = value if kind and name in OTHER else self.copied(value)
            if kind == "union" and (grouped := self._grouped(part, copy)):
                copy.clear()
                copy.update(grouped)
        return self._copies[id(part)]

    def _grouped(self, union: Schema, copy: Schema) -> Schema | None:
        """The union as one of groups; None if its choices do not say what they take."""
        schemas = [choice[0] if isinstance(choice, tuple) else choice for choice in union["choices"]]
        by_key = {key: [self._values(schema, key, ()) for schema in schemas] for key in _KEYS}
        key = max(_KEYS, key=lambda key: sum(values is not None for values in by_key[key]))
        taken = by_key[key]
        if sum(values is not None for values in taken) < 2:
            return None
        copies = [choice[0] if isinstance(choice, tuple) else choice for choice in copy["choices"]]
        choices = [(self._reference(each), CHOICE) for each in copies]
        rest = {name: value for name, value in copy.items() if name not in ("choices", "ref")}
        values = {value for each in taken if each is not None for value in each} - {_ABSENT}
        groups: dict[str | None, Schema] = {_NO_DICT: {**rest, "choices": choices}}
        for value in (*values, _ABSENT, _UNKNOWN):
            group = [choice for choice, each in zip(choices, taken, strict=True) if each is None or value in each]
            groups[value] = {**rest, "choices": group} if group else _one_of(key, values)
        named = {_tag(value): group for value, group in groups.items()}
        reference = {"ref": copy["ref"]} if "ref" in copy else {}
        return {"type": "tagged-union", "choices": named, "discriminator": _discriminator(key, named), **reference}

    def _reference(self, copy: Schema) -> Schema:
        if copy["type"] == "definition-ref":
            return copy
        reference = copy.get("ref") or f"choice {len(self.definitions)}"
        if reference not in self._defined:
            self.definitions[reference] = {**copy, "ref": reference}
        return {"type": "definition-ref", "schema_ref": reference}

    def _values(self, schema: Schema, key: str, within: tuple[str, ...]) -> _Values:
        """What the key of an object has to be, so that this may take the object."""
        match schema["type"]:
            case "definition-ref" if (name := schema["schema_ref"]) in self._named and name not in within:
                return self._values(self._named[name], key, (*within, name))
            case "definitions" | "function-after":
                return self._values(schema["schema"], key, within)
            case "model" if not schema.get("root_model"):
                return self._values(schema["schema"], key, within)
            case "typed-dict":
                field, total = schema["fields"].get(key), schema.get("total", True)
                return _literal(field, required=bool((field or {}).get("required", total)))
            case "model-fields":
                return _literal(schema["fields"].get(key), required=True)
        return None


def _literal(field: Schema | None, *, required: bool) -> _Values:
    if field is None or "validation_alias" in field:
        return None
    schema = field["schema"]
    values: set[str | None] = set() if required else {_ABSENT}
    while schema["type"] in ("default", "nullable"):
        values.add(_ABSENT if schema["type"] == "default" else None)
        schema = schema["schema"]
    if schema["type"] != "literal" or not all(isinstance(value, str) for value in schema["expected"]):
        return None
    return frozenset({*values, *schema["expected"]})


def _one_of(key: str, values: set[str | None]) -> Schema:
    """What takes no object, since none of the choices does, and says which they would."""
    literal = {"type": "literal", "expected": sorted(filter(None, values))}
    return {"type": "typed-dict", "fields": {key: {"type": "typed-dict-field", "schema": literal, "required": True}}}


def _tag(value: str | None) -> str:
    return value if value and value.startswith(CHOICE) else f"{CHOICE}={value}"


def _discriminator(key: str, groups: Mapping[str, Schema]) -> Callable[[Any], str]:
    def group(item: Any) -> str:
        if not isinstance(item, dict):
            return _NO_DICT
        if key not in item:
            return _ABSENT
        value = item[key]
        tag = _tag(value) if value is None or isinstance(value, str) else _UNKNOWN
        return tag if tag in groups else _UNKNOWN

    return group
