"""The queue: batches grow while the model is busy, nobody waits when it is idle, the cancelled are not computed."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayclip.serve.towers.batching import GatherQueue, QueueFullError


class Model:
    """Doubles numbers; runs only when it is let go, and remembers its batches."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Semaphore(0)
        self.fails = ()

    def __call__(self, items):
        assert self.gate.acquire(timeout=10)
        self.batches.append(items)
        if any(item in self.fails for item in items):
            raise ValueError("no")
        return [2 * item for item in items]

    def let(self, batches):
        for _ in range(batches):
            self.gate.release()


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def queue(model):
    with ThreadPoolExecutor(1) as executor:
        yield GatherQueue(model, max_batch_size=4, max_waiting=10, executor=executor)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0.001)


def test_an_idle_model_starts_at_once_and_gathers_while_it_is_busy(queue, model):
    async def main():
        first = asyncio.create_task(queue.submit([1]))
        await settle()
        rest = [asyncio.create_task(queue.submit([i])) for i in range(2, 8)]
        await settle()
        assert queue.waiting == 6
        model.let(3)
        return [await task for task in [first, *rest]]

    assert asyncio.run(main()) == [[2 * i] for i in range(1, 8)]
    assert model.batches == [[1], [2, 3, 4, 5], [6, 7]]
    assert queue.waiting == 0


def test_a_caller_with_many_items_lets_others_in_after_each_batch(queue, model):
    async def main():
        many = asyncio.create_task(queue.submit(list(range(10))))
        await settle()
        one = asyncio.create_task(queue.submit([99]))
        await settle()
        model.let(3)
        return await many, await one

    many, one = asyncio.run(main())
    assert (many, one) == ([2 * i for i in range(10)], [198])
    # Of the four places of the second batch, the caller that has been waiting for its rest comes first again.
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [99, 8, 9]]


def test_the_cancelled_leave_and_are_not_computed(queue, model):
    async def main():
        first = asyncio.create_task(queue.submit([1]))
        await settle()
        gone, stays = asyncio.create_task(queue.submit([2, 3])), asyncio.create_task(queue.submit([4]))
        await settle()
        gone.cancel()
        await settle()
        assert queue.waiting == 1
        model.let(2)
        return await first, await stays

    assert asyncio.run(main()) == ([2], [8])
    assert model.batches == [[1], [4]]


def test_a_full_queue_refuses_at_once(queue, model):
    async def main():
        tasks = [asyncio.create_task(queue.submit([0]))]
        await settle()
        tasks += [asyncio.create_task(queue.submit([i])) for i in range(1, 11)]
        await settle()
        assert queue.waiting == 10
        with pytest.raises(QueueFullError):
            await queue.submit([11])
        model.let(4)
        return [await task for task in tasks]

    assert asyncio.run(main()) == [[2 * i] for i in range(11)]


def test_an_idle_queue_takes_more_than_may_wait(queue, model):
    model.let(10)
    assert asyncio.run(queue.submit(list(range(25)))) == [2 * i for i in range(25)]


def test_a_failed_batch_fails_its_callers_and_no_others(queue, model):
    model.fails = (2,)

    async def main():
        first = asyncio.create_task(queue.submit([1]))
        await settle()
        second = asyncio.create_task(queue.submit([2, 3, 4, 5, 6]))
        await settle()
        third = asyncio.create_task(queue.submit([7]))
        await settle()
        model.let(3)
        return await asyncio.gather(first, second, third, return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert first == [2]
    assert isinstance(second, ValueError)
    assert third == [14]
    assert queue.waiting == 0
    assert [6] not in model.batches and all(6 not in batch for batch in model.batches)


def test_nothing_is_answered_with_nothing(queue):
    assert asyncio.run(queue.submit([])) == []
