"""What comes in is counted by adapter, in numbers alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.telemetry.data_quality import LANGUAGES, DataQuality, question
from tests.support.app import CHAT

ANSWERED = Generation([1, 2, 3], [4, 5], "stop", "an answer")


def counted(quality: DataQuality) -> dict:
    return {
        (sample.name.removeprefix("loradock_").removesuffix("_total"), *sample.labels.values()): sample.value
        for family in quality.collect()
        for sample in family.samples
        if sample.value
    }


@pytest.fixture
def quality():
    return DataQuality(
        lambda text: {"h": "en", "g": "de"}.get(text[0], ""), lambda adapter: 8, lambda adapter: True, kinds=["email"]
    )


def asked(text, *, adapter="tone", generation=ANSWERED, **more):
    fields = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]}
    made = () if generation is None else (generation,)
    return Exchange(adapter, "v1", 200, 0.1, 0.2, generations=made, question=fields, **more)


def test_languages_personal_data_and_empty_prompts_are_counted(quality):
    for text in ("hello", "hello, I am a@b.de", "guten Tag", "???", "", "  "):
        quality.observe(asked(text))
    assert counted(quality) == {
        ("input_requests", "tone"): 6,
        ("input_problems", "tone", "empty"): 2,
        ("input_language", "tone", "en"): 2,
        ("input_language", "tone", "de"): 1,
        ("input_language", "tone", "unknown"): 1,
        ("input_personal_data", "tone", "email"): 1,
    }


def test_refusals_and_a_full_context_are_counted(quality):
    quality.observe(asked("hello", generation=Generation([1, 2, 3], [4, 5], "stop", "I'm sorry, but I cannot")))
    quality.observe(asked("hello", generation=Generation([1] * 4, [4] * 4, "length", "so")))
    quality.observe(asked("hello", generation=Generation([1] * 3, [4] * 4, "length", "so")))
    quality.observe(asked("hello", generation=None, over_context=True))
    quality.observe(asked("hello", generation=None))
    numbers = counted(quality)
    assert numbers["answers_refused", "tone"] == 1 and numbers["input_requests", "tone"] == 4
    assert numbers["input_problems", "tone", "context_full"] == numbers["input_problems", "tone", "over_context"] == 1


def test_counters_are_there_at_zero_from_the_first_request(quality):
    quality.observe(asked("hello"))
    zero = {tuple(s.labels.values()) for family in quality.collect() for s in family.samples if not s.value}
    assert {("tone", "empty"), ("tone", "over_context"), ("tone", "context_full"), ("tone", "email"), ("tone",)} == zero


def test_adapters_and_languages_are_bounded_and_what_is_gone_gives_its_place():
    known = {f"adapter-{number}" for number in range(50)}
    quality = DataQuality(lambda text: text, lambda adapter: 0, known.__contains__, limit=20)
    for number in range(50):
        quality.observe(asked(f"language-{number}", adapter=f"adapter-{number}"))
        quality.observe(asked(f"language-{number}", adapter="adapter-0"))
    numbers = counted(quality)
    assert numbers["input_requests", "other"] == 30
    assert len([key for key in numbers if key[:2] == ("input_language", "adapter-0")]) == LANGUAGES + 1
    known.clear()
    quality.save()
    assert {key[1] for key in counted(quality)} == {"other"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "hello"}, "hello"),
        ({"prompt": ["hello", "there"]}, "hello\nthere"),
        ({"prompt": [1, 2, 3]}, None),
        ({"prompt": []}, ""),
        ({"input": "hello"}, "hello"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]}, "hello"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}, "hello"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, None),
        ({"messages": "odd"}, "odd"),
        ({"messages": [3]}, None),
        ({}, None),
    ],
)
def test_the_users_last_message_is_what_is_looked_at(fields, text):
    assert question(fields) == text


async def test_over_a_server_nothing_of_the_text_is_kept(connect, config):
    async with connect(replace(config, personal_data=("email",))) as client:
        messages = [{"role": "user", "content": "what is the weather in the town of anna@example.org"}]
        assert (await client.post(CHAT, json={"model": "base", "messages": messages})).status_code == 200
        await asyncio.to_thread(client._transport.app.state.parts.quality_worker.settle)
        text = (await client.get("/metrics")).text
        assert 'loradock_input_personal_data_total{adapter="base",kind="email"} 1.0' in text
        assert 'loradock_input_language_total{adapter="base",language="en"} 1.0' in text
        assert "anna" not in text


async def test_switched_off_nothing_is_looked_at(connect, config):
    async with connect(replace(config, data_quality=False)) as client:
        assert (await client.post(CHAT, json={"model": "base", "messages": []})).status_code == 200
        assert not client._transport.app.state.parts.quality_worker.running
        assert "loradock_input_requests_total{" not in (await client.get("/metrics")).text
