"""Let a model continue a text, and time it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from msp.base.progress import Advance
from msp.errors import MspError, UsageError
from msp.models.loading import find_device, load_model
from msp.models.structure import device_of
from msp.ops import check_environment
from msp.packed.sparse_linear import fast_decode
from msp.session.arguments import GenerateArguments
from msp.session.declarations import completed, documented
from msp.text.token_sets import check_seed

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt. ``seconds`` runs from the first token to the last one."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed without the first token, which reads the prompt."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class _Watch(StoppingCriteria):
    """Never stops; reports the progress of the generation, and records the time of the first token."""

    def __init__(self, on_token: Advance | None) -> None:
        self._on_token = on_token
        self.done = 0
        self.first = self.last = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.last = time.perf_counter()
        self.first = self.first if self.done else self.last
        self.done += 1
        if self._on_token is not None:
            self._on_token(self.done)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@documented(GenerateArguments)
def generate(
    model: str | Path,
    prompt: str,
    *,
    on_token: Advance | None = None,
    **arguments: Unpack[GenerateArguments],
) -> Completion:
    """Load ``model`` (dense or packed) and let it continue ``prompt``.

    Args:
        model: a directory or a hub id.
        prompt: the text to continue.
        on_token: called with the number of tokens so far, after each one.
        arguments: the options that are listed below.

    Raises:
        UsageError: an option is out of range.
        MspError: the model has no tokenizer, or the prompt leaves no room in its context.
    """
    asked = completed(arguments, GenerateArguments)
    if asked["max_new_tokens"] < 1:
        raise UsageError(f"{asked['max_new_tokens']} new tokens: at least one is generated")
    if not asked["temperature"] >= 0:
        raise UsageError(f"temperature {asked['temperature']:g} is below 0")
    check_seed(asked["seed"])
    device = find_device(asked["device"])
    check_environment(device.type)
    loading = {name: asked[name] for name in ("dtype", "dequantise", "trust_remote_code")}
    loaded = load_model(model, device=device, **loading)
    if loaded.tokenizer is None:
        raise MspError(f"{model} has no tokenizer to read a prompt with")
    fast_decode(loaded.model)
    return continue_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens=asked["max_new_tokens"],
        temperature=asked["temperature"],
        seed=asked["seed"],
        on_token=on_token,
    )


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Advance | None = None,
) -> Completion:
    """``generate`` with a model that is loaded already."""
    ids = tokenizer(prompt)["input_ids"]
    start = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    ids = ids or start[:1]
    if not ids:
        raise UsageError("an empty prompt, and the tokenizer has no token to start a text with")
    context = getattr(model.config, "max_position_embeddings", None)
    room = context - len(ids) if context else max_new_tokens
    if room < 1:
        raise MspError(f"the prompt has {len(ids)} tokens and fills the model's context of {context}")
    watch = _Watch(on_token)
    inputs = torch.tensor([ids], device=device_of(model))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(room, max_new_tokens),
            stopping_criteria=[watch],
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else start[-1] if start else 0,
            **sampling,
        )
    new = output[0, len(ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Completion(prompt, text, len(new), watch.last - watch.first)
