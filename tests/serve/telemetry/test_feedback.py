"""Ratings of answers, by the id of the request."""

from __future__ import annotations

from dataclasses import replace

from tests.support.app import upload
from tests.support.watched_traffic import CHAT, push


async def test_a_rating_is_joined_to_an_answer_by_its_id_once(client, backend, make_adapter):
    await push(client, make_adapter, 0)
    backend.generation = replace(backend.generation, text="Paris.")
    ids = [(await client.post(CHAT, json={"model": "tone"})).headers["x-request-id"] for _ in range(3)]
    said = [
        {"request_id": ids[0], "rating": 1},
        {"request_id": f"chatcmpl-{ids[1]}", "answer": " paris "},
        {"request_id": ids[2], "answer": "London"},
    ]
    ratings = [(await client.post("/v1/feedback", json=body)).json()["rating"] for body in said]
    assert ratings == [1, 1, 0]
    assert (await client.post("/v1/feedback", json=said[0])).status_code == 404
    for bad in ({"rating": 1}, {"request_id": ids[0]}, {"request_id": ids[0], "rating": 2}):
        assert (await client.post("/v1/feedback", json=bad)).status_code == 400
    text = (await client.get("/metrics")).text
    assert 'loradock_feedback_total{adapter="tone",rating="good",version="v1"} 2.0' in text
    assert 'loradock_feedback_total{adapter="tone",rating="bad",version="v1"} 1.0' in text


async def test_another_tenant_cannot_rate_nor_see(operator, issue, make_adapter):
    acme, globex = await issue("acme"), await issue("globex")
    await acme.post("/v1/adapters", **upload(make_adapter()))
    id = (await acme.post(CHAT, json={"model": "tone"})).headers["x-request-id"]
    assert (await globex.post("/v1/feedback", json={"request_id": id, "rating": 0})).status_code == 404
    assert (await globex.get("/v1/adapters/tone/drift")).status_code == 404
    assert (await globex.get("/v1/adapters/base/drift")).status_code == 404
    assert (await acme.post("/v1/feedback", json={"request_id": id, "rating": 0})).status_code == 200
