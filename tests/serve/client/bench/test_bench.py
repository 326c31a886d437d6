"""The load harness against a small server that speaks OpenAI's stream over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from serve.cli.bench import bench_app
from serve.client.bench import report
from serve.client.bench.load import Answer, Level, Mix, Server, Settings, Stream, press
from serve.client.bench.prompts import WORDS, Prompts, Scale
from serve.client.bench.rounds import CannotBench, Result, Round, bench, find
from serve.client.bench.watch import Process, Snapshot, Use, Watch, is_local, listeners, snapshot
from serve.client.bench.wire import Address, Connection, WireError
from tests.support.listening import listening_beside

TOKENS = 6


@dataclass
class Peer:
    """A server that answers `TOKENS` tokens, two of them in one chunk; tests tell it how to misbehave."""

    seconds_per_token: float = 0.002
    fails: Callable[[int], str | None] = lambda count: None
    says_usage: bool = True
    owner: str = "peer"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/v1/completions", self.answer, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        names = ("base", "one", "two", "three")
        return JSONResponse({"object": "list", "data": [{"id": name, "owned_by": self.owner} for name in names]})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        trouble = self.fails(len(self.bodies))
        if trouble == "503":
            return JSONResponse({"error": {"message": "the engine is resting"}}, status_code=503)
        return StreamingResponse(self.stream(body, trouble), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], trouble: str | None) -> AsyncIterator[str]:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]

        def event(text: str, finish: str | None = None) -> str:
            said = {"delta": {"content": text}} if chat else {"text": text}
            return f"data: {json.dumps({'choices': [{'index': 0, **said, 'finish_reason': finish}]})}\n\n"

        if chat:
            yield event("")
        for text in ("a", "b c", "d", "e", "f"):
            await asyncio.sleep(self.seconds_per_token)
            yield event(text)
            if trouble == "error":
                yield 'data: {"error": {"message": "the engine stopped", "code": 500}}\n\n'
                return
            if trouble == "cut":
                raise ConnectionResetError
        yield event("", "stop")
        if self.says_usage and body.get("stream_options", {}).get("include_usage"):
            counted = {"prompt_tokens": 10 + 2 * len(prompt.split()), "completion_tokens": TOKENS}
            yield f"data: {json.dumps({'choices': [], 'usage': counted})}\n\n"
        yield "data: [DONE]\n\n"


@contextmanager
def running(peer: Peer) -> Iterator[Peer]:
    with listening_beside(peer.app(), log_level="critical", lifespan="off") as peer.url:
        yield peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running(Peer()) as peer:
        yield peer


class Silent:
    """An observer that only remembers."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.rounds: list[Round] = []

    def begins(self, what: str, requests: int | None) -> None: ...

    def answered(self, answer: Answer) -> None: ...

    def ended(self, round_: Round) -> None:
        self.rounds.append(round_)

    def says(self, sentence: str) -> None:
        self.sentences.append(sentence)


SETTINGS = Settings(requests=8, rounds=1, warmup=0, prompt_tokens=40, max_tokens=TOKENS, disturbed_above=99.0)


def server_at(peer: Peer, *names: str, label: str = "A") -> Server:
    return Server(label, Address(peer.url), names or ("base",))


def run(peers: list[Peer], settings: Settings = SETTINGS, level: Level | None = None, **more: Any) -> Result:
    servers = [server_at(peer, label="AB"[place]) for place, peer in enumerate(peers)]
    return asyncio.run(bench(servers, [level or Level(streams=4)], settings, more.pop("observer", Silent()), **more))


# -- what is counted


def test_tokens_are_counted_by_usage_and_not_by_chunks(peer: Peer) -> None:
    result = run([peer])
    answers = result.rounds[0].answers
    assert [answer.output_tokens for answer in answers] == [TOKENS] * 8
    assert {answer.counted_by for answer in answers} == {"usage"}
    assert all(len(answer.gaps_ms) <= 4 for answer in answers)


def test_a_server_without_usage_is_counted_by_chunks_and_the_report_says_so(peer: Peer) -> None:
    peer.says_usage = False
    observer = Silent()
    result = run([peer], observer=observer)
    assert [answer.output_tokens for answer in result.rounds[0].answers] == [5] * 8
    assert any("counted by chunks" in note for note in report.notes(result, report.summarize(result)))
    assert "no token usage" in observer.sentences[0]


def test_the_empty_role_chunk_is_not_the_first_token(peer: Peer) -> None:
    peer.seconds_per_token = 0.05
    answer = run([peer], replace(SETTINGS, requests=1)).rounds[0].answers[0]
    assert answer.ttft is not None
    assert answer.ttft >= 0.05


