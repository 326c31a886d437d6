"""Tokens of an identity provider are taken beside keys; those that are forged, stale or for others are not."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import replace

import httpx
import jwt
import pytest

from serve.adapters.registry.registry import Registry
from serve.auth import jwks
from serve.auth.auth import Auth, Scope
from serve.auth.jwks import KeySet
from serve.auth.oidc import MAX_BYTES, Tokens
from serve.auth.provider import Provider
from serve.auth.subjects import HELD_SECONDS, Subjects
from serve.config import keys_hashed, load
from serve.errors import ConfigError, EngineUnavailable, Unauthorized
from tests.support import identity
from tests.support.app import CHAT, ask, upload
from tests.support.identity import AUDIENCE
from tests.support.waiting import settled


@pytest.fixture
def provider():
    with identity.running() as provider:
        yield provider


@pytest.fixture
def registry():
    with Registry("sqlite://") as registry:
        yield registry


class Clock:
    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.time() + self.ahead


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def auth_of(provider, registry, clock):
    """`await auth_of(token)`: the caller, as `Auth` knows it."""

    def made(**settings):
        found = Provider(provider.issuer, (AUDIENCE,), **settings)
        return Tokens(found, KeySet(found.issuer, clock=clock), Subjects(registry, clock=clock), clock=clock)

    tokens: dict[str, Tokens] = {}

    async def known(token, **settings):
        held = tokens.setdefault(repr(settings), made(**settings))
        headers = {"authorization": f"Bearer {token}"}
        await held.check(headers)
        return Auth(keys_hashed(["ours"]), tokens=held).known(headers)

    return known


@pytest.mark.parametrize(("kid", "algorithm"), [("rsa", "RS256"), ("ec", "ES256")])
async def test_a_token_says_tenant_and_scopes_and_its_subject_is_a_key(provider, auth_of, kid, algorithm):
    scope = "openid inference adapters:write"
    caller = await auth_of(provider.token(kid, algorithm, scope=scope, preferred_username="Anna"))
    assert (caller.tenant, caller.name) == ("acme", "Anna")
    assert caller.scopes == {Scope.INFERENCE, Scope.ADAPTERS}
    again = await auth_of(provider.token(kid, algorithm, scope="inference"))
    assert again.key == caller.key and again.key.startswith("oidc:") and len(again.key) <= 32
    assert (await auth_of(provider.token(sub="bob"))).key != caller.key
    assert (await auth_of("ours")).name.startswith("key-"), "keys are taken beside tokens"
    assert provider.asked == 2, "the keys were read once, from where the issuer says"


def flipped(token):
    head, claims, signature = token.split(".")
    return f"{head}.{claims}.{'A' if signature[9] != 'A' else 'B'}{signature[1:]}"


def unsigned(token):
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "rsa"}).encode()).rstrip(b"=").decode()
    return f"{head}.{token.split('.')[1]}."


def forged(provider):
    """HS256 with what everybody may read as the secret; PyJWT refuses to make such a token, so it is made by hand."""
    import hashlib
    import hmac

    head = json.dumps({"alg": "HS256", "kid": "rsa", "typ": "JWT"}).encode()
    claims = provider.token().split(".")[1].encode()
    text = base64.urlsafe_b64encode(head).rstrip(b"=") + b"." + claims
    signature = base64.urlsafe_b64encode(hmac.digest(provider.pem("rsa"), text, hashlib.sha256)).rstrip(b"=")
    return (text + b"." + signature).decode()


HOSTILE = {
    "none": (lambda p: unsigned(p.token()), "algorithm"),
    "the public key as a secret": (forged, "algorithm"),
    "another algorithm": (lambda p: p.token(algorithm="PS256"), "algorithm"),
    "the algorithm of another key": (lambda p: p.token("rsa", "ES256", key=p.keys["ec"][0]), "unknown"),
    "signature": (lambda p: flipped(p.token()), "signature"),
    "audience": (lambda p: p.token(aud="another"), "audience"),
    "no audience": (lambda p: p.token(aud=None), "claim is missing"),
    "issuer": (lambda p: p.token(iss="https://evil.example"), "issuer"),
    "expired": (lambda p: p.token(exp=time.time() - 60), "expired"),
    "no expiry": (lambda p: p.token(exp=None), "claim is missing"),
    "not yet": (lambda p: p.token(nbf=time.time() + 600), "not valid yet"),
    "odd expiry": (lambda p: p.token(exp="soon"), "order"),
    "huge expiry": (lambda p: p.token(exp=10**400), "order"),
    "huge": (lambda p: p.token(more="x" * MAX_BYTES), "too long"),
    "no subject": (lambda p: p.token(sub=None), "claim is missing"),
    "no tenant": (lambda p: p.token(tenant=None), "tenant"),
    "two tenants": (lambda p: p.token(tenant=["acme", "globex"]), "tenant"),
    "a path as tenant": (lambda p: p.token(tenant="../acme"), "scope of this server"),
    "no scope": (lambda p: p.token(scope="openid"), "scope of this server"),
    "an operator of another tenant": (lambda p: p.token(scope="inference admin"), "scope of this server"),
    "no key": (lambda p: jwt.encode({"sub": "a"}, p.keys["rsa"][0], algorithm="RS256"), "names no key"),
    "malformed": (lambda p: "eyJ.." , "malformed"),
    "deep": (lambda p: base64.urlsafe_b64encode(b'{"a":' + b"[" * 5000).decode().rstrip("=") + ".e30.", "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_token_that_is_not_in_order_is_refused_with_the_class_of_reason(provider, auth_of, kind):
    make, reason = HOSTILE[kind]
    with pytest.raises(Unauthorized, match=reason) as refused:
        await auth_of(make(provider))
    assert refused.value.code == "invalid_token"
    assert AUDIENCE not in refused.value.message and provider.issuer not in refused.value.message


async def test_a_short_rsa_key_and_one_to_encrypt_with_sign_nothing(provider, auth_of):
    provider.add("short", bits=1024)
    provider.add("encrypts", use="enc")
    for kid in ("short", "encrypts"):
        with pytest.raises(Unauthorized, match="unknown"):
            await auth_of(provider.token(kid))


async def test_a_new_key_is_found_and_a_flood_of_unknown_ones_reads_the_keys_once(provider, auth_of, clock):
    await auth_of(provider.token())
    asked = provider.asked
    for number in range(50):
        with pytest.raises(Unauthorized, match="unknown"):
            await auth_of(other(number))
    assert provider.asked == asked, "they were read a moment ago"
    clock.ahead += jwks.AGAIN_SECONDS + 1
    provider.add("new")
    assert (await auth_of(provider.token("new"))).tenant == "acme"


async def test_a_key_that_the_provider_withdrew_signs_nothing_more(provider, auth_of, clock):
    token = provider.token(exp=time.time() + 10_000)
    await auth_of(token)
    del provider.keys["rsa"]
    clock.ahead += jwks.FRESH_SECONDS + 1
    with pytest.raises(Unauthorized, match="unknown"):
        await auth_of(token)


def other(number):
    """A token whose key nobody has."""
    head = base64.urlsafe_b64encode(json.dumps({"alg": "RS256", "kid": f"k{number}"}).encode()).rstrip(b"=").decode()
    return f"{head}.e30.c2ln"


async def test_keys_hold_while_the_provider_is_away_and_not_for_ever(provider, auth_of, clock):
    await auth_of(provider.token())
    provider.down = True
    clock.ahead += jwks.FRESH_SECONDS + 1
    assert (await auth_of(provider.token(sub="bob", exp=clock() + 60))).tenant == "acme"
    clock.ahead += jwks.STALE_SECONDS
    with pytest.raises(EngineUnavailable, match="identity provider"):
        await auth_of(provider.token(sub="carl", exp=clock() + 60))


async def test_a_checked_token_is_believed_until_it_expires_and_no_longer(provider, auth_of, clock):
    token = provider.token(exp=time.time() + 60)
    await auth_of(token)
    clock.ahead += 40
    assert (await auth_of(token)).name == "anna"
    # PyJWT reads the machine's clock: here the memory alone is judged.
    stale = provider.token(exp=time.time() - 60)
    with pytest.raises(Unauthorized, match="expired"):
        await auth_of(stale)


async def test_claims_mean_what_the_settings_say(provider, auth_of):
    settings = {
        "tenant_claim": "org", "tenants": {"Acme Corp.": "acme", "Root": "default"},
        "scope_claim": "groups", "scopes": {"staff": ("inference", "adapters:write"), "root": ("admin",)},
    }  # fmt: skip
    caller = await auth_of(provider.token(org="Acme Corp.", groups=["staff", "chess"], tenant="default"), **settings)
    assert (caller.tenant, caller.scopes) == ("acme", {Scope.INFERENCE, Scope.ADAPTERS})
    assert (await auth_of(provider.token(org="Root", groups=["root"]), **settings)).operator
    for claims in ({"org": "acme", "groups": ["staff"]}, {"org": "Acme Corp.", "groups": ["admin"]}):
        with pytest.raises(Unauthorized):
            await auth_of(provider.token(**claims), **settings)


async def test_a_subjects_work_goes_on_for_a_day_also_on_another_server(provider, registry, clock, auth_of):
    caller = await auth_of(provider.token())
    another = Subjects(registry, clock=clock)
    assert another.get(caller.key) == caller
    clock.ahead += HELD_SECONDS + 1
    assert another.get(caller.key) is None and another.get("oidc:nobody") is None


@pytest.fixture
def with_tokens(config, provider):
    return replace(
        config,
        admin_keys=keys_hashed(["run"]),
        oidc_issuer=provider.issuer,
        oidc_audience=(AUDIENCE,),
        oidc_limits=("requests_per_minute=3",),
    )


def of(client, token):
    headers = {"authorization": f"Bearer {token}"}
    return httpx.AsyncClient(transport=client._transport, base_url="http://localhost", headers=headers)


async def test_a_subject_pushes_asks_and_has_meters_of_its_own(connect, with_tokens, provider, make_adapter):
    async with connect(with_tokens) as client:
        anna = of(client, provider.token(scope="inference adapters:write"))
        pushed = await anna.post("/v1/adapters", **upload(make_adapter()))
        assert (pushed.status_code, pushed.json()["tenant"]) == (201, "acme"), pushed.text
        assert [(await ask(anna, "tone")).status_code for _ in range(3)] == [200] * 3
        renewed = of(client, provider.token(scope="inference", exp=time.time() + 60))
        assert (await ask(renewed, "tone")).status_code == 429, "another token of the same subject"
        assert (await ask(of(client, provider.token(sub="bob")), "tone")).status_code == 200
        assert (await of(client, provider.token(sub="bob")).post("/v1/adapters/tone/rollback")).status_code == 403
        refused = await ask(of(client, provider.token(aud="another")), "tone")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_token")
        assert (await of(client, "run").get("/v1/keys")).status_code == 200, "keys are taken too"
        audit = (with_tokens.data_dir / "audit.jsonl").read_text()
        assert '"who": "anna", "tenant": "acme", "key": "oidc:' in audit and "eyJ" not in audit


async def test_a_batch_of_a_subject_is_answered_after_a_restart(connect, with_tokens, provider, sdk):
    with_tokens = replace(with_tokens, oidc_limits=())
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": {"model": "base", "messages": []},
    }
    async with connect(with_tokens) as client:
        ai = sdk(of(client, provider.token()))
        file = await ai.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        client._transport.app.state.parts.batches.schedule.round = lambda: asyncio.sleep(60)
        batch = await ai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    async with connect(with_tokens) as client:
        rows = client._transport.app.state.parts.batches.rows
        assert await settled(lambda: rows.get("acme", batch.id).status == "completed")
        assert rows.get("acme", batch.id).completed == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"oidc_issuer": "https://id.example"}, "needs oidc_audience"),
        ({"oidc_issuer": "http://id.example", "oidc_audience": "a"}, "takes https"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_algorithms": "HS256"}, "not 'HS256'"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_algorithms": "none"}, "not 'none'"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_scopes": "x=all"}, "not 'all'"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_tenants": "x"}, "VALUE=MEANING"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_limits": "requests=1"}, "oidc_limits"),
        ({"oidc_audience": "a"}, "set oidc_issuer"),
    ],
)
def test_an_issuer_that_cannot_be_is_said_before_anything_starts(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        load([], {f"LORADOCK_{name.upper()}": value for name, value in settings.items()})
