"""A loss of the user's own as fitness."""

import math
import pickle
from pathlib import Path

import pytest
from families import SMALL, VOCABULARY, build, tokens
from torch import Tensor, nn

import msp
from msp.errors import MspError, UsageError
from msp.evidence.evaluate import perplexity
from msp.evidence.task_loss import TaskReference, fitness_name, load_task_loss

OPTIONS = {**SMALL, "fitness_tokens": 128}


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """What perplexity is made of."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="sum")


def last_token(logits: Tensor, tokens: Tensor) -> float:
    """Only what follows the last but one token counts."""
    return -float(logits[:, -2].log_softmax(-1).gather(1, tokens[:, -1:]).sum())


def every_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :, 0]


class Weighted:
    """A callable that is no function."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return self.weight * next_token(logits, tokens)


NOT_CALLABLE = 3


def test_sums_add_up_over_batches() -> None:
    model, windows = build("llama"), tokens(7, 9, seed=1, vocabulary=VOCABULARY)
    reference = TaskReference(windows, next_token, batch_size=3)
    assert reference.batches == 3
    parts = [reference.sums(model, [batch]) for batch in range(3)]
    whole = reference.sums(model, range(3))
    assert sum(part.loss for part in parts) == pytest.approx(whole.loss)
    assert (whole.predicted, whole.tokens) == (7 * 8, 7 * 9)
    assert math.exp(whole.loss / whole.predicted) == pytest.approx(perplexity(model, windows).perplexity, rel=1e-5)
    assert pickle.loads(pickle.dumps(reference)).sums(model, range(3)) == whole


@pytest.mark.parametrize("fitness", [next_token, f"{__name__}:next_token"])
def test_the_loss_of_perplexity_gives_the_search_by_perplexity(fitness, llama: Path, text: str) -> None:
    options = {"sparsity": 0.6, "calibration": text, "evaluations": 48, **OPTIONS}
    want = msp.search(llama, fitness="perplexity", **options)
    found = msp.search(llama, fitness=fitness, **options)
    assert found.allocation == want.allocation
    assert [step["best"] for step in found.history] == pytest.approx([step["best"] for step in want.history], rel=1e-5)
    assert found.recipe["fitness"] == f"{__name__}:next_token"


def test_another_loss_is_minimised(llama: Path, text: str) -> None:
    options = {"sparsity": 0.6, "calibration": text, "evaluations": 160, **OPTIONS}
    found, other = (msp.search(llama, fitness=loss, **options) for loss in (last_token, "perplexity"))
    assert found.allocation != other.allocation
    assert found.history[-1]["best"] < found.history[0]["best"]


def test_a_search_with_another_loss_is_another_search(llama: Path, text: str, tmp_path: Path) -> None:
    options = {"sparsity": 0.6, "calibration": text, "evaluations": 16, "work_dir": tmp_path, **OPTIONS}
    msp.search(llama, fitness=next_token, **options)
    msp.search(llama, fitness=f"{__name__}:next_token", resume=True, **options)
    with pytest.raises(MspError, match="another search"):
        msp.search(llama, fitness=last_token, resume=True, **options)


def test_comparisons_minimise_it_too(llama: Path, text: str) -> None:
    result = msp.compare(
        llama,
        sparsity=0.6,
        allocators=["msp"],
        seeds=[0],
        fitness=Weighted(2.0),
        calibration=text,
        evaluations=16,
        **OPTIONS,
    )
    assert result.settings["fitness"] == f"{__name__}:Weighted"
    assert len(result.rows[0].history) == 2


def test_a_loss_that_is_no_number_is_named(llama: Path, text: str) -> None:
    with pytest.raises(MspError, match=r"every_token: .*element"):
        msp.search(llama, sparsity=0.6, fitness=every_token, calibration=text, **OPTIONS)


def test_names() -> None:
    assert fitness_name("kl") == "kl"
    assert fitness_name(next_token) == f"{__name__}:next_token"
    assert fitness_name(Weighted(1.0)) == f"{__name__}:Weighted"
    assert load_task_loss(f"{__name__}:next_token") is next_token


@pytest.mark.parametrize(
    ("fitness", "message"),
    [
        ("no_such_module_at_all:loss", "No module named"),
        ("math:no_such_function", "no attribute"),
        (f"{__name__}:NOT_CALLABLE", "is a int, not a function"),
        ("math:", "attribute"),
        (":loss", "Empty module name"),
        ("accuracy", "kl, perplexity nor module:function"),
    ],
)
def test_a_wrong_name_is_refused(fitness: str, message: str, llama: Path) -> None:
    with pytest.raises(UsageError, match=message):
        msp.prune(llama, sparsity=0.5, fitness=fitness)
