"""An adapter's golden set over HTTP: cases, who answers them how well, and their results."""

from __future__ import annotations

from tests.support.waiting import settled

GOLDEN = "/v1/adapters/tone/golden"


def cases(count, **more):
    return [{"prompt": f"Question {number}", "contains": "yes", "max_tokens": 4, **more} for number in range(count)]


class Skill:
    """What part of the questions each version answers rightly: those with the lowest numbers of a hundred."""

    def __init__(self, backend, usual=1.0):
        self.usual, self.of, self.asked = usual, {}, []
        backend.say = self.say

    def say(self, body):
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        self.asked.append(body)
        if not prompt.startswith("Question"):
            return prompt
        return "yes" if int(prompt.split()[1]) % 100 < 100 * self.of.get(body["model"], self.usual) else "no"


async def put(client, entries):
    answer = await client.put(GOLDEN, json={"cases": entries})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def results(client, version=None):
    answer = await client.get(f"{GOLDEN}/results", params={} if version is None else {"version": version})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def ran(client, version):
    """The results once each case of the version was asked."""

    async def complete():
        answer = await results(client, version)
        known = {row["version"]: row for row in answer["versions"]}
        return answer if not answer["running"] and version in known and not known[version]["missing"] else None

    client._transport.app.state.parts.golden.runs.wake()
    answer = await settled(complete)
    assert answer, await results(client, version)
    return next(row for row in answer["versions"] if row["version"] == version), answer
