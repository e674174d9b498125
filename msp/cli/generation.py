"""Lets a model continue a text, and times it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from msp.base.progress import Advance
from msp.errors import MspError, UsageError
from msp.models.loading import load_model
from msp.models.structure import device_of
from msp.ops import check_environment
from msp.packed.sparse_linear import fast_decode


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt. ``seconds`` covers everything after the prompt was read in."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: the first token, which reads the prompt, does not count."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class _Watch(StoppingCriteria):
    """Never stops; tells how far generation is, and when the first token came."""

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


def complete(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    dequantise: bool = False,
    trust_remote_code: bool = False,
    on_token: Advance | None = None,
) -> Completion:
    """Load ``model`` (dense or packed) and let it continue ``prompt``.

    Args:
        temperature: 0 takes the likeliest token every time.

    Raises:
        MspError: the model has no tokenizer, or the prompt leaves no room in its context.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_environment(torch.device(device).type)
    loaded = load_model(model, dtype=dtype, device=device, dequantise=dequantise, trust_remote_code=trust_remote_code)
    if loaded.tokenizer is None:
        raise MspError(f"{model} has no tokenizer to read a prompt with")
    fast_decode(loaded.model)
    return continue_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
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
    """What ``complete`` does, with a model that is loaded already."""
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
