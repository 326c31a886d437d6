"""Requests that adapters learn from are kept with what people said of them, by conversation, until they are deleted."""

from __future__ import annotations

import sqlite3

import pytest

from serve.asgi.exchange import Exchange, Generation
from serve.dataset.asked_text import NoText, asked_text
from serve.dataset.conversations import HOUR, Conversations
from serve.errors import NotFound, OutOfSpace

NOW = 1_000_000 * HOUR


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def exchange(id: str, question, answer: str = "fine", count: int = 1, **more) -> Exchange:
    body = {"messages": question} if isinstance(question, list) else question
    made = tuple(Generation([1], [2], "stop", text=answer) for _ in range(count))
    known = {"tenant": "default", "asker": b"me", "began": 1.0} | more
    return Exchange("tone", "v1", 200, 0.1, 0.2, request_id=id, question=body, generations=made, **known)


@pytest.fixture
def now() -> list[float]:
    return [float(NOW)]


@pytest.fixture
def kept(tmp_path, now) -> Conversations:
    kept = Conversations(tmp_path / "conversations.db", redact=[r"secret \d+"], hours=2, clock=lambda: now[0])
    kept.start()
    return kept


def rows(kept: Conversations, tenant: str = "default", **span):
    return list(kept.rows(tenant, ["tone"], **span))


def test_a_request_is_kept_with_what_was_asked_and_answered(kept, tmp_path):
    kept.observe(exchange("a", [user("hello secret 12")], "good day secret 3"))
    kept.observe(exchange("b", {"prompt": "once upon"}))
    by_id = {row.id: row for row in rows(kept)}
    assert by_id["a"].asked == [user("hello [redacted]")] and by_id["a"].answer == "good day [redacted]"
    assert by_id["b"].asked == "once upon" and by_id["b"].rating is None
    assert (tmp_path / "conversations.db").stat().st_mode & 0o077 == 0
    assert rows(kept, "acme") == [] and list(kept.rows("default", ["other"])) == []


def test_ratings_and_corrections_are_joined_once(kept):
    kept.observe(exchange("a", [user("one")]))
    kept.observe(exchange("b", [user("two")]))
    assert kept.rate("default", "", "chatcmpl-a", 1.0, None) and kept.rate("default", "", "b", None, "secret 5 it was")
    assert not kept.rate("default", "", "a", 0.0, None) and not kept.rate("acme", "", "b", 0.0, None)
    assert not kept.rate("default", "", "nobody", 1.0, None)
    by_id = {row.id: row for row in rows(kept)}
    assert by_id["a"].rating == 1.0 and by_id["b"].correction == "[redacted] it was"


def test_a_clients_own_id_finds_its_request_and_replaces_nobodys(kept, now):
    kept.observe(exchange("1", [user("one")], client_id="order-7", key="shop"))
    now[0] += 1
    kept.observe(exchange("2", [user("poison")], client_id="order-7", key="stranger"))
    kept.observe(exchange("3", [user("poison")], client_id="1", key="stranger"))
    assert {row.id for row in rows(kept)} == {"1", "2", "3"}
    assert kept.rate("default", "shop", "order-7", 1.0, None)
    assert {row.id: row.rating for row in rows(kept)} == {"1": 1.0, "2": None, "3": None}
    assert not kept.rate("default", "third", "order-7", 1.0, None), "of two other keys it is none"
    assert not kept.rate("default", "third", "1", 0.0, None), "what the server calls a request goes first"
    now[0] += 1
    kept.observe(exchange("4", [user("again")], client_id="order-7", key="shop"))
    assert kept.rate("default", "shop", "order-7", 0.0, None)
    assert {row.id: row.rating for row in rows(kept)}["4"] == 0.0, "the latest of one's own"
    kept.observe(exchange("5", [user("alone")], client_id="order-8", key="shop"))
    assert kept.rate("default", "third", "order-8", 1.0, None)
    with pytest.raises(NotFound):
        kept.forget("default", "third", ["tone"], "order-7")
    assert [one.id for one in kept.forget("default", "stranger", ["tone"], "order-7")[1]] == ["2"]


