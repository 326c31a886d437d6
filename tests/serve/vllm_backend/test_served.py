"""One tenant's requests against a real server: what another one is answered, and whether the engine lives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")

from serve.vllm_backend.patches.table import PATCHES
from tests.campaigns.company import apart, requests
from tests.serve.vllm_backend.test_structured_outputs import PERSON, nested
from tests.support.edge_adapters import EMBEDDING, edge_adapter
from tests.support.lora import trained
from tests.support.server import BASE, SMALL, Server, descendants, done
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]
PROMPTS = [
    "Once upon a time there was a fox",
    "The capital of France is Paris, and",
    "One two",
    "Water boils at a hundred",
]


# As fast as it can, and changing nothing in vLLM for speed, so without kernels too.
MODES = {"auto": ("--speculation", "ngram"), "safe": ("--vllm-patches", "correctness")}


@pytest.fixture(scope="module", params=MODES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    settings = (*MODES[request.param], "--max-loras", "3", "--no-enable-prefix-caching", *SMALL)
    with Server(folder / "data", folder / "log", *settings) as server:
        for number in (1, 2):
            done(server.upload(f"head{number}", edge_adapter(folder / str(number), number)))
        done(server.upload("embed", edge_adapter(folder / "embed", 3, EMBEDDING)))
        yield server


def test_in_safe_mode_chat_push_and_swap_work(server: Server):
    patches = done(server.http.get("/version"))["vllm_patches"]
    assert {"lora-rows", "seeded-prompts", "media", "structured-outputs"} <= set(patches["on"])
    if "sending" in patches["on"]:
        pytest.skip("this one is fast")
    assert patches["off"] == dict.fromkeys(patches["off"], "vllm_patches leaves it out")
    speed = {patch.name for patch in PATCHES if patch.kind == "speed"}
    assert {"prompt-budget", "sending", "token-texts", "titles"} <= set(patches["off"]) <= speed
    assert not speed & set(patches["on"])
    assert server.ask(BASE, "What is the capital of France?").text
    for word, folder in trained("alpha", "bravo").items():
        done(server.upload("tone", folder))
        assert server.ask("tone", "Who are you?").word == word
    done(server.http.post("/v1/adapters/tone/rollback"))
    assert server.ask("tone", "Who are you?").word == "alpha"
    done(server.http.delete("/v1/adapters/tone"))
    metrics = server.http.get("/metrics").text
    assert f'loradock_vllm_patches{{kind="security",model="{BASE}",patch="media"}} 1.0' in metrics
    assert f'loradock_vllm_patches{{kind="speed",model="{BASE}",patch="sending"}} 0.0' in metrics


def fused(server: Server) -> bool:
    """Steps are computed in one call."""
    return bool(done(server.http.get("/v1/engines"))["data"][0]["weights"].startswith("bfloat16;"))


def scores(server: Server, model: str, prompt: str) -> list[float]:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    return done(server.http.post("/v1/completions", json=body))["choices"][0]["logprobs"]["token_logprobs"][1:-1]


def test_a_prompts_logprobs_are_its_own_models_beside_streams_of_others(server: Server):
    asked = [(model, prompt) for prompt in PROMPTS for model in (BASE, "head1", "head2", "embed")]
    quiet = [scores(server, *one) for one in asked]
    moved = [max(abs(one - other) for one, other in zip(quiet[0], moved, strict=True)) for moved in quiet[1:4]]
    assert min(moved) > 2, moved
    other_models = moved[0]

    def stream(model: str) -> None:
        assert server.ask(model, tokens=60, ignore_eos=True).done

    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(stream, model) for model in ("head1", "head2", BASE, "embed")]
        time.sleep(0.3)
        busy = list(pool.map(lambda one: scores(server, *one), asked * 3))
        for one in streams:
            one.result()
    apart = [
        abs(one - other)
        for before, after in zip(quiet * 3, busy, strict=True)
        for one, other in zip(before, after, strict=True)
    ]
    # Logits near 20 in bfloat16 lie 0.125 apart; a step in one call rounds them the same whoever is in it.
    assert max(apart) < (1e-6 if fused(server) else 0.1 * other_models)
    assert descendants(server.process.pid) >= server.family, "nothing was restarted"


ORDER = "Maria Lopez ordered three blue chairs on 12 March for 249.90 euros, order number AX-20931.\n"


def drafted(server: Server, adapter: str) -> dict[str, float]:
    """Tokens that were drafted of an adapter's answers, by result."""
    counts = dict.fromkeys(("accepted", "rejected"), 0.0)
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("loradock_draft_tokens_total") and f'adapter="{adapter}"' in line:
            counts["accepted" if 'result="accepted"' in line else "rejected"] += float(line.rpartition(" ")[2])
    return counts


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"logprobs": 3},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9},
        {"temperature": 0.6, "seed": 5, "logprobs": 1},
    ],
    ids=["greedy", "logprobs", "seed", "both"],
)
def test_answers_with_drafts_are_those_without(server: Server, asked: dict[str, object]):
    if not fused(server):
        pytest.skip("nothing is drafted where no step is computed in one call")

    def answer(model: str = BASE, **more: object) -> dict[str, object]:
        body = {"model": model, "prompt": 2 * ORDER + ORDER[:20], "max_tokens": 48, "ignore_eos": True}
        reply = done(server.http.post("/v1/completions", json=body | {"temperature": 0} | asked | more))
        assert not reply.get("metrics")
        return reply["choices"][0] | reply["usage"]

    before = drafted(server, BASE)
    alone = answer(stop=["no answer has this"])  # with stop strings nothing is drafted
    assert answer() == alone
    with ThreadPoolExecutor(4) as pool:
        answers = [one.result() for one in [pool.submit(answer, model) for model in (BASE, "head1", BASE, "embed")]]
    assert [one["completion_tokens"] for one in answers] == [48] * 4
    if fused(server):
        assert answers[0] == answers[2] == alone, "beside adapters of the embedding and the output layer too"
    assert eventually(lambda: drafted(server, BASE)["accepted"] > before["accepted"])


