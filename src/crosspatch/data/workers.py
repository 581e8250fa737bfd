# SPDX-License-Identifier: Apache-2.0
"""A job on chunks of items, in processes that end with their parent.

Forked ones inherit the job and write into shared memory. Where this process has threads and locks,
which would be copied half-way, they begin anew instead and are sent the job.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from crosspatch.errors import DataError

Job = Callable[[range], Any]
Done = Iterator[Any]

_job: list[Job] = []  # in a worker: the one job it is there for


def _adopt(job: Job) -> None:
    _job[:] = [job]
    gc.freeze()  # collecting would touch, and so copy, all that is shared with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which saves a run
    warnings.simplefilter("ignore")  # remarks of parsers on foreign files; faults are raised
    threading.Thread(
        target=_end_with, args=(multiprocessing.parent_process(),), daemon=True
    ).start()


def _end_with(parent: Any) -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent.join()
    os._exit(1)


def _work(chunk: range) -> Any:
    return _job[0](chunk)


@contextmanager
def pool(workers: int, job: Job, *, fork: bool = True) -> Iterator[Callable[[list[range]], Done]]:
    """Something that runs the job on chunks and yields what it returns, in any order: here, in
    processes, or in threads. fork: else processes begin anew, and the job is pickled for them.
    Raises DataError when a process is killed."""
    if workers == 1:
        yield lambda chunks: map(job, chunks)
        return
    with _executor(workers, job, fork) as (executor, task):
        try:
            yield lambda chunks: _completed(executor, task, chunks)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _executor(workers: int, job: Job, fork: bool) -> Iterator[tuple[Executor, Callable]]:
    if fork and "fork" not in multiprocessing.get_all_start_methods():
        with ThreadPoolExecutor(workers) as executor:
            yield executor, job
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with (
        warnings.catch_warnings(),
        ProcessPoolExecutor(workers, context, _adopt, (job,)) as executor,
    ):
        # Python 3.12 and later warn of forking beside threads; a worker takes none of their locks
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        yield executor, _work


def _completed(executor: Executor, task: Callable, chunks: list[range]) -> Done:
    try:
        for future in as_completed([executor.submit(task, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool as problem:
        raise DataError(
            "a process that decodes pictures was killed, most likely for want of memory",
            "Each of them holds one picture at a time",
            "Use fewer: --workers 1",
        ) from problem