def test_a_database_of_an_earlier_release_goes_on(kept, tmp_path, now):
    kept.observe(exchange("a", [user("one")]))
    kept.stop()
    with sqlite3.connect(tmp_path / "conversations.db") as database:
        database.execute("drop index by_client_id")
        for column in ("client_id", "key"):
            database.execute(f"alter table requests drop column {column}")
    again = Conversations(tmp_path / "conversations.db", hours=2, clock=lambda: now[0])
    again.start()
    again.observe(exchange("b", [user("two")], client_id="order", key="shop"))
    assert {row.id for row in rows(again)} == {"a", "b"} and again.rate("default", "shop", "order", 1.0, None)


def test_turns_of_a_conversation_belong_together(kept, now):
    first = [user("hi")]
    kept.observe(exchange("a1", first, "hello"))
    kept.observe(exchange("b1", first, "good day"))
    kept.observe(exchange("a2", [*first, assistant(" hello\n"), user("how are you?")], "well"))
    now[0] += 1
    kept.observe(exchange("b2", [*first, assistant("good day"), user("how are you?")], "so so"))
    kept.observe(exchange("a3", [*first, assistant("edited"), user("how are you?"), assistant("well"), user("?")]))
    kept.observe(exchange("c", [user("few"), assistant("shot"), user("hi")]))
    kept.observe(exchange("d", [user("few"), assistant("shot"), user("you")]))
    of = {row.id: row.conversation for row in rows(kept)}
    assert of["a1"] == of["a2"] and of["b1"] == of["b2"] == of["a3"]
    assert len(set(of.values())) == 4


def test_users_who_begin_alike_go_on_with_their_own_conversations(kept, now):
    for name in ("anna", "bert"):
        kept.observe(exchange(f"{name} 1", [user("hi")], "hello", asker=name.encode()))
        now[0] += 1
    kept.observe(exchange("anna 2", [user("hi"), assistant("hello"), user("I am ill")], asker=b"anna"))
    kept.observe(exchange("anna 3", [user("hi"), assistant("edited"), user("and")], asker=b"anna"))
    kept.observe(exchange("new", [user("hi"), assistant("hello"), user("so")], asker=b"few-shot now"))
    of = {row.id: row.conversation for row in rows(kept)}
    assert of["anna 1"] == of["anna 2"] == of["anna 3"] != of["bert 1"] == of["new"]


def test_a_column_of_a_later_release_keeps_none_from_being_written(kept):
    kept.observe(exchange("a", [user("hi")]))
    kept._writer.execute("alter table requests add column later text not null default ''")
    kept.observe(exchange("b", [user("hello")]))
    assert {row.id for row in rows(kept)} == {"a", "b"}


def test_a_conversation_of_another_tenant_is_another_one(kept):
    kept.observe(exchange("a", [user("hi")], "hello"))
    kept.observe(exchange("b", [user("hi"), assistant("hello"), user("and?")], tenant="acme"))
    assert rows(kept)[0].conversation != rows(kept, "acme")[0].conversation


def test_a_full_disk_refuses_a_deletion_and_lets_traffic_go_on(kept, tmp_path):
    kept.observe(exchange("a", [user("hi")]))
    kept.observe(exchange("b", [user("hello")]))
    pages = f"pragma max_page_count = {(tmp_path / 'conversations.db').stat().st_size // 4096}"
    kept._writer.execute(pages)
    kept.observe(exchange("long", [user("a long story " * 5000)]))
    with pytest.raises(OutOfSpace, match="make room"):
        kept.rate("default", "", "a", None, "a long correction " * 5000)
    assert {row.id for row in rows(kept)} == {"a", "b"}
    kept._writer.execute("pragma max_page_count = 100000")
    assert kept.rate("default", "", "a", None, "a correction")


def test_what_is_deleted_is_gone_from_the_disk(kept, tmp_path):
    kept.observe(exchange("a1", [user("unheard of words")], "strange words"))
    kept.observe(exchange("a2", [user("unheard of words"), assistant("strange words"), user("more")]))
    kept.observe(exchange("b", [user("another")]))
    with pytest.raises(NotFound):
        kept.forget("acme", "", ["tone"], "a1")
    with pytest.raises(NotFound):
        kept.forget("default", "", ["other"], "a1")
    conversation, gone = kept.forget("default", "", ["tone"], "chatcmpl-a2")
    assert [row.id for row in gone] == ["a1", "a2"] and [row.id for row in rows(kept)] == ["b"]
    with pytest.raises(NotFound, match="no conversation"):
        kept.forget("default", "", ["tone"], conversation)
    on_disk = b"".join(file.read_bytes() for file in tmp_path.glob("conversations.db*"))
    assert b"unheard" not in on_disk and b"strange" not in on_disk


