"""Loads a causal LM, its tokenizer and its configuration, from a directory or a hub id."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from msp.base.finite import check_finite, named_tensors
from msp.base.outputs import QUANT_METHOD
from msp.base.reading import array, read_object, text
from msp.base.safetensors_files import (
    INDEX,
    TensorHeader,
    lfs_pointer,
    read_headers,
    read_tensor,
    split_guards,
    tensor_files,
)
from msp.errors import MspError, UsageError, first_line
from msp.formats.storage import FLOATS
from msp.models.as_loaded import StoredDtypes, check_all_taken, most_common, names_as_loaded
from msp.models.narrow import NARROW, compute_in_fp32, narrow_weights
from msp.models.quantised import (
    check_dense,
    check_float_weights,
    dense_again,
    dequantised_dtype,
    dequantising,
    method_of,
)
from msp.models.travelling import TRAVELLING, has_vocabulary, tokenizer_files
from msp.ops import check_environment


@dataclass
class LoadedModel:
    """A causal LM that is ready for use, its source, and the dtypes of its weights on disk.

    Attributes:
        tokenizer: None if the model has none.
        folder: the directory, or the snapshot of the hub, that the model was read from; None for a model object.
    """

    model: Any
    tokenizer: Any
    source: str
    stored: StoredDtypes
    folder: Path | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that most weights have on disk."""
        return self.stored.common


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    dequantise: bool = False,
    narrow: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal LM and its tokenizer from a directory or a hub id; safetensors only.

    Args:
        source: a directory, a hub id, or a packed model.
        dtype: ``auto`` computes in float32 on a CPU (16-bit matrix products are slow or inaccurate
            there) and in the dtype of most stored weights elsewhere; or ``float32``, ``bfloat16``, ``float16``.
        device: the device of the whole model. Calibration moves single blocks itself.
        dequantise: compute floats from the weights of a quantised model; without it such a model is refused.
        narrow: keep weights that are stored in 16 bits in these 16 bits if the model computes in float32 on a CPU, see
            ``msp.models.narrow``: half the memory for the same results, but a single token takes longer.
        trust_remote_code: run the Python code that comes with the model. A model whose architecture transformers lacks
            needs it.

    Raises:
        MspError: not a model, not causal, quantised, in need of its own code, or with a tokenizer that cannot be read;
            weights that are missing, in other shapes, not safetensors, or without a place in the model.
        UsageError: an unknown dtype.
    """
    path = str(source)
    check_dtype(dtype)
    config = read_causal_config(path, trust_remote_code=trust_remote_code)
    quantised = check_dense(path, config, dequantise=dequantise)
    is_packed = method_of(config) == QUANT_METHOD
    folder = local_folder(path)
    tokenizer = read_tokenizer(path, folder, trust_remote_code=trust_remote_code)
    # also for a packed model: an index may lead out of its folder, and transformers follows it
    stored = stored_headers(path, folder)
    headers = {} if is_packed else stored
    if quantised is None:
        check_float_weights(path, headers)
    common = config_dtype(config) if is_packed else most_common(headers)
    wanted = computing_dtype(config, common, dtype, device)
    options = {"dtype": wanted, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if quantised is None:
        kept = narrow_dtype(stored, wanted, device) if narrow else None
        with narrow_weights(kept):
            model, report = _load(path, **options)
        if kept is not None:
            compute_in_fp32(model)
    else:
        model, report = _load_dequantised(path, config, quantised, **options)
    _check_report(path, model, report, headers)
    if is_packed:
        tensors, _ = split_guards(stored)
        dtypes = replace(StoredDtypes.of_files(model, tensors), common=common)
    else:
        dequantised = None if quantised is None else dequantised_dtype(config)
        dtypes = StoredDtypes.of_files(model, headers, dequantised=dequantised)
        check_loaded(path, model, headers)
    return LoadedModel(model.to(device).eval(), tokenizer, path, dtypes, folder)


def check_loaded(path: str, model: Any, headers: Mapping[str, TensorHeader]) -> None:
    """Check that every tensor of a dense ``model``, whose files have ``headers``, is finite.

    Raises:
        MspError: names the first tensor that is not finite, or the dtypes that could hold it.
    """

    def stored(name: str) -> torch.Tensor | None:
        own = {name: own for own, (name, *_), renamed in names_as_loaded(model, headers) if renamed}
        return read_tensor(headers, own[name]) if name in own else None

    try:
        check_finite(named_tensors(model), stored)
    except MspError as error:
        raise MspError(f"{path}: {error}") from error


def _load(path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except MspError:
        raise
    except Exception as error:  # the loaders raise many kinds of errors
        reason = _unconverted(error) or first_line(error)
        raise MspError(f"{path}: cannot load the weights: {reason}") from error
    model, report = loaded
    return model, report


def _unconverted(error: Exception) -> str:
    """The first tensor that transformers could not convert, and the reason: its error refers to a report in the log."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        errors = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        for name, report in (errors or {}).items():
            lines = [line for line in report.splitlines() if line and not line.startswith("Error")]
            return f"{name}: {lines[-1] if lines else report}"
    return ""


