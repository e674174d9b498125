"""Runs candidates on several workers through Ray; each worker is a process with the model.

Ray is imported only when a runner is opened. The workers get the model, the compression and the dense predictions from
Ray's object store, so all workers of a machine read the same memory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from msp.base.progress import Progress
from msp.compressions.base import Compression
from msp.engine.candidates import forward_in_bf16
from msp.engine.fitness import Job, Key
from msp.engine.runners import Setting, open_runner
from msp.errors import MspError, UsageError, first_line
from msp.evidence.evaluate import Sums, summed
from msp.models.structure import device_of

# The parts of a call per worker, if there are enough batches: with several, all workers end at about the same time.
PARTS_PER_WORKER = 4
# A part is not tried again after this many workers died while they ran it.
DEATHS = 3
# Ray reads these variables when it is imported and started. They turn off Ray's usage reports and a warning for its
# developers, give workers the priority of this process (with Ray's niceness of 15 they starve if other work runs), and
# raise the time limits for starts and answers.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "10",
}
CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Workers:
    """The number of workers that run candidates, and their Ray cluster.

    Attributes:
        count: the number of workers; None for one worker on every GPU of the cluster, or on every CPU core if the model
            is on a CPU.
        address: the address of a Ray cluster (``auto`` or ``host:port``). If it is None, Ray is started on this machine
            and stopped afterwards.

    Raises:
        UsageError: the count is below 1, both are None, the address has no port, or Ray is not installed.
    """

    count: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.address is None:
            raise UsageError("workers: neither how many nor the address of a cluster")
        if self.count is not None and self.count < 1:
            raise UsageError(f"{self.count} workers: a search needs at least one")
        if self.address is not None:
            _, colon, port = self.address.rpartition(":")
            if colon and not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16):
                raise UsageError(f"{self.address[:60]!r} is no address of a cluster: write auto or host:port")
        if importlib.util.find_spec("ray") is None:
            raise UsageError("workers need the ray library: pip install 'mixed-sparsity-pruning[ray]'")


@dataclass(frozen=True)
class _Part:
    """Some batches of a job, with the number of the job in the call."""

    number: int
    job: Job


class CandidateWorker:
    """A Ray actor: holds the model once and runs candidates on it.

    Args:
        setting: the inputs of the runner, which the workers of a machine share and only read.
        device: ``cpu``, or ``cuda`` for the GPU that Ray gave this process.
        threads: the number of torch threads. Results may depend on it, so it does not depend on the number of workers.
    """

    def __init__(self, setting: Setting, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = setting.model.to(device)
        self._opened = open_runner(replace(setting, compression=setting.compression.to(device)))
        self._runner = self._opened.__enter__()

    def kind(self) -> str:
        """The hardware and software that results depend on, besides the job."""
        on_gpu = device_of(self._model).type == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
        return f"{device}, torch {torch.__version__}{', bf16 products' if forward_in_bf16(self._model) else ''}"

    def run(self, levels: Key, batches: Sequence[int]) -> list[Sums]:
        """The sums of each batch; the driver adds them up in a fixed order."""
        return self._runner.run([Job(levels, (batch,)) for batch in batches])


class RayRunner:
    """Sends parts of jobs to free workers, and adds their results up in the order of the batches.

    A result therefore depends neither on the number of workers nor on the order in which they finish. A worker that
    dies is replaced, and its unfinished part runs again.

    Args:
        ray: the connected Ray module.
        actor: makes a worker by ``actor.remote(*arguments)``.
        arguments: the arguments of a worker.
        count: the number of workers.
        batches: the number of batches of fitness tokens.
    """

    def __init__(self, ray: Any, actor: Any, arguments: Sequence[Any], count: int, batches: int) -> None:
        self.batches = batches
        self._ray = ray
        self._actor = actor
        self._arguments = arguments
        self._count = count
        self._idle: list[Any] = []
        # The workers and their parts by the reference of their result; the part is None while a worker starts.
        self._busy: dict[Any, tuple[Any, _Part | None]] = {}
        self._deaths: Counter[_Part | None] = Counter()
        self._kinds: set[str] = set()
        for _ in range(count):
            self._start()

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        """The sums of every job, see ``Runner``.

        Raises:
            MspError: several workers died on the same part, or while they started.
        """
        waiting = deque(self._parts(jobs))
        left = set(waiting)
        found: list[dict[int, Sums]] = [{} for _ in jobs]
        while left:
            while waiting and self._idle:
                worker, part = self._idle.pop(), waiting.popleft()
                self._busy[worker.run.remote(part.job.levels, part.job.batches)] = (worker, part)
            ended, sums = self._await_one()
            if ended is None or ended not in left:
                continue  # a worker that has started, or a part of a call that failed
            if sums is None:
                waiting.appendleft(ended)
            else:
                left.remove(ended)
                found[ended.number] |= zip(ended.job.batches, sums, strict=True)
        return [summed(sums[batch] for batch in job.batches) for job, sums in zip(jobs, found, strict=True)]

    def await_worker(self) -> None:
        """Wait until the first worker has started."""
        while not self._idle:
            self._await_one()

    def close(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)

    def _parts(self, jobs: Sequence[Job]) -> Iterator[_Part]:
        size = max(1, sum(len(job.batches) for job in jobs) // (PARTS_PER_WORKER * self._count))
        for number, job in enumerate(jobs):
            for start in range(0, len(job.batches), size):
                yield _Part(number, Job(job.levels, job.batches[start : start + size]))

    def _start(self) -> None:
        worker = self._actor.remote(*self._arguments)
        self._busy[worker.kind.remote()] = (worker, None)

    def _await_one(self) -> tuple[_Part | None, Any]:
        """Wait for one worker; returns its part (None if it started) and the result (None if the worker died)."""
        (reference,), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, part = self._busy.pop(reference)
        errors = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except errors.RayTaskError as error:
            self._idle.append(worker)
            raise error.cause from error
        except errors.RayError as error:
            self._ray.kill(worker)
            self._bury(part, error)
            self._start()
            return part, None
        self._idle.append(worker)
        if part is None:
            del self._deaths[None]
            self._check_kind(result)
        return part, result

    def _bury(self, part: _Part | None, error: Exception) -> None:
        told = str(error).strip().splitlines()
        if getattr(error, "actor_init_failed", False):
            raise MspError(f"a worker cannot begin: {told[-1]}") from error
        self._deaths[part] += 1
        if self._deaths[part] == DEATHS:
            what = "before it could begin" if part is None else "on the same candidate"
            raise MspError(
                f"a worker died {what} {DEATHS} times; if memory ran out, try fewer workers or fewer fitness tokens "
                f"({told[-1].strip()})"
            ) from error

    def _check_kind(self, kind: str) -> None:
        if self._kinds and kind not in self._kinds:
            warnings.warn(
                f"workers differ ({kind}; {'; '.join(sorted(self._kinds))}): another run of the same seed may end "
                "differently",
                stacklevel=2,
            )
        self._kinds.add(kind)


@contextmanager
def ray_runner(setting: Setting, workers: Workers, progress: Progress) -> Iterator[RayRunner]:
    """Yield a runner on ``workers``, each on the kind of device that holds the model.

    Within the context the model of this process is on the CPU.

    Raises:
        MspError: Ray does not start, or has too few devices for the workers.
    """
    device = device_of(setting.model)
    # One thread, unless the user set a number: a share of the cores would change with the number of workers.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
    needs = {"num_cpus": threads} | ({"num_gpus": 1} if device.type == "cuda" else {})
    with ExitStack() as stack:
        with progress.stage("Starting workers"):
            ray = stack.enter_context(_session(workers, threads))
            stack.callback(setting.model.to, device)
            shared = _put(ray, replace(setting, model=setting.model.to("cpu")))
            runner = RayRunner(
                ray,
                ray.remote(**needs)(CandidateWorker),
                (shared, device.type, threads),
                count=_count(ray, workers, needs),
                batches=setting.reference.batches,
            )
            stack.callback(runner.close)
            runner.await_worker()
        yield runner


def prepare_environment() -> None:
    """Set the variables of ``ENVIRONMENT`` that are not set yet."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _session(workers: Workers, threads: int) -> Iterator[Any]:
    """Yield the connected Ray module.

    It uses the existing connection of this process, or the cluster of ``workers``, or a new cluster for this context.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": workers.address or "local"}
    if workers.address is None:
        options |= {"num_cpus": threads * (workers.count or 1), "include_dashboard": False}
    try:
        host, colon, port = options["address"].rpartition(":")
        if colon:  # a quick test, because Ray itself would try for a minute
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        with _own_sigterm():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises a bare Exception if its processes do not start in time
        raise MspError(f"Ray cannot be reached at {options['address']}: {first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the program's handler of SIGTERM: with Ray's own, a command would end without cleaning up."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _count(ray: Any, workers: Workers, needs: Mapping[str, int]) -> int:
    there = ray.cluster_resources()
    room = int(min(there.get(name.removeprefix("num_").upper()[:-1], 0) // each for name, each in needs.items()))
    if room < (workers.count or 1):
        wanted = ", ".join(f"{name}={each}" for name, each in needs.items())
        raise MspError(f"Ray has room for {room} workers of {wanted} each, and {workers.count or 1} are wanted")
    return workers.count or room


def _put(ray: Any, setting: Setting) -> Any:
    """The reference of ``setting`` in the object store; the workers read its tensors there without a copy."""
    kinds, code = (Tensor, nn.Parameter), _own_code(setting.compression)
    for kind in kinds:
        ray.util.register_serializer(kind, serializer=_bytes, deserializer=_tensor)
    for module in code:
        ray.cloudpickle.register_pickle_by_value(module)
    errors = ray.exceptions
    try:
        return ray.put(setting)
    except (errors.ObjectStoreFullError, errors.OutOfDiskError, OSError) as error:
        raise MspError(
            f"Ray's object store has no room for the model and its candidates: {first_line(error)}; free "
            "memory, and disk in Ray's temporary folder, or search without workers"
        ) from error
    finally:
        for kind in kinds:
            ray.util.deregister_serializer(kind)
        for module in code:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _own_code(compression: Compression) -> list[ModuleType]:
    """The modules that workers may not find on disk: the code of models that bring their own, and of a compression."""
    prefix = "transformers_modules."  # as transformers calls their package
    found = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    of_compression = type(compression).__module__
    return found if of_compression.startswith("msp.") else [*found, sys.modules[of_compression]]


def _bytes(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (
        flat.view(torch.uint8).numpy(),
        tensor.dtype,
        tuple(tensor.shape),
        isinstance(tensor, nn.Parameter),
        tensor.requires_grad,
    )


def _tensor(stored: tuple[Any, ...]) -> Tensor:
    data, dtype, shape, is_parameter, requires_grad = stored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the memory is read-only, and no code writes to it
        tensor = torch.from_numpy(data).view(dtype).reshape(shape)
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor
