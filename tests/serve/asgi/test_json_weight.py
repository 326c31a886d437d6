"""A JSON text is weighed before it is built: a flood of small values is refused, the largest honest body is not."""

from __future__ import annotations

import json
import random

import pytest

from serve.asgi.json_weight import CONTAINERS, DEPTH, KEYS, VALUES, Weight, check, weighed
from serve.errors import BadRequest, TooLarge


def by_building(value) -> Weight:
    """The same numbers of what was built."""
    if not isinstance(value, list | dict):
        return Weight(0, 0, 0, 0)
    items = [by_building(item) for item in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return Weight(
        1 + sum(item.containers for item in items),
        max(len(value), 1) + sum(item.values for item in items),
        keys + sum(item.keys for item in items),
        1 + max((item.depth for item in items), default=0),
    )


TEXTS = ["", "x", '"', "\\", '\\"', '\\\\"', "{[,:]}", "ä🦊\n", '": [', "\\u005b", "\\\\", '"{"']


def drawn(chance: random.Random, depth: int = 0):
    kind = chance.choice(["list", "dict", "text", "number"] if depth < 6 else ["text", "number"])
    if kind == "list":
        return [drawn(chance, depth + 1) for _ in range(chance.randrange(5))]
    if kind == "dict":
        return {chance.choice(TEXTS) + str(i): drawn(chance, depth + 1) for i in range(chance.randrange(5))}
    return chance.choice(TEXTS) * chance.randrange(3) if kind == "text" else chance.choice([0, -1.5e3, None, True])


def nested(depth: int):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("seed", range(200))
def test_what_is_counted_is_what_is_built(seed):
    chance = random.Random(seed)
    value = [drawn(chance) for _ in range(20)]
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        built = by_building(json.loads(text))
        counted = weighed(text.encode())
        assert (counted.containers, counted.values, counted.keys) == (built.containers, built.values, built.keys)
        assert counted.depth == (built.depth if built.containers > DEPTH else built.containers)


def tools(count: int, parameters: int) -> list[dict]:
    properties = {
        f"p{i}": {"type": "string", "enum": ["a", "b"], "description": "takes {this}, [that], or: nothing"}
        for i in range(parameters)
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]


HONEST = {
    "a prompt of 128k token ids": {"prompt": [random.Random(0).randrange(150_000) for _ in range(131_072)]},
    "200 tools with schemas": {"messages": [], "tools": tools(200, 40)},
    "64 images": {"messages": [{"role": "user", "content": [{"image_url": {"url": "A" * 60_000}}] * 64}]},
    "4 MiB of code": {"prompt": 'x = {"a": [1, 2, {}], "b": f(g[h], {})}\n' * 100_000},
    "4 MiB of quotes": {"prompt": '"\\' * 1_000_000},
    "2,048 inputs of 512 token ids": {"input": [[7] * 500] * 2048},
    "2,000 messages with parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 2000},
    "the bias of 50,000 tokens": {"logit_bias": {str(i): 1 for i in range(50_000)}},
    "a schema 60 deep": {"response_format": nested(60)},
}


@pytest.mark.parametrize("name", HONEST)
def test_the_largest_honest_body_passes(name):
    check(json.dumps(HONEST[name]).encode())


FLOODS = {
    "empty lists": (b'{"a":[' + b"[]," * CONTAINERS + b"0]}", "lists and objects"),
    "empty objects": (b'{"a":[' + b"{}," * CONTAINERS + b"0]}", "lists and objects"),
    "numbers": (b"[" + b"0," * VALUES + b"0]", "values"),
    "texts": (b"[" + b'"",' * VALUES + b"0]", "values"),
    "keys": (b"{" + b'"":0,' * KEYS + b'"":0}', "keys"),
    "no JSON at all": (b"]]]{{{" * CONTAINERS, "lists and objects"),
    "a string without an end": (b"[" * (CONTAINERS + 1) + b'"\\"', "lists and objects"),
    "64 MiB of commas": (b"," * (64 << 20), "commas"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_refused_in_a_sentence(name):
    body, what = FLOODS[name]
    with pytest.raises(TooLarge, match=f"{what}.*send it in parts"):
        check(body)


def test_what_is_too_deep_is_refused():
    check(json.dumps(nested(DEPTH)).encode())
    with pytest.raises(BadRequest, match=f"nests {DEPTH + 1} deep"):
        check(json.dumps(nested(DEPTH + 1)).encode())