def _load_dequantised(path: str, config: Any, method: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        told, left = dequantising(config)
        model, report = _load(path, config=told, **options)
        wanted = options["dtype"]
        return dense_again(model.dequantize(wanted) if left else model, wanted), report
    except Exception as error:  # every quantisation library raises its own
        reason = first_line(error).removeprefix(f"{path}: cannot load the weights: ")
        raise MspError(f"{path} is quantised ({method}) and cannot be dequantised here: {reason}") from error


def _check_report(path: str, model: Any, report: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """Raise ``MspError`` for tensors that transformers found missing, left over, or in another shape."""
    if report["mismatched_keys"]:
        name, found, needed = min(report["mismatched_keys"])
        raise MspError(
            f"{path}: cannot load the weights: {name} is stored in the shape {list(found)}, and config.json needs "
            f"{list(needed)}"
        )
    if report["missing_keys"]:
        first, *others = sorted(report["missing_keys"])
        more = f" and {len(others)} more" if others else ""
        raise MspError(f"{path}: weights are missing and would be random: {first}{more}")
    if report["unexpected_keys"]:
        shapes = {name: headers[own].shape for own, names, _ in names_as_loaded(model, headers) for name in names}
        check_all_taken(path, model, report["unexpected_keys"], shapes)


def local_folder(source: str) -> Path:
    """The folder of the files of ``source``: ``source`` itself, or the snapshot of a hub id, which is fetched first."""
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=["*.json", *TRAVELLING]))
    # A repository may also hold the weights in other formats and under other names.
    weights = [file.name for file in tensor_files(folder)] if (folder / INDEX).is_file() else ["model.safetensors"]
    return Path(snapshot_download(source, allow_patterns=weights))


def stored_headers(source: str, folder: Path) -> dict[str, TensorHeader]:
    """Shapes and dtypes of all tensors of the model ``source``, whose files are in ``folder``."""
    try:
        return read_headers(tensor_files(folder))
    except MspError as error:
        raise MspError(f"{source}: cannot load the weights: {error}") from error


