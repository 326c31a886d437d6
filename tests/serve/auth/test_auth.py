from __future__ import annotations

import pytest

from serve.auth.auth import ANYBODY, Auth, Scope
from serve.config import keys_hashed
from serve.errors import Forbidden, Unauthorized

AUTH = Auth(keys_hashed(["ask"]), keys_hashed(["run"]))


def test_without_keys_everybody_may_do_everything():
    assert Auth().caller({}, Scope.ADMIN) is ANYBODY


def test_an_admin_key_may_ask_too():
    assert AUTH.caller({"authorization": "Bearer run"}, Scope.INFERENCE).scopes == frozenset(Scope)


def test_an_inference_key_may_not_administer():
    with pytest.raises(Forbidden):
        AUTH.caller({"authorization": "bearer ask"}, Scope.ADMIN)


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", "Basic ask", "Bearer " + keys_hashed(["ask"])[0]])
def test_anything_else_is_nobody(value):
    with pytest.raises(Unauthorized):
        AUTH.caller({"authorization": value}, Scope.INFERENCE)


def test_a_key_may_come_as_x_api_key():
    assert AUTH.caller({"x-api-key": "ask"}, Scope.INFERENCE).name.startswith("key-")


def test_a_callers_name_does_not_hold_its_key():
    assert "run" not in AUTH.caller({"authorization": "Bearer run"}, Scope.ADMIN).name


def test_who_acts_for_a_tenant_by_itself_has_no_key_that_anybody_could_send():
    standing = AUTH.standing("acme")
    assert AUTH.holder(standing.key) == standing and not standing.operator and standing.tenant == "acme"
    for sent in (standing.key, standing.name, "loop:default"):
        with pytest.raises(Unauthorized):
            AUTH.caller({"authorization": f"Bearer {sent}"}, Scope.INFERENCE)
    assert Auth().holder("loop:default").scopes == {Scope.INFERENCE, Scope.ADAPTERS}
