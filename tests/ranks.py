"""A few processes that wait for functions to run together, as ranks of one process group.

Starting a process and importing torch takes seconds: the processes start once and run many cases.
"""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist


class RankPool:
    """Processes that are ranks of one group.

    Args:
        size: how many.
        backend: of the group.
        timeout_s: of a collective.
    """

    def __init__(self, size: int, backend: str = "gloo", timeout_s: float = 60) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = torch.multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        store = Path(self.folder.name) / "store"
        self.processes = [
            context.Process(target=_serve, args=(rank, size, backend, str(store), timeout_s, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float = 120) -> list[Any]:
        """What ``function(*args)`` returns on each rank; raises what it raises on the first rank where it does."""
        results = self.attempt(function, *args, limit_s=limit_s)
        for rank, result in enumerate(results):
            if isinstance(result, Exception):
                raise AssertionError(f"rank {rank} failed") from result
        return results

    def attempt(self, function: Callable[..., Any], *args: Any, limit_s: float = 120) -> list[Any]:
        """What ``function(*args)`` returns or raises on each rank."""
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            try:
                pipe.send_bytes(message)
            except BrokenPipeError:
                continue
        return [self._receive(rank, limit_s) for rank in range(self.size)]

    def _receive(self, rank: int, limit_s: float) -> Any:
        try:
            if not self.pipes[rank].poll(limit_s):
                self.close()
                raise AssertionError(f"rank {rank} has not answered for {limit_s} seconds")
            return pickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            return error

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, size: int, backend: str, store: str, timeout_s: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            result = function(*args)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            result = error
        pipe.send_bytes(_pickled(result))


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:  # an exception of the compiler's holds what cannot be sent
        return pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}; {error}"))