@pytest.mark.parametrize(("trouble", "kind"), [("503", "http 503"), ("error", "stream error"), ("cut", "truncated")])
def test_a_failed_request_is_never_counted_as_throughput(peer: Peer, trouble: str, kind: str) -> None:
    peer.fails = lambda count: trouble if count > 3 and count % 2 else None
    result = run([peer])
    level = report.summarize(result)["levels"][0]
    round_ = result.rounds[0]
    assert level["servers"]["A"]["errors"] == {kind: 4}
    assert level["servers"]["A"]["figures"]["output_tok_s"] == pytest.approx(4 * TOKENS / round_.wall_s)
    assert level["servers"]["A"]["figures"]["requests_s"] == pytest.approx(4 / round_.wall_s)
    assert report.failures(result) == 4


def test_a_request_that_takes_too_long_is_an_error_of_its_own_kind(peer: Peer) -> None:
    peer.seconds_per_token = 0.3
    settings = replace(SETTINGS, requests=2, timeout=0.1)
    load = asyncio.run(press(server_at(peer), Level(streams=2), settings, Prompts(0), Scale(), "r"))
    assert [answer.error for answer in load.answers] == ["timeout", "timeout"]


def test_an_empty_answer_is_an_error() -> None:
    answer = Answer(0, "base", 0.0)
    stream = Stream(answer, 0.0)
    stream.feed(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":0}}\n\ndata: [DONE]\n\n', 1.0)
    stream.close()
    assert answer.error == "empty"


def test_a_gap_is_the_time_between_two_reads_that_brought_text() -> None:
    answer = Answer(0, "base", 0.0)
    stream = Stream(answer, 10.0)
    word = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\r\n\r\n'
    stream.feed(word, 10.5)
    stream.feed(word + word[:20], 10.6)
    stream.feed(word[20:], 10.9)
    stream.feed(b": a comment\n\n", 11.0)
    assert answer.first == pytest.approx(0.5)
    assert answer.gaps_ms == pytest.approx([100.0, 300.0])


# -- what is asked


def test_no_two_prompts_of_a_run_or_of_two_runs_begin_alike() -> None:
    texts = [
        Prompts(0).text(server, round_, index, 40)
        for server in "AB"
        for round_ in ("0/0", "1/0")
        for index in range(50)
    ] * 1
    again = [Prompts(0).text("A", "0/0", index, 40) for index in range(50)]
    openings = {tuple(text.split()[:4]) for text in texts + again}
    assert len(openings) == len(texts) + len(again)


def test_both_servers_get_the_same_prompts_but_for_the_opening() -> None:
    prompts = Prompts(7)
    ours, theirs = (prompts.text(server, "0/0", 3, 40).split() for server in "AB")
    assert ours[4:] == theirs[4:]
    assert len(ours) == 40


def test_a_shared_prefix_is_shared_by_all_and_only_when_asked_for() -> None:
    prompts = Prompts(1)
    one, two = (prompts.text("A", "r", index, 40, shared=20).split() for index in (1, 2))
    assert one[:20] == two[:20]
    assert one[20:] != two[20:]
    assert set(one) <= set(WORDS)


def test_the_prompt_has_about_the_wanted_tokens_as_the_server_counts_them(peer: Peer) -> None:
    result = run([peer], replace(SETTINGS, prompt_tokens=90))
    assert result.scale == Scale(fixed=10.0, per_word=2.0, measured=True)
    assert {answer.prompt_tokens for answer in result.rounds[0].answers} == {90}


def test_a_uniform_mix_asks_every_adapter_equally_often(peer: Peer) -> None:
    server = server_at(peer, "one", "two", "three")
    load = asyncio.run(press(server, Level(streams=3), replace(SETTINGS, requests=12), Prompts(0), Scale(), "r"))
    asked = [answer.model for answer in load.answers]
    assert {asked.count(name) for name in ("one", "two", "three")} == {4}


def test_a_zipf_mix_asks_the_first_adapter_most() -> None:
    mix = Mix(100, 1.0, "seed")
    counts = [0] * 100
    for index in range(4000):
        counts[mix(index)] += 1
    expected = 4000 / sum(1 / rank for rank in range(1, 101))
    assert counts[0] == pytest.approx(expected, rel=0.15)
    assert counts[0] > counts[4] > counts[40]


def test_llama_cpp_is_asked_for_an_adapter_by_its_place(peer: Peer) -> None:
    peer.owner = "llamacpp"
    server = asyncio.run(find("B", Address(peer.url), [], ["one", "two"]))
    assert server.dialect == "llama.cpp"
    assert server.body(SETTINGS, 1, "hello")["lora"] == [{"id": 1, "scale": 1.0}]
    assert "lora" not in replace(server, dialect="openai").body(SETTINGS, 1, "hello")


def test_completions_and_extra_fields_reach_the_server(peer: Peer) -> None:
    server = replace(server_at(peer), extra={"top_p": 0.5})
    settings = replace(SETTINGS, endpoint="completions", ignore_eos=True, requests=1)
    load = asyncio.run(press(server, Level(streams=1), settings, Prompts(0), Scale(), "r"))
    assert load.answers[0].output_tokens == TOKENS
    body = peer.bodies[-1]
    assert (body["top_p"], body["ignore_eos"], body["max_tokens"]) == (0.5, True, TOKENS)
    assert "messages" not in body


# -- how it is pressed


def test_a_closed_loop_keeps_as_many_streams_as_asked_for(peer: Peer) -> None:
    peer.seconds_per_token = 0.02
    load = asyncio.run(press(server_at(peer), Level(streams=4), SETTINGS, Prompts(0), Scale(), "r"))
    events = sorted([(answer.sent, 1) for answer in load.answers] + [(answer.end, -1) for answer in load.answers])
    running_now = worst = 0
    for _, change in events:
        running_now += change
        worst = max(worst, running_now)
    assert worst == 4


def test_a_round_with_a_duration_finishes_what_it_began(peer: Peer) -> None:
    peer.seconds_per_token = 0.01
    settings = replace(SETTINGS, requests=None, duration=2.0)
    load = asyncio.run(press(server_at(peer), Level(streams=2), settings, Prompts(0), Scale(), "r"))
    assert all(answer.error is None for answer in load.answers)
    assert load.wall_s >= 1.0
    assert len(load.answers) > 2
    assert max(answer.due for answer in load.answers) < 2.0


def test_an_open_loop_does_not_wait_for_slow_answers(peer: Peer) -> None:
    peer.seconds_per_token = 0.3
    settings = replace(SETTINGS, requests=20)
    load = asyncio.run(press(server_at(peer), Level(rate=100.0), settings, Prompts(0), Scale(), "r"))
    assert max(answer.sent for answer in load.answers) < min(answer.end for answer in load.answers)
    assert [answer.due for answer in load.answers] == sorted(answer.due for answer in load.answers)
    assert all(answer.ttft and answer.ttft >= 0.3 for answer in load.answers)


def test_warm_up_requests_are_not_in_the_figures(peer: Peer) -> None:
    result = run([peer], replace(SETTINGS, warmup=5))
    assert len(result.rounds[0].answers) == 8
    assert len(peer.bodies) == 1 + 2 + 5 + 8  # preflight, calibration, warm-up, the round


def test_a_wrong_model_is_told_before_the_rounds(peer: Peer) -> None:
    peer.fails = lambda count: "503"
    with pytest.raises(CannotBench, match="does not answer for model 'base': the engine is resting"):
        run([peer])


# -- rounds and ratios


def test_rounds_alternate_a_b_b_a() -> None:
    with running(Peer()) as ours, running(Peer()) as theirs:
        result = run([ours, theirs], replace(SETTINGS, rounds=3, requests=2))
    assert [round_.server for round_ in result.rounds] == ["A", "B", "B", "A", "A", "B"]


def made(server: str, pair: int, tokens: int, *, attempt: int = 0, disturbed: bool = False) -> Round:
    answer = Answer(0, "base", 0.0, first=0.1, last=0.9, end=1.0, output_tokens=tokens, counted_by="usage")
    return Round(server, 1, None, pair, attempt, 1.0, 0.0, None, disturbed, [answer])


def made_result(rounds: list[Round]) -> Result:
    servers = [{"label": label, "url": "", "models": ["base"], "processes": []} for label in "AB"]
    return Result("", {}, SETTINGS, servers, [Level(streams=1)], "", Scale(), rounds)


def test_the_ratio_is_paired_round_by_round() -> None:
    # The machine becomes three times slower half-way; each pair sees the same machine.
    speeds = [(120, 100), (110, 100), (40, 33)]
    rounds = [made(label, pair, speed["AB".index(label)]) for pair, speed in enumerate(speeds) for label in "AB"]
    ratio = report.summarize(made_result(rounds))["levels"][0]["ratios"]["output_tok_s"]
    assert ratio["pairs"] == pytest.approx([1.2, 1.1, 1.2121], abs=1e-4)
    assert ratio["median"] == pytest.approx(1.2)
    assert (ratio["min"], ratio["max"]) == pytest.approx((1.1, 1.2121), abs=1e-4)


def test_a_disturbed_pair_gives_way_to_its_rerun_and_stays_in_the_record() -> None:
    rounds = [
        made("A", 0, 100),
        made("B", 0, 10, disturbed=True),
        made("A", 0, 100, attempt=1),
        made("B", 0, 90, attempt=1),
    ]
    result = made_result(rounds)
    level = report.summarize(result)["levels"][0]
    assert level["ratios"]["output_tok_s"]["pairs"] == pytest.approx([1.1111], abs=1e-4)
    assert (level["rounds_run"], level["disturbed"], level["clean"]) == (2, 1, True)
    assert len(json.loads(report.to_json(result))["rounds"]) == 4


def test_figures_from_disturbed_rounds_alone_are_called_that() -> None:
    result = made_result([made("A", 0, 100, disturbed=True), made("B", 0, 100)])
    notes = report.notes(result, report.summarize(result))
    assert any("ALL FIGURES ARE FROM DISTURBED ROUNDS" in note for note in notes)


class Restless(Watch):
    """Sees a neighbour at work in the first rounds."""

    def __init__(self, disturbed_rounds: int) -> None:
        super().__init__({})
        self.left = disturbed_rounds

    def between(self, before: Snapshot, after: Snapshot, label: str) -> Use:
        self.left -= 1
        return Use(1.0, None, None, None, 0.0, 0.5 if self.left >= 0 else 0.0, 0.0, [("neighbour", 0.5)])


def test_a_disturbed_round_is_run_again_but_not_for_ever(peer: Peer) -> None:
    settings = replace(SETTINGS, rounds=2, requests=2, disturbed_above=0.1)
    observer = Silent()
    result = run([peer], settings, watch=Restless(1), observer=observer)
    assert [(round_.pair, round_.attempt, round_.disturbed) for round_ in result.rounds] == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
    ]
    assert "neighbour 0.5 s" in observer.sentences[0]
    assert len(run([peer], settings, watch=Restless(100)).rounds) == 4


