"""Candidates on several workers, each with the model in a process of its own, through Ray.

Ray is imported only when a runner is opened. Workers get the model, the rank codes and the dense predictions from
Ray's object store: on one machine, all read the same memory.
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

from msp.errors import MspError, UsageError, first_line
from msp.evaluate import Sums, summed
from msp.model import device_of
from msp.progress import Progress
from msp.search.candidates import forward_in_bf16
from msp.search.fitness import Job, Key
from msp.search.runners import Setting, open_runner

# So many parts of a call to a worker at least, where there are batches enough: all are done at about the same time.
PARTS_PER_WORKER = 4
# A part that has cost so many workers their lives is not tried again.
DEATHS = 3
# Read when Ray is imported and started. Nothing is sent anywhere, warnings meant for Ray's developers are not shown,
# workers are no nicer than this process (Ray's niceness of 15 gets nothing done beside other work), and all may take
# long to start or to answer.
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
    """How many workers run candidates, and where.

    Attributes:
        count: without it one for every GPU of the cluster, or CPU where the model is on one.
        address: of a Ray cluster (``auto`` or ``host:port``); without it Ray is started here and ended afterwards.

    Raises:
        UsageError: a count below 1, neither of the two, an address with no port, or Ray is not installed.
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
                raise UsageError(f"the address of a cluster is auto or host:port, and {port[:20]!r} is no port")
        if importlib.util.find_spec("ray") is None:
            raise UsageError("workers need the ray library: pip install 'mixed-sparsity-pruning[ray]'")


@dataclass(frozen=True)
class _Part:
    """Some batches of a job, by the job's number in the call."""

    number: int
    job: Job


class CandidateWorker:
    """A Ray actor: holds the model once and runs candidates on it.

    Args:
        setting: shared with the other workers of the machine and only read.
        device: ``cpu``, or ``cuda`` for the GPU that Ray gave this process.
        threads: of torch. Results may depend on it, so it is the same for any number of workers.
    """

    def __init__(self, setting: Setting, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = setting.model.to(device)
        ranks: Any = {name: _to(device, own) for name, own in setting.ranks.items()}
        self._opened = open_runner(replace(setting, ranks=ranks))
        self._runner = self._opened.__enter__()

    def kind(self) -> str:
        """What equal results depend on beside the job."""
        on_gpu = device_of(self._model).type == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
        return f"{device}, torch {torch.__version__}{', bf16 products' if forward_in_bf16(self._model) else ''}"

    def run(self, levels: Key, batches: Sequence[int]) -> list[Sums]:
        """The sums of every single batch, for the driver to add up in one order."""
        return self._runner.run([Job(levels, (batch,)) for batch in batches])


class RayRunner:
    """Hands parts of jobs to whichever worker is free, and adds their results up in the order of the batches.

    So neither the number of workers nor the order in which they finish changes a result. A worker that dies is
    replaced, and what it had not finished is run again.

    Args:
        ray: the module, connected.
        actor: makes a worker by ``actor.remote(*arguments)``.
        batches: of the fitness tokens.
    """

    def __init__(self, ray: Any, actor: Any, arguments: Sequence[Any], count: int, batches: int) -> None:
        self.batches = batches
        self._ray = ray
        self._actor = actor
        self._arguments = arguments
        self._count = count
        self._idle: list[Any] = []
        # By the reference of what they will return: workers and what they run, None while they start.
        self._busy: dict[Any, tuple[Any, _Part | None]] = {}
        self._deaths: Counter[_Part | None] = Counter()
        self._kinds: set[str] = set()
        for _ in range(count):
            self._start()

    def run(self, jobs: Sequence[Job]) -> list[Sums]:
        """See ``Runner``.

        Raises:
            MspError: workers die again and again, on the same part or before they have begun.
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
        """Until the first worker can run something."""
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
        """What a worker ran (None: it started) and the result, None if it died over it."""
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


def _to(device: str, own: Any) -> Any:
    """Rank codes of one linear, or its packed weights, on ``device``."""
    return type(own)({key: codes.to(device) for key, codes in own.items()})


@contextmanager
def ray_runner(setting: Setting, workers: Workers, progress: Progress) -> Iterator[RayRunner]:
    """A runner on ``workers``, each on a device of the kind the model is on; meanwhile this process has it on the CPU.

    Raises:
        MspError: Ray does not start, or has fewer devices than workers are asked for.
    """
    device = device_of(setting.model)
    # Only an explicit wish is heard: a share of the cores would change with the number of workers.
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
    """Set what of ``ENVIRONMENT`` is not set yet."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _session(workers: Workers, threads: int) -> Iterator[Any]:
    """Ray, connected: where this process already is, to the cluster asked for, or to one that lives as long as this."""
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
        if colon:  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        with _own_sigterm():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # bare ones too, where its processes do not come up in time
        raise MspError(f"Ray cannot be reached at {options['address']}: {first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts its own handler in the place of the program's: a command then ends without having cleaned up."""
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
    """The reference of ``setting`` in the object store, its tensors such that workers read them where they are."""
    kinds, code = (Tensor, nn.Parameter), _own_code()
    for kind in kinds:
        ray.util.register_serializer(kind, serializer=_bytes, deserializer=_tensor)
    for module in code:
        ray.cloudpickle.register_pickle_by_value(module)
    errors = ray.exceptions
    try:
        return ray.put(setting)
    except (errors.ObjectStoreFullError, errors.OutOfDiskError, OSError) as error:
        raise MspError(
            f"Ray's object store has no room for the model and its rank codes: {first_line(error)}; free memory, and "
            "disk in Ray's temporary folder, or search without workers"
        ) from error
    finally:
        for kind in kinds:
            ray.util.deregister_serializer(kind)
        for module in code:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _own_code() -> list[ModuleType]:
    """The modules of models that brought their code: workers cannot import what only this process has fetched."""
    prefix = "transformers_modules."  # as transformers calls their package
    return [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]


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
        warnings.simplefilter("ignore")  # that the memory is not to be written to, which nobody does
        tensor = torch.from_numpy(data).view(dtype).reshape(shape)
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor
