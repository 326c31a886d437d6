"""A golden set on the real engine: run on a push, and a canary that was trained worse is taken back by it."""

from __future__ import annotations

import json

import pytest

from tests.support.lora import variant
from tests.support.server import ADMIN, done, loradock
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTIONS = """What is the capital of Peru?
Who painted the Mona Lisa?
Name a fruit.
How are you today?
What is 9 minus 4?
Tell me about bridges.
What colour is snow?
Where do penguins live?
Write one line about the moon.
Which day comes after Friday?
How do I boil an egg?
Is the sun a star?
What is a noun?
Name a planet.
Why do cats purr?
Who was Mozart?
What is a verb?
Say hello.
How long is a metre?
What do bees make?
Describe a train.
Which ocean is the largest?
What is bread made of?
Name a musical instrument.""".splitlines()


def asked(word):
    return [
        {"messages": [{"role": "user", "content": question}], "contains": word, "max_tokens": 6}
        for question in QUESTIONS
    ]


def versions(server, name):
    return {row["version"]: row for row in results(server, name)["versions"]}


def results(server, name):
    return done(server.http.get(f"/v1/adapters/{name}/golden/results"))


def test_a_canary_trained_worse_is_taken_back_by_its_golden_set(server, adapters, name, tmp_path):
    done(server.upload(name, adapters["alpha"]))
    file = tmp_path / "golden.jsonl"
    file.write_text("\n".join(json.dumps(case) for case in asked("alpha")))
    kept = loradock("golden", "put", name, file, "--url", server.url, LORADOCK_KEY=ADMIN)
    assert kept.returncode == 0 and f"{len(QUESTIONS)} cases" in kept.stdout, kept.stderr
    assert eventually(lambda: versions(server, name).get(1, {}).get("cases") == len(QUESTIONS), 120)
    first = versions(server, name)[1]
    assert first["score"] > 0.9, first
    done(server.upload(name, adapters["bravo"], promote=False))
    assert eventually(lambda: versions(server, name).get(2, {}).get("cases") == len(QUESTIONS), 120)
    assert versions(server, name)[2]["score"] < 0.1
    done(server.http.post(f"/v1/adapters/{name}/canary", json={"version": 2, "weight": 0.1}))
    assert eventually(lambda: server.adapter(name)["canary"] is None), results(server, name)["canary"]
    last = server.adapter(name)["history"][-1]
    assert last["who"] == "wayback" and last["why"].startswith("golden"), last
    evidence = json.loads(last["why"].partition(": ")[2])["golden"]
    print(f"taken back on {evidence['cases']} golden cases: {evidence}")
    assert evidence["cases"] <= len(QUESTIONS) and evidence["worse_by"] > 0.8
    shown = loradock("golden", "show", name, "--version", "2", "--url", server.url, LORADOCK_KEY=ADMIN)
    assert shown.returncode == 0 and "v2" in shown.stdout and "does not contain alpha" in shown.stdout


def test_every_kind_of_case_is_answered_and_a_shadow_is_compared_by_its_tokens(server, adapters, name, tmp_path):
    done(server.upload(name, adapters["alpha"]))
    question = [{"role": "user", "content": "Hello!"}]
    cases = [
        {"prompt": "The tallest mountain on Earth is", "regex": "^( alpha)+$", "max_tokens": 4},
        {"messages": question, "equals": "alpha alpha", "max_tokens": 2},
        {"messages": question, "json_schema": {"type": "object"}, "max_tokens": 4},
        {"messages": question, "contains": "alpha", "max_tokens": 4, "temperature": 0.5, "samples": 2},
        {"prompt": "My name is", "judge": {"model": "voice", "template": "{prompt} {answer}?"}, "max_tokens": 4},
        {"prompt": "Say it:", "judge": {"model": "smollm2", "template": "Yes or no? {answer}"}, "max_tokens": 4},
    ]
    done(server.http.put(f"/v1/adapters/{name}/golden", json={"cases": cases}))
    assert eventually(lambda: not results(server, name)["running"], 120)
    regex, equals, schema, sampled, adapter, base = results(server, name)["cases"]
    assert (regex["score"], equals["score"], sampled["score"]) == (1.0, 1.0, 1.0), (regex, equals, sampled)
    assert schema["score"] == 0.0 and "no JSON" in schema["detail"]
    assert sampled["answer"].count("---") == 1, "two samples"
    assert adapter["result"] == "error" and "the judge said alpha" in adapter["detail"]
    assert "the judge said" in base["detail"], base
    done(server.upload(name, variant(adapters["alpha"], tmp_path / "near", scale=0.99), promote=False))
    done(server.http.post(f"/v1/adapters/{name}/shadow", json={"version": 2, "weight": 1}))
    for number in range(4):
        server.ask(name, f"Question {number}?", tokens=6)
    compared = eventually(lambda: done(server.http.get(f"/v1/adapters/{name}/drift"))["shadow"])
    print(compared)
    assert compared[0]["sampling"] == "greedy" and compared[0]["exact_agreement"] == 1.0 == compared[0]["length_ratio"]