def test_percentiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = [5.0, 1.0, 9.5, 3.25, 7.0]
    for percent in (0, 50, 90, 99, 100):
        assert report.percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))
    assert report.percentile([], 50) is None


# -- the machine


BUSY_SERVER = """
import socket, subprocess, sys, time
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
child = subprocess.Popen([sys.executable, "-c", "import sys\\nwhile True: pass"])
sys.stdin.read()
child.kill()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_servers_cpu_and_memory_are_its_whole_process_trees() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", BUSY_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdin is not None
    try:
        roots = listeners(int(server.stdout.readline()))
        assert roots == {server.pid}
        watch = Watch({"A": roots})
        before = after = watch.snapshot()
        until = time.monotonic() + 20
        while after.cpu_s(after.tree(roots)) - before.cpu_s(before.tree(roots)) < 0.2 and time.monotonic() < until:
            time.sleep(0.2)
            after = watch.snapshot()
        use = watch.between(before, after, "A")
        assert len(after.tree(roots)) == 2
        assert use.server_cpu_s is not None
        assert use.server_cpu_s > 0.1
        assert use.server_rss is not None
        assert use.server_rss > 5e6
        stranger = Watch({}).between(before, after, "A")
        assert stranger.disturbed(0.01)
    finally:
        server.stdin.close()
        server.wait()


def test_work_of_a_child_that_ended_still_counts_for_its_server() -> None:
    before = Snapshot(0.0, 10.0, 0.0, {1: Process("server", 0, 2.0, 0.0, 10), 2: Process("child", 1, 3.0, 0.0, 10)})
    after = Snapshot(10.0, 15.0, 0.0, {1: Process("server", 0, 2.5, 4.0, 10)})
    use = Watch({"A": frozenset([1])}).between(before, after, "A")
    assert use.server_cpu_s == pytest.approx(1.5)


def test_whoever_reaps_a_process_is_not_blamed_for_its_work() -> None:
    before = Snapshot(0.0, 90.0, 0.0, {1: Process("init", 0, 1.0, 0.0, 10), 9: Process("batch", 1, 80.0, 0.0, 10)})
    after = Snapshot(10.0, 90.5, 0.0, {1: Process("init", 0, 1.0, 80.5, 10)})
    use = Watch({}).between(before, after, "A")
    assert use.others_cpu_s == pytest.approx(0.5)
    assert use.busiest == []


def test_cpu_that_no_visible_process_used_is_a_disturbance_too() -> None:
    before = Snapshot(0.0, 0.0, 0.0, {1: Process("server", 0, 0.0, 0.0, 10)})
    after = Snapshot(10.0, 20.0, 0.5, {1: Process("server", 0, 9.0, 0.0, 10)})
    use = Watch({"A": frozenset([1])}).between(before, after, "A")
    assert use.others_cpu_s == pytest.approx(10.0)
    assert use.stolen_s == pytest.approx(0.5)


def test_only_this_machines_addresses_are_local() -> None:
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("192.0.2.1")


def test_a_snapshot_knows_this_process() -> None:
    assert snapshot().processes[os.getpid()].rss > 1e6


# -- the wire


def test_chunks_may_be_cut_anywhere() -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n"
    for step in range(1, len(whole)):
        connection = Connection()
        body = b"".join(connection._parse(whole[at : at + step]) for at in range(0, len(whole), step))
        assert body == b"hello, world"
        assert connection._ended


def test_what_is_not_http_is_said_and_not_hung_on() -> None:
    async def story() -> None:
        async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(hello, "127.0.0.1", 0) as mail:
            address = Address(f"http://127.0.0.1:{mail.sockets[0].getsockname()[1]}")
            connection = await address.connect()
            with pytest.raises(WireError, match=r"not HTTP/1\.1"):
                await connection.exchange(address.get("/v1/models"))

    asyncio.run(story())


def test_an_address_may_end_in_v1_and_its_credentials_stay_out_of_reports() -> None:
    assert Address("http://localhost:8000/v1/").url == "http://localhost:8000"
    assert Address("localhost:8000").port == 8000
    assert "secret" not in Address("http://user:secret@host:1").url
    with pytest.raises(ValueError, match="not an address"):
        Address("ftp://host")


# -- the command


def cli(*words: str) -> Any:
    return CliRunner().invoke(bench_app, list(words))


def quick(url: str, *more: str) -> Any:
    common = ("--requests", "4", "--rounds", "1", "--warmup", "0", "--disturbed-above", "99", "--max-tokens", "6")
    return cli("--url", url, *common, *more)


def test_the_command_prints_a_table_and_writes_everything_raw(peer: Peer, tmp_path: Path) -> None:
    done = quick(peer.url, "--streams", "1,2", "--json", str(tmp_path / "out.json"), "--api-key", "sk-secret")
    assert done.exit_code == 0, done.output
    assert "output tokens/s" in done.stdout
    text = (tmp_path / "out.json").read_text()
    written = json.loads(text)
    assert [level["streams"] for level in written["summary"]["levels"]] == [1, 2]
    assert len(written["rounds"][0]["answers"][0]["gaps_ms"]) <= 4
    assert "sk-secret" not in text


def test_json_to_stdout_is_json_alone(peer: Peer) -> None:
    done = quick(peer.url, "--streams", "1", "--vs", peer.url, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["summary"]["levels"][0]["ratios"]["output_tok_s"]["median"] > 0
    assert "A / B" in done.stderr


def test_any_failed_request_makes_the_exit_code_1(peer: Peer) -> None:
    peer.fails = lambda count: "503" if count == 5 else None
    done = quick(peer.url, "--streams", "2")
    assert done.exit_code == 1
    assert "1 of 4 failed: http 503 (base: the engine is resting)" in " ".join(done.output.split())


def test_an_unreachable_server_is_a_sentence_and_exit_code_1() -> None:
    done = cli("--url", "http://127.0.0.1:9", "--requests", "1")
    assert done.exit_code == 1
    assert "is the server running?" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--streams", "0"], "--streams takes positive numbers"),
        (["--streams", "many"], "--streams takes positive numbers"),
        (["--rate", "-1"], "--rate takes positive numbers"),
        (["--adapter-mix", "pareto"], "--adapter-mix takes uniform, zipf"),
        (["--adapters", "a,,b"], "--adapters takes names"),
        (["--endpoint", "embeddings"], "--endpoint takes chat or completions"),
        (["--requests", "1", "--duration", "2"], "give one of them"),
        (["--url", "ftp://here"], "not an address"),
        (["--extra-body", "[1]"], "--extra-body takes a JSON object"),
        (["--json", "/nowhere/at/all/x.json"], "no such folder"),
        (["--vs", "http://b", "--adapters", "a,b", "--vs-adapters", "c"], "name equally many"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(words: list[str], sentence: str) -> None:
    done = cli(*words)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_help_has_an_example_and_loads_no_engine() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom serve.cli.bench import bench_app\n"
        "from serve.cli.adapters import adapters_app\n"
        "for app in (bench_app, adapters_app):\n    print(CliRunner().invoke(app, ['--help']).output)\n"
        "print([name for name in ('torch', 'vllm', 'httpx', 'msgspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loradock bench --model smollm2" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
