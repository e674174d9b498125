"""The options of ``recover``, declared as those of the other verbs are in ``msp.session.arguments``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msp.session.arguments import SOURCE_HELP, WINDOW, Placing
from msp.session.declarations import COST, DATA, RUN, Option

if TYPE_CHECKING:
    from msp.recovery import Recovery
else:  # the command line evaluates the types, and imports no torch for that
    Recovery = object


class RecoverArguments(Placing, total=False):
    """The options of ``recover``."""

    method: Annotated[
        str | Recovery,
        Option(
            "What is trained: **distil** trains all kept values, norms and biases end to end; **blockwise** does so "
            "one block at a time; **norms** trains norms and biases only.",
            "distil",
            metavar="distil|blockwise|norms",
        ),
    ]
    learning_rate: Annotated[
        float | None,
        Option("The highest learning rate of AdamW. Without it: that of the method, 1e-3.", kind=float, metavar="RATE"),
    ]
    kl_weight: Annotated[
        float | None,
        Option(
            "Weight of the divergence from the dense model in the loss; the cross-entropy of the text has the rest. "
            "Without it: 2/3.",
            kind=float,
            metavar="SHARE",
        ),
    ]
    calibration: Annotated[
        str | None,
        Option(f"Text to train on: {SOURCE_HELP}. Without it: C4 from the hub.", heading=DATA, metavar="SRC"),
    ]
    evaluate: Annotated[
        str | None,
        Option(
            "Text for the final figures; the training never uses it. Without it: tokens held out of the training text.",
            heading=DATA,
            metavar="SRC",
        ),
    ]
    window: Annotated[int | None, WINDOW]
    tokens: Annotated[
        int | str,
        Option(
            "Tokens to train on, like 500k or 2M. With blockwise, each block trains on this number.",
            "2M",
            heading=COST,
            metavar="TOKENS",
        ),
    ]
    epochs: Annotated[
        int,
        Option(
            "Passes over the training text. --tokens counts all passes, so the text needs only a part of them.",
            1,
            int,
            heading=COST,
            metavar="COUNT",
        ),
    ]
    batch_tokens: Annotated[int, Option("Tokens for one step of AdamW.", 2048, int, heading=COST, metavar="TOKENS")]
    forward_tokens: Annotated[
        int,
        Option(
            "The most tokens in one forward. A smaller number takes less memory, and gradients are added up.",
            2048,
            int,
            heading=COST,
            metavar="TOKENS",
        ),
    ]
    held_out_tokens: Annotated[
        int,
        Option(
            "Tokens of the training text that are held out. Their loss decides which values are kept.",
            16_384,
            int,
            heading=COST,
            metavar="TOKENS",
        ),
    ]
    measurements: Annotated[
        int,
        Option(
            "How often the held-out loss is measured, evenly over the steps.", 10, int, heading=COST, metavar="COUNT"
        ),
    ]
    test_tokens: Annotated[int, Option("Tokens for the final figures.", 32_768, int, heading=COST, metavar="TOKENS")]
    hidden_bytes: Annotated[
        int | str,
        Option(
            "Memory for the hidden states of blockwise, like 4GB; further states go to temporary files.",
            "4GB",
            heading=RUN,
            metavar="BYTES",
        ),
    ]
    seed: Annotated[int, Option("Seed of the order of the training text.", 0, int, heading=RUN)]
    resume: Annotated[
        bool,
        Option(
            "Continue the training of an earlier, interrupted run. msp refuses a run with other weights, text or "
            "options, and the message names the differences.",
            False,
            bool,
            heading=RUN,
        ),
    ]
    work_dir: Annotated[
        str | Path | None,
        Option(
            "Folder for the checkpoints of the training.",
            kind=Path,
            heading=RUN,
            metavar="DIR",
            aside="Without it: a folder next to OUT.",
        ),
    ]
