"""A body is one struct: what is wrong with it is a 400 that names the field, and the OpenAPI document describes it."""

from __future__ import annotations

import pytest

from serve.api.json_body import decoded
from serve.api.schemas import BaselinePrompts, Fetch, NewKey, Promote
from serve.errors import BadRequest


@pytest.mark.parametrize(
    ("data", "kind", "field", "message"),
    [
        (b"{}", Promote, "version", "Field required"),
        (b'{"version": 1, "versoin": 1}', Promote, "versoin", "Extra inputs are not permitted"),
        (b'{"version": 0}', Promote, "version", "Expected `int` >= 1"),
        (b'{"version": "x"}', Promote, "version", "Expected `int`, got `str`"),
        (b'{"version": 1e999}', Promote, "version", "Number out of range"),
        (b"[]", Promote, "the body", "Expected `object`, got `array`"),
        (b"", Promote, "the body", "Field required"),
        (b"{", Promote, "the body", "it is not JSON (Input data was truncated)"),
        (b'{"name": "\xff"}', Fetch, "the body", "it is not JSON"),
        (b'{"name": "a", "source": "b", "visibility": "all"}', Fetch, "visibility", "Invalid enum value 'all'"),
        (b'{"prompts": ["a"]}', BaselinePrompts, "prompts", "Expected `array` of length >= 20"),
        (b'{"prompts": [[1]]}', BaselinePrompts, "prompts.0.0", "Expected `object`, got `int`"),
        (b'{"name": "a", "limits": {"rpm": 1}}', NewKey, "limits.rpm", "Extra inputs are not permitted"),
    ],
)
def test_a_body_that_does_not_fit_names_its_field(data, kind, field, message):
    with pytest.raises(BadRequest) as refused:
        decoded(data, kind)
    assert refused.value.param == field
    assert refused.value.message.startswith(f"{field}: {message}")


def test_a_number_may_come_as_text_where_nothing_says_otherwise():
    assert decoded(b'{"version": "2"}', Promote).version == decoded(b'{"version": 2.0}', Promote).version == 2
    with pytest.raises(BadRequest):
        decoded(b'{"name": "a", "limits": {"concurrent": "2"}}', NewKey, strict=True)


async def test_a_body_of_another_media_type_is_not_read(client):
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        response = await client.post("/v1/adapters/tone/promote", content=b'{"version": 1}', headers=headers)
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]
    json = {"content-type": "application/vnd.api+json; charset=utf-8"}
    assert (await client.post("/v1/adapters/tone/promote", content=b'{"version": 1}', headers=json)).status_code == 404


async def test_the_openapi_document_describes_every_body(client):
    document = (await client.get("/openapi.json")).json()
    bodies = {
        f"{method} {path}": operation["requestBody"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
        and operation["tags"] != ["inference"]  # see test_openapi.py
    }
    schemas = {
        key: body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2] for key, body in bodies.items()
    }
    assert schemas == {
        "post /v1/adapters": "Fetch",
        "put /v1/adapters/{name}/aliases/{alias}": "Alias",
        "put /v1/adapters/{name}/versions/{number}/tags": "Tags",
        "post /v1/adapters/{name}/versions/{number}/validate": "Validate",
        "post /v1/engines/{engine}/swap": "Swap",
        "post /v1/batches": "NewBatch",
        "post /v1/moderations": "Moderations",
        "post /v1/alerts": "Notification",
        "post /v1/adapters/{name}/drift/acknowledge": "Acknowledged",
        "post /v1/adapters/{name}/drift/accept": "Accepted",
        "post /v1/adapters/{name}/baseline": "BaselinePrompts",
        "put /v1/adapters/{name}/golden": "GoldenSet",
        "post /v1/adapters/{name}/golden/run": "GoldenRun",
        "post /v1/feedback": "Rating",
        "post /v1/adapters/{name}/promote": "Promote",
        "post /v1/adapters/{name}/rollback": "Rollback",
        "post /v1/adapters/{name}/rename": "Rename",
        "post /v1/adapters/{name}/canary": "Weight",
        "post /v1/adapters/{name}/shadow": "Weight",
        "post /v1/adapters/{name}/visibility": "Visibility",
        "post /v1/adapters/{name}/pin": "Pin",
        "post /v1/fine_tuning/jobs": "NewFineTuningJob",
        "post /v1/fine_tuning/work": "WorkAsked",
        "post /v1/fine_tuning/work/{id}/renew": "AtWork",
        "post /v1/fine_tuning/work/{id}/launch": "AtWork",
        "post /v1/fine_tuning/work/{id}/progress": "WorkProgress",
        "post /v1/fine_tuning/work/{id}/note": "WorkNote",
        "post /v1/fine_tuning/work/{id}/fail": "WorkFailed",
        "post /v1/fine_tuning/work/{id}/release": "AtWork",
        "post /v1/fine_tuning/work/{id}/done": "AtWork",
        "post /v1/adapters/{name}/data": "DataBuild",
        "post /v1/adapters/{name}/versions/{number}/replay": "Replay",
        "post /v1/adapters/{name}/loop/reject": "LoopAnswer",
        "post /v1/adapters/{name}/mix": "Mix",
        "post /v1/load_lora_adapter": "LoadLora",
        "post /v1/unload_lora_adapter": "UnloadLora",
        "post /v1/keys": "NewKey",
    }
    assert {key for key, body in bodies.items() if not body["required"]} == {
        "post /v1/adapters/{name}/rollback",
        "post /v1/adapters/{name}/pin",
        "post /v1/adapters/{name}/golden/run",
        "post /v1/adapters/{name}/data",
        "post /v1/adapters/{name}/versions/{number}/replay",
        "post /v1/adapters/{name}/versions/{number}/validate",
        "post /v1/adapters/{name}/loop/reject",
    }
    components = document["components"]["schemas"]
    assert components["Promote"]["required"] == ["version"]
    assert components["NewKey"]["properties"]["limits"]["$ref"] == "#/components/schemas/LimitsOfKey"
    assert set(components) >= {*schemas.values(), "Alert", "LimitsOfKey"}
