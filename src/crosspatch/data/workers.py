# SPDX-License-Identifier: Apache-2.0
"""A job on chunks of items, in forked processes: they inherit it, write into shared memory and end
with their parent."""

from __future__ import annotations

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

_job: list[Job] = []  # in a worker: the one job it was forked for


def _adopt(job: Job) -> None:
    _job[:] = [job]
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
def pool(workers: int, job: Job) -> Iterator[Callable[[list[range]], Done]]:
    """Something that runs the job on chunks and yields what it returns, in any order: here, in
    forked processes, or in threads. Raises DataError when a process is killed."""
    if workers == 1:
        yield lambda chunks: map(job, chunks)
        return
    with _executor(workers, job) as (executor, task):
        try:
            yield lambda chunks: _completed(executor, task, chunks)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _executor(workers: int, job: Job) -> Iterator[tuple[Executor, Callable]]:
    if "fork" not in multiprocessing.get_all_start_methods():
        with ThreadPoolExecutor(workers) as executor:
            yield executor, job
        return
    forking = multiprocessing.get_context("fork")
    with (
        warnings.catch_warnings(),
        ProcessPoolExecutor(workers, forking, _adopt, (job,)) as executor,
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