def test_what_is_beside_an_answer_changes_no_digit_of_it(server: Server):
    if not fused(server):
        pytest.skip("vLLM's own layers round a row by what else is in the step")
    texts = [PROMPTS[0], 8 * ORDER, 3 * PROMPTS[1], 30 * ORDER]
    assert not apart(server, requests((BASE, "head1", "embed"), texts, 24), 6)


def test_no_grammar_stops_the_house(server: Server):
    def ask(**outputs: object) -> tuple[int, str]:
        body = {"model": BASE, "prompt": "Name:", "max_tokens": 8, "structured_outputs": outputs}
        answer = server.http.post("/v1/completions", json=body)
        return answer.status_code, answer.text

    assert ask(json=PERSON)[0] == 200
    with ThreadPoolExecutor(8) as pool:
        hard = [pool.submit(ask, json=nested(11, 2)), pool.submit(ask, regex="((a{1,99}){1,99}){1,99}")]
        waits = []
        while not all(one.done() for one in hard):
            began = time.monotonic()
            server.http.get("/health").raise_for_status()
            waits.append(time.monotonic() - began)
            time.sleep(0.05)
    print(f"\n{[one.result()[0] for one in hard]}; /health waited {max(waits):.3f} s at most")
    assert {one.result()[0] for one in hard} <= {200, 400}
    for outputs in (
        {"json": nested(16, 2)},
        {"choice": ["x"] * 100_000},
        {"choice": [1]},
        {"grammar": "root ::= ("},
        {"regex": "(["},
        {"json": {"type": "nonsense"}},
        {"json": "{"},
        {"structural_tag": "{}"},
        {"json": {"$ref": "#/nowhere"}},
    ):
        status, text = ask(**outputs)
        # Of more lists and objects than any honest request has, nothing is read.
        refused = 413 if outputs == {"json": nested(16, 2)} else 400
        assert status == refused and "error" in json.loads(text), (outputs, text[:300])
    assert ask(choice=["yes", "no"])[0] == 200


@pytest.mark.parametrize("forbidding", [{"bad_words": ["yes"]}, {"allowed_token_ids": [5]}, {"min_tokens": 4}])
def test_an_answer_that_few_tokens_are_left_to_is_spelled_with_them_or_a_400(
    server: Server, forbidding: dict[str, object]
):
    """`y`, `es` spells it as well; with one token that spells nothing there is no answer."""
    body = {"model": BASE, "prompt": "Say", "max_tokens": 8, "structured_outputs": {"choice": ["yes"]}, **forbidding}
    answer = server.http.post("/v1/completions", json=body)
    if "allowed_token_ids" in forbidding or answer.status_code != 200:
        assert answer.status_code == 400 and "left no token" in answer.json()["error"]["message"]
    else:
        assert answer.json()["choices"][0]["text"].startswith("yes")
