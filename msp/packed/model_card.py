"""The README.md of a packed model: what it is, how large, how it was made, how to load it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp.base.reading import read_object
from msp.packed.auto_map import FILE as LOADER_FILE
from msp.packed.auto_map import is_loader

if TYPE_CHECKING:
    from msp.packed.info import PackedInfo

# What the recipe says about the making, in the order a reader asks; keys that a recipe lacks are left out.
MADE_WITH = (
    ("model", "Dense model"),
    ("sparsity", "Sparsity asked for"),
    ("group_size", "Group size M"),
    ("allocator", "Allocator"),
    ("pruner", "Pruner"),
    ("unit", "Unit of allocation"),
    ("seed", "Seed"),
    ("calibration", "Calibration"),
)
# Recipe keys with a section of their own, or that only a program reads.
TOLD_ELSEWHERE = {"perplexity", "kl", "bytes", "versions", "allocation", "format"}


def model_card(info: PackedInfo) -> str:
    """Markdown with the YAML front matter that model hubs read; works from whatever the recipe has."""
    sections = [
        _front_matter(info.recipe.get("model")),
        f"# {_title(info)}\n\n{_summary(info)}",
        _loading(info) + (f"\n\n{WITHOUT_IMPORT}" if (info.path / LOADER_FILE).is_file() else ""),
        f"## Size\n\n{_sizes(info)}",
        f"## Patterns\n\n{_patterns(info)}",
        *_results(info),
    ]
    return "\n\n".join(sections) + "\n"


def dense_card(info: PackedInfo) -> str:
    """The same for a packed model that was written as a dense one: it loads without msp."""
    about = (
        "The zeros are stored here, in plain dense tensors: this is the packed model in the form that every program "
        "loads, and takes as many bytes as the dense model."
    )
    sections = [_front_matter(info.recipe.get("model")), f"# {_title(info)}\n\n{_summary(info, 'are zero')}\n\n{about}"]
    return "\n\n".join([*sections, f"## Patterns\n\n{_patterns(info, where=False)}", *_results(info)]) + "\n"


def _results(info: PackedInfo) -> Iterator[str]:
    recipe = info.recipe
    measured = list(_measured(recipe))
    if measured:
        yield "## Measured\n\n" + _table(("Measure", "Value"), measured)
    told = {**recipe, "model": _source(recipe.get("model"))}
    made = [(label, told.get(key)) for key, label in MADE_WITH]
    known = {key for key, _ in MADE_WITH} | TOLD_ELSEWHERE
    made += [(key.replace("_", " ").capitalize(), value) for key, value in told.items() if key not in known]
    made += [(f"{library} version", version) for library, version in info.manifest.versions.items()]
    rows = [(label, _plain(value)) for label, value in made if value not in (None, {}, [])]
    yield "## How it was made\n\n" + _table(("", ""), rows)


LOADING = """## Loading

```python
import msp  # registers the packed format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_HUB_ID", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID")
```

Without `import msp` transformers does not know the format and stops: the `weight` of each packed layer has size 0 in
the files."""

WITHOUT_IMPORT = """A program that does not import msp, such as lm-eval, loads the model with `trust_remote_code=True`.
transformers then runs `load_with_msp.py`, which imports msp; msp must be installed:

```python
from transformers import pipeline

print(pipeline("text-generation", "PATH_OR_HUB_ID", trust_remote_code=True)("Once upon a time"))
```"""


def _loading(info: PackedInfo) -> str:
    config = read_object(info.path / "config.json", foreign=True)
    if all(map(is_loader, (config.get("auto_map") or {}).values())):
        return LOADING
    trusting = LOADING.replace('"PATH_OR_HUB_ID"', '"PATH_OR_HUB_ID", trust_remote_code=True')
    return f"{trusting}\n\nThe model is Python code in this folder. `trust_remote_code` runs it: read it first."


def _source(model: object) -> str | None:
    """The dense model's hub id, or of a path only the last part: the rest is nobody's business."""
    if not isinstance(model, str) or not model:
        return None
    return model if _is_hub_id(model) else Path(model).name


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).exists()


def _front_matter(model: object) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- msp", "- nm-sparsity"]
    if isinstance(model, str) and _is_hub_id(model):
        lines.append(f"base_model: {json.dumps(model)}")  # a JSON string is a YAML string
    return "\n".join([*lines, "---"])


def _title(info: PackedInfo) -> str:
    # Not the folder's name: the same model is the same file wherever it is written.
    model = (_source(info.recipe.get("model")) or "A model").rpartition("/")[-1]
    return f"{model}, {_sparsity(info):.1%} pruned"


def _sparsity(info: PackedInfo) -> float:
    return 1 - info.kept / info.weights if info.weights else 0.0


def _summary(info: PackedInfo, fate: str = "are zero and are not stored") -> str:
    model = _source(info.recipe.get("model"))
    source = f" of `{model}`" if model else ""
    return (
        f"An N:M sparse version{source}: {_sparsity(info):.1%} of the weights of its {len(info.linears)} linear layers "
        f"{fate}. A pattern `N:M` keeps N of every M consecutive weights of a row."
    )


def _sizes(info: PackedInfo) -> str:
    total, dense_total = info.packed_bytes + info.other_bytes, info.dense_bytes + info.other_bytes
    rows = [
        ("Linear layers", info.packed_bytes, info.dense_bytes),
        ("Everything else", info.other_bytes, info.other_bytes),
        ("All tensors", total, dense_total),
    ]
    body = [(label, f"{packed:,}", f"{dense:,}", f"{dense / max(packed, 1):.2f}x") for label, packed, dense in rows]
    return _table(("Bytes", "This model", "Dense, same dtype", "Smaller by"), body)


def _patterns(info: PackedInfo, where: bool = True) -> str:
    counts = Counter(linear.storage for linear in info.linears)
    weights: Counter[Any] = Counter()
    for linear in info.linears:
        weights[linear.storage] += linear.shape[0] * linear.shape[1]
    body = [
        (str(storage), str(counts[storage]), f"{weights[storage] / max(info.weights, 1):.1%}")
        for storage in sorted(counts, key=lambda storage: storage.order)
    ]
    table = _table(("Pattern", "Linears", "Share of the weights"), body)
    return table + ("\n\nThe pattern of every layer is in `config.json`." if where else "")


def _measured(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, label in (("perplexity", "Perplexity"), ("kl", "KL to the dense model")):
        value = recipe.get(key)
        if isinstance(value, Mapping):
            for part, figure in value.items():
                yield f"{label}: {str(part).replace('_', ' ')}", _plain(figure)
        elif value is not None:
            yield label, _plain(value)


def _plain(value: object) -> str:
    """A value as a reader wants it: nested tables flattened, floats short."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *map(line, rows)])
