"""OpenAI's client alone: examples go up, a job trains the real model on them, and the new model answers.

How well it does after 200 of them is `python -m tests.campaigns.finetune learn`.
"""

from __future__ import annotations

import time

import pytest

from tests.campaigns.finetune import ENDED, answer, examples, question, words
from tests.support.server import ADMIN, BASE

# A minute on two cores that do nothing else.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]


def test_100_examples_teach_the_model_what_it_could_not_do(server, name):
    ai = server.client(ADMIN)
    held_out = words(140, 1)[100:120]

    def right(model: str) -> float:
        asked = ((word, [{"role": "user", "content": question(word)}]) for word in held_out)
        given = {"model": model, "temperature": 0, "max_tokens": 24}
        told = [(word, ai.chat.completions.create(messages=messages, **given)) for word, messages in asked]
        return sum(said.choices[0].message.content.strip() == answer(word) for word, said in told) / len(told)

    file = ai.files.create(file=("train.jsonl", examples(100)), purpose="fine-tune")
    assert right(BASE) < 0.2
    job = ai.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix=name, seed=1)
    while job.status not in ENDED:
        time.sleep(1)
        job = ai.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert right(job.fine_tuned_model) >= 0.7
    losses = ai.files.content(job.result_files[0]).text.splitlines()[1:]
    assert float(losses[-1].split(",")[1]) < float(losses[0].split(",")[1])
    assert ai.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    for id in (file.id, *job.result_files):
        assert ai.files.delete(id).deleted
