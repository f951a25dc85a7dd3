"""What keeps a stream's plan small, however long it is: windows are named as they are read, and then forgotten.

Ray Data holds an input for each task of a read from the start, and the statistics of each block to the end. So one
task streams the numbers of the windows, a block each, no faster than they are taken up; and the statistics are dropped.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.bundle_queue import ReorderingBundleQueue
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

_NUMBERS_A_TASK = 65_536
_MOST_WAITING = 64


def number_windows(windows: range) -> ray.data.Dataset:
    """A dataset of blocks of one row, `window`: the numbers in their order, streamed by one task without a CPU."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # other nodes may go away
    dataset = ray.data.read_datasource(
        _Numbers(windows), num_cpus=0, label_selector=here, concurrency=1, override_num_blocks=len(windows)
    )
    context = dataset.context
    policies = context.get_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, ENABLED_BACKPRESSURE_POLICIES)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*policies, _AsTheyAreTaken])
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Forget]
    return dataset


class _Numbers(Datasource):
    def __init__(self, windows: range) -> None:
        super().__init__()
        self._windows = windows

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        # Ray cuts what they give into as many blocks as were asked for: one for each number.
        starts = range(0, len(self._windows), _NUMBERS_A_TASK)
        parts = [self._windows[start : start + _NUMBERS_A_TASK] for start in starts]
        return [ReadTask(partial(_table, part), BlockMetadata(len(part), None, None, None)) for part in parts]


def _table(windows: range) -> Iterable[pa.Table]:
    yield pa.table({"window": pa.array(windows, pa.int64())})


class _AsTheyAreTaken(BackpressurePolicy):
    """Lets an operator give no more while this many of its blocks wait for tasks of the next: they weigh nothing."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        takers = [self._topology[taker] for taker in op.output_dependencies if isinstance(taker, MapOperator)]
        return 0 if any(taker.total_enqueued_input_blocks() >= _MOST_WAITING for taker in takers) else None


class _Forget(ExecutionCallback):
    """Drops what is kept of each task that is over: a summary that nobody asks for, an empty queue in its place."""

    def on_execution_step(self, executor: Any) -> None:
        for op in executor._topology:
            if isinstance(op, MapOperator):
                op._output_blocks_stats.clear()
                if isinstance(op._output_queue, ReorderingBundleQueue):
                    _forget_emptied(op._output_queue)


def _forget_emptied(queue: ReorderingBundleQueue) -> None:
    passed = [key for key in queue._inner if key < queue._current_key]
    for key in passed:
        del queue._inner[key]
    queue._finalized_keys.difference_update(passed)