def check_dtype(dtype: str) -> None:
    """Raise ``UsageError`` for a name that ``load_model`` does not take."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")


def config_dtype(config: Any) -> torch.dtype:
    """The dtype that ``config`` names; its weights may have another."""
    dtype: torch.dtype = getattr(config, "dtype", None) or torch.float32
    return dtype


def stored_dtype(source: str | Path, config: Any) -> torch.dtype:
    """The dtype of most weights of ``source``, or the one that ``config`` names if the files are not here."""
    folder = Path(source)
    if not any(folder.glob("model*.safetensors")):
        return config_dtype(config)
    return most_common(stored_headers(str(source), folder))


def stored_bytes(source: str | Path, otherwise: int) -> int:
    """Bytes of all tensors of ``source``; ``otherwise`` if the files are not here."""
    folder = Path(source)
    if not any(folder.glob("model*.safetensors")):
        return otherwise
    return sum(header.nbytes for header in stored_headers(str(source), folder).values())


def computing_dtype(config: Any, common: torch.dtype, dtype: str, device: str | torch.device) -> torch.dtype:
    """The computing dtype for ``dtype``, as ``load_model`` takes it, if most weights on disk are ``common``."""
    in_fp32 = torch.device(device).type == "cpu" and method_of(config) != QUANT_METHOD
    return DTYPES[dtype] or (torch.float32 if in_fp32 else common)


def narrow_dtype(
    headers: Mapping[str, TensorHeader], computed: torch.dtype, device: str | torch.device
) -> torch.dtype | None:
    """The dtype that weights from files with ``headers`` can keep, if the model computes in fp32 on a CPU; or None."""
    if torch.device(device).type != "cpu" or computed != torch.float32:
        return None
    dtypes = {FLOATS[header.dtype] for header in headers.values() if len(header.shape) > 1 and header.dtype in FLOATS}
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= {*NARROW} else None


def read_tokenizer(source: str, folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model ``source``, whose files are in ``folder``; None if there is none.

    Raises:
        MspError: the tokenizer cannot be read; the message has the reason.
    """
    files = tokenizer_files(folder)
    if not files:
        return None
    for file in files:
        if reason := lfs_pointer(file):
            raise MspError(f"{source}: the tokenizer cannot be read: {file.name} is {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except BaseException as error:  # from transformers, tokenizers, sentencepiece, tiktoken, or the model's own code
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's panic
            raise
        if _wants_trust(error):
            raise MspError(_needs_code(source, "tokenizer")) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if not has_vocabulary(folder):
            reason = f"there are settings ({files[0].name}), but no file with a vocabulary"
        elif any(file.suffix == ".model" for file in files) and find_spec("sentencepiece") is None:
            reason = f"it may need sentencepiece, which is not installed: {reason}"
        raise MspError(f"{source}: the tokenizer cannot be read: {reason}") from error
    if not has_vocabulary(folder, tokenizer):
        wanted = " or ".join(dict.fromkeys(tokenizer.vocab_files_names.values()))
        raise MspError(f"{source}: the tokenizer cannot be read: there are settings ({files[0].name}), but no {wanted}")
    return tokenizer


def read_config(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, from a directory or the hub.

    Raises:
        MspError: no configuration can be read, or it needs code of the model's own that is not trusted.
    """
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        if (Path(source) / "adapter_config.json").is_file():
            raise MspError(f"{source} is an adapter, not a model: merge it into its model, with merge_and_unload()")
        raise MspError(f"{source} is not a model: it has no config.json")
    if Path(source).is_dir():
        read_object(Path(source) / "config.json", foreign=True)  # transformers checks less
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the model's own code may raise any kind
        if _wants_trust(error):
            raise MspError(_needs_code(source, "model")) from error
        raise MspError(f"{source} is not a model that transformers can read: {first_line(error)}") from error
    for name in array(config.architectures or [], f"{source}: config.json: architectures"):
        text(name, f"{source}: config.json: architectures")
    return config


def read_causal_config(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """``read_config`` of a causal LM; ``MspError`` for any other model."""
    config = read_config(source, trust_remote_code=trust_remote_code)
    if not is_causal(config, trust_remote_code):
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and not trust_remote_code:
            raise MspError(_needs_code(source, "model"))
        raise MspError(f"{source} is a {config.model_type} model, which is not a causal language model")
    return config


def is_causal(config: Any, trust_remote_code: bool = False) -> bool:
    """Whether transformers, or the model's own code if it is trusted, has a causal LM for ``config``."""
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return own or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and _names_causal_lm(config.architectures))


def make_skeleton(config: Any, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """A causal LM with the shapes of ``config`` and no weights; their dtype is that of ``config`` or another."""
    if not is_causal(config, trust_remote_code):
        raise MspError(f"a {config.model_type} model is not a causal language model")
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(
            config, trust_remote_code=trust_remote_code, **({} if dtype is None else {"dtype": dtype})
        )


def _needs_code(source: str | Path, what: str) -> str:
    return (
        f"the {what} of {source} is Python code that comes with it, and is not run: read it, and if you trust it, say "
        "so (trust_remote_code, --trust-remote-code)"
    )


def config_entries(source: str | Path) -> dict[str, Any]:
    """The content of a model's ``config.json``, for any architecture; empty if it cannot be read."""
    try:
        if Path(source).is_dir():
            return read_object(Path(source) / "config.json", foreign=True)
        return PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError, RecursionError):
        return {}


def _wants_trust(error: BaseException) -> bool:
    """Whether transformers refused to run code that comes with the model: its error then names its argument for it."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def _names_causal_lm(architectures: list[str] | None) -> bool:
    """Whether the ``architectures`` of a config, if it has any, name a causal LM.

    An encoder (``BertForMaskedLM``) has a causal class too, but attends to both sides under it.
    """
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(names)}
    return not architectures or any(name in known or name.endswith("ForCausalLM") for name in architectures)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda:1`` or the like; ``auto`` is a GPU if there is one.

    Raises:
        UsageError: torch does not recognise or find the device, or the environment excludes it.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"device {name!r} is not known to torch") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device cuda was asked for, but torch sees no GPU")
    check_environment(device.type)
    return device
