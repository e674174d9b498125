"""The identity of a result: the inputs that it depends on, in a form that two runs can compare.

An identity maps nouns to short texts: ``seed`` to ``0``, ``weights`` to the hash of all bytes of all weights. Every
file that is kept between runs has an identity, and only a run with the same identity uses it again.
"""

from __future__ import annotations

import inspect
import json
import marshal
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor

from msp import __version__

Identity = Mapping[str, str]

# The prefix of a hash. A message does not show hashes, only that they differ.
HASH = "xxh3:"
# Entries of a configuration that do not change a forward, or that the hash of the weights covers.
NOT_IN_A_FORWARD = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
}


def hashed(data: Any) -> str:
    """The hash of bytes, of text, or of a tensor: its dtype, its shape and its bytes.

    The hash is fast and not cryptographic; docs/reliability.md has its speed.
    """
    state = xxhash.xxh3_128()
    if isinstance(data, Tensor):
        state.update(f"{data.dtype} {list(data.shape)} ".encode())
        data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    state.update(data.encode() if isinstance(data, str) else data)
    return HASH + state.hexdigest()


def hashed_data(data: Any) -> str:
    """The hash of JSON-like data. The order of mappings does not count; other objects count as their ``str``."""
    return hashed(json.dumps(data, sort_keys=True, default=str))


def hashed_tensors(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The hash of every tensor by name; a tensor with several names is read once."""
    distinct = {id(tensor): tensor for tensor in tensors.values()}
    hashes = {key: hashed(tensor if isinstance(tensor, Tensor) else repr(tensor)) for key, tensor in distinct.items()}
    return {name: hashes[id(tensor)] for name, tensor in tensors.items()}


def hashed_code(thing: Any) -> str:
    """The hash of the code and the state of a function, class or object.

    It covers the source of the whole module, because the code may call other functions of the module. It also covers
    the byte code, default arguments, variables of enclosing functions, and the pickled state of an object. Imports are
    not followed. State that cannot be pickled counts as its ``repr``; if the ``repr`` contains an address, the hash
    differs in each process.
    """
    owner = thing if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing)
    try:
        source = inspect.getsource(sys.modules[owner.__module__])
    except (OSError, TypeError, KeyError):  # typed at a prompt, or built in
        source = ""
    parts = [f"{owner.__module__}.{owner.__qualname__}", source]
    function = inspect.unwrap(thing) if inspect.isfunction(thing) else getattr(thing, "__func__", None)
    if function is not None:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        parts += [_code(function.__code__), _pickled([function.__defaults__, function.__kwdefaults__, cells])]
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        parts.append(_pickled(getattr(thing, "__self__", thing)))
    return hashed_data(parts)


def _code(code: Any) -> str:
    # The hash leaves out the path of the file and the line numbers.
    constants = [_code(each) if inspect.iscode(each) else repr(each) for each in code.co_consts]
    return hashed_data([hashed(code.co_code), constants, list(code.co_names), hashed(marshal.dumps(code.co_varnames))])


def _pickled(state: Any) -> str:
    try:
        return hashed(pickle.dumps(state))
    except Exception:  # any error of a class that cannot be pickled
        return repr(state)


def hashed_config(config: Any) -> str:
    """The hash of the entries of a model's configuration that a forward uses."""
    entries = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_A_FORWARD}
    return hashed_data([entries, getattr(config, "_attn_implementation", None)])


def environment(device: torch.device) -> Identity:
    """The processor and the libraries; equal inputs give equal bits if both are the same."""
    on_gpu = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_gpu else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    libraries = f"msp {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {"processor": processor, "libraries": libraries}


def differences(own: Identity, found: Mapping[str, Any], *, partial: bool = False) -> list[str]:
    """The differences between ``own`` and ``found``, the stored identity of an earlier run.

    Each is a phrase for a message: ``the weights differ``, ``seed 1, was 0``.

    Args:
        own: the identity of this run.
        found: the identity of the earlier run.
        partial: ``own`` is not complete yet, so entries that only ``found`` has do not count.
    """
    told = []
    for name in [*own, *(() if partial else (name for name in found if name not in own))]:
        now, before = own.get(name), found.get(name)
        if now != before:
            shown = isinstance(now, str) and isinstance(before, str) and not (now + before).count(HASH)
            told.append(f"{name} {now}, was {before}" if shown else f"the {name} differ")
    return told
