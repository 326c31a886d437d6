"""What threads put in comes out in order, on the loop, be it put in before anybody takes or while somebody waits."""

from __future__ import annotations

import asyncio
import threading

from serve.asgi.inbox import Inbox


async def test_what_was_put_in_before_anybody_took_is_there():
    inbox: Inbox[int] = Inbox()
    for number in range(3):
        inbox.put(number)
    assert [await inbox.take() for _ in range(3)] == [0, 1, 2]


async def test_whoever_waits_gets_what_another_thread_puts_in():
    inbox: Inbox[int] = Inbox()
    taking = asyncio.create_task(_take(inbox, 1000))
    await asyncio.sleep(0)
    thread = threading.Thread(target=lambda: [inbox.put(number) for number in range(1000)])
    thread.start()
    assert await asyncio.wait_for(taking, 30) == list(range(1000))
    thread.join()


def test_after_the_loop_has_ended_putting_in_is_no_error():
    inbox: Inbox[int] = Inbox()

    async def one():
        inbox.put(1)
        return await inbox.take()

    assert asyncio.run(one()) == 1
    inbox.put(2)


async def _take(inbox, count):
    return [await inbox.take() for _ in range(count)]
