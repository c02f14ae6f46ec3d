"""What comes before the engine has few threads and a bounded queue, of which no API key takes all."""

import asyncio
import threading

import pytest

from haori.core.errors import OverloadedError
from haori.serve.engine.queue_share import check_share
from haori.server.preparation import Preparation


def places(owner, own, waiting, total):
    try:
        check_share(owner, own, waiting, total, retry_after_s=1.0, why="--max-queue")
    except OverloadedError as error:
        return str(error)
    return None


def taken(owners, total):
    """Let owners take places in turn for as long as they get any; return how many each has."""
    held = dict.fromkeys(owners, 0)
    while any(places(owner, held[owner], sum(held.values()), total) is None for owner in owners):
        for owner in owners:
            if places(owner, held[owner], sum(held.values()), total) is None:
                held[owner] += 1
    return held


def test_one_owner_never_takes_all_and_nobodys_requests_may():
    assert taken(["a"], 512) == {"a": 384}
    assert taken([""], 512) == {"": 512}
    crowd = taken(list("abcd"), 512)
    assert sum(crowd.values()) < 512
    assert max(crowd.values()) - min(crowd.values()) <= 1
    assert places("new", 0, sum(crowd.values()), 512) is None
    assert "API key" in places("a", crowd["a"], sum(crowd.values()), 512)
    assert (
        places("", 0, 512, 512) == "512 requests are waiting, which is as many as may (--max-queue); try again later."
    )


def test_a_flood_is_refused_and_threads_stay_few():
    async def flood():
        preparation = Preparation(8)
        held = threading.Event()
        before = threading.active_count()
        jobs, refused = [], 0
        for _ in range(100):
            try:
                jobs.append(preparation.run("", lambda: held.wait(20)))
            except OverloadedError as error:
                assert error.retry_after_s
                refused += 1
        assert (len(jobs), refused) == (8, 92)
        assert threading.active_count() <= before + 2
        # Schemas have a lane of their own, and do not wait for prompts.
        assert await asyncio.wait_for(preparation.run("", lambda: 7, compiles=True), 10) == 7
        held.set()
        assert await asyncio.gather(*jobs) == [True] * 8
        assert await preparation.run("", lambda: 8) == 8
        preparation.close()

    asyncio.run(flood())


def test_a_key_that_floods_leaves_room_for_others():
    async def flood():
        preparation = Preparation(8)
        held = threading.Event()
        jobs = [preparation.run("a", lambda: held.wait(20)) for _ in range(6)]
        with pytest.raises(OverloadedError, match="of this API key"):
            preparation.run("a", lambda: None)
        jobs.append(preparation.run("b", lambda: True))
        jobs[-2].cancel()
        held.set()
        assert await jobs[-1]
        preparation.close()

    asyncio.run(flood())