def test_requests_are_forgotten_in_time(kept, now, tmp_path):
    kept.observe(exchange("a", [user("unheard of words")]))
    now[0] += 1.5 * HOUR
    kept.observe(exchange("b", [user("later")]))
    assert [row.id for row in rows(kept, since=NOW + HOUR)] == ["b"]
    assert [row.id for row in rows(kept, until=NOW + HOUR)] == ["a"]
    now[0] += HOUR
    kept.stop()
    off = Conversations(tmp_path / "conversations.db", enabled=False, hours=2, clock=lambda: now[0])
    off.start()
    off.observe(exchange("c", [user("not kept")]))
    assert [row.id for row in rows(off)] == ["b"]
    assert b"unheard" not in b"".join(file.read_bytes() for file in tmp_path.glob("conversations.db*"))


def test_what_cannot_be_learned_is_counted(kept):
    kept.observe(exchange("a", {"messages": [user("x")], "tools": [{}]}))
    kept.observe(exchange("b", [user("x")], count=2))
    kept.observe(exchange("c", {"input": ["x"]}, answer=""))
    kept.observe(exchange("d", [{"role": "user", "content": [{"type": "image_url"}]}]))
    kept.observe(exchange("e", [user("x")], tenant="acme", count=3))
    assert rows(kept) == []
    assert kept.left_out("default", ["tone"]) == {"not_text": 1, "several_answers": 1, "tools": 1}
    assert kept.left_out("default", ["tone"], until=NOW - HOUR) == {}


def test_a_tenants_hour_has_a_bound(tmp_path, now):
    kept = Conversations(tmp_path / "conversations.db", limit=300, clock=lambda: now[0])
    kept.start()
    for number in range(10):
        kept.observe(exchange(f"r{number}", [user("x" * 50)]))
    kept.observe(exchange("other", [user("x" * 50)], tenant="acme"))
    assert 0 < len(rows(kept)) < 10 and len(rows(kept, "acme")) == 1
    assert kept.left_out("default", ["tone"]) == {"hour_full": 10 - len(rows(kept))}
    now[0] += HOUR
    kept.observe(exchange("later", [user("x" * 50)]))
    assert rows(kept)[0].id == "later"


def test_a_list_says_what_was_kept_without_its_text(kept, now):
    kept.observe(exchange("a1", [user("hi")], "hello"))
    now[0] += 60
    kept.observe(exchange("a2", [user("hi"), assistant("hello"), user("more")]))
    kept.rate("default", "", "a2", 1.0, None)
    (row,) = kept.listed("default", ["tone"])
    assert row["requests"] == 2 and row["request_ids"] == ["a1", "a2"] and row["rated"] == 1
    assert (row["began"], row["last"]) == (NOW, NOW + 60)


def test_nothing_is_there_where_nothing_was_ever_kept(tmp_path):
    none = Conversations(tmp_path / "conversations.db", enabled=False)
    none.start()
    assert rows(none) == [] and none.listed("default", ["tone"]) == [] and not none.rate("default", "", "a", 1.0, None)
    with pytest.raises(NotFound):
        none.forget("default", "", ["tone"], "a")
    none.stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ({"prompt": ["one"]}, "one"),
        ({"prompt": ["one", "two"]}, NoText.NOT_TEXT),
        ({"prompt": [1, 2]}, NoText.NOT_TEXT),
        ({"input": "hi", "instructions": "be kind"}, [{"role": "system", "content": "be kind"}, user("hi")]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}, [user("hi")]),
        ({"system": [{"type": "text", "text": "be"}], "messages": [user("hi")]},
         [{"role": "system", "content": "be"}, user("hi")]),
        ({"input": "hi", "previous_response_id": "resp_1"}, NoText.ELSEWHERE),
        ({"messages": [user("hi"), assistant("I say")]}, NoText.PREFILLED),
        ({"messages": [user("hi"), {"role": "tool", "content": "3"}]}, NoText.TOOLS),
        ({"messages": []}, NoText.NOT_TEXT),
        ({"messages": [3]}, NoText.NOT_TEXT),
        (None, NoText.LONG),
    ],
)  # fmt: skip
def test_every_api_is_read_as_text(question, asked):
    assert asked_text(question) == asked
