"""Measure a model, dense or packed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.base.finite import check_figures
from msp.base.host_memory import give_back
from msp.base.progress import NoProgress, Progress
from msp.base.readable import dtype_name
from msp.errors import MspError
from msp.evidence.evaluate import DenseReference, perplexity
from msp.models.loading import (
    check_dtype,
    find_device,
    load_model,
    local_folder,
    make_skeleton,
    read_causal_config,
    read_tokenizer,
)
from msp.models.narrow import computed_dtype
from msp.models.text_forward import run_text
from msp.session.arguments import EvaluateArguments
from msp.session.declarations import completed, documented
from msp.session.opened import vocabulary_size, window_of
from msp.session.results import EvaluateResult
from msp.session.workbench import batch_size
from msp.text.token_sets import DEFAULT_EVALUATION, TokenSource, read_windows

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(EvaluateArguments)
def evaluate(
    model: str | Path, *, progress: Progress | None = None, **arguments: Unpack[EvaluateArguments]
) -> EvaluateResult:
    """The perplexity of a dense or packed model on a text, and its KL to a dense ``reference`` if one is given.

    Both models compute in the same dtype, because another dtype would change the figures too. On a CPU ``auto`` is
    float32, also for a packed model. On other devices it is the stored dtype of the reference or, without a reference,
    of the model. One model at a time is in memory.

    Args:
        model: a directory or a hub id.
        progress: the progress display.
        arguments: the options that are listed below.

    Raises:
        UsageError: the window is longer than the model's context, or the dtype or the device is unknown.
        MspError: the model is absent, the text cannot be used, or the reference has another vocabulary.
    """
    asked, listener = completed(arguments, EvaluateArguments), progress or NoProgress()
    source, reference = asked["evaluate"] or DEFAULT_EVALUATION, asked["reference"]
    TokenSource.parse(source).check()
    place, dtype = find_device(asked["device"]), asked["dtype"]
    check_dtype(dtype)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    trust: dict[str, Any] = {"trust_remote_code": asked["trust_remote_code"]}
    loading = {"device": place, "dequantise": asked["dequantise"], "narrow": True, **trust}
    skeletons = [make_skeleton(read_causal_config(each, **trust), **trust) for each in (model, reference) if each]
    vocabulary, window = vocabulary_size(skeletons[0]), window_of(skeletons[0], asked["window"])
    if vocabulary_size(skeletons[-1]) != vocabulary:
        raise MspError(f"{reference} has another vocabulary than {model}: their predictions do not compare")
    tokenizer = read_tokenizer(str(model), local_folder(str(model)), **trust)
    windows = read_windows(source, tokenizer, vocabulary, window=window, tokens=asked["test_tokens"])
    size = batch_size(place, window)
    dense = None
    if reference is not None:
        loaded = load_model(reference, dtype=dtype, **loading)
        dtype = dtype_name(computed_dtype(loaded.model))
        with run_text(loaded.model, ()).changes.steady(loaded.model):
            dense = DenseReference(loaded.model, windows, batch_size=size, progress=listener)
        del loaded
        gc.collect()  # modules refer to each other, so reference counts do not free them
        give_back()
    measured = load_model(model, dtype=dtype, **loading).model
    with run_text(measured, ()).changes.steady(measured):
        if dense is None:
            quality = perplexity(measured, windows, batch_size=size, progress=listener)
        else:
            quality = dense.measure(measured, progress=listener)
            check_figures({"perplexity": quality.perplexity, "KL": quality.kl}, measured, dense.tokens(0))
    return EvaluateResult(
        model=str(model),
        perplexity=quality.perplexity,
        kl=None if dense is None else quality.kl,
        reference=None if reference is None else str(reference),
        evaluate=source,
        window=window,
        tokens=windows.numel(),
        dtype=dtype_name(computed_dtype(measured)),
    )
