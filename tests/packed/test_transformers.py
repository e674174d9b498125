"""Packed models through transformers: every family there and back, and every corruption refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    build,
    pack,
    packed_model,
    same_state,
    save,
    shared_model,
    tokenizer,
    tokens,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)
from transformers.utils import logging

from msp.errors import MspError, UsageError
from msp.formats.patterns import NMPattern
from msp.models.loading import load_model
from msp.ops import force_backend
from msp.packed.checkpoint import replace_linears, save_packed
from msp.packed.hf_quantizer import MspConfig
from msp.packed.info import read_info, validate_packed
from msp.packed.sparse_linear import SparseLinear, storages_of


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), force_backend("reference"):
        found = model(ids).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back(family: str, seed: int, tmp_path: Path) -> None:
    """Masked dense, packed in memory, loaded, saved by transformers and loaded again: one set of logits."""
    model = build(family, seed)
    ids = tokens(2, 24, seed)
    untouched = logits(model, ids)
    packed = pack(model)
    masked = logits(model, ids)
    assert not torch.equal(untouched, masked)

    replace_linears(model, packed)
    assert torch.equal(logits(model, ids), masked)
    assert storages_of(model) == {name: weight.storage for name, weight in packed.items()}

    save_packed(model, tokenizer(), tmp_path / "out", recipe={"seed": seed})
    validate_packed(tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert same_state(loaded, model)
    assert torch.equal(logits(loaded, ids), masked)
    assert storages_of(loaded) == storages_of(model)

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids), masked)
    resaved, saved = read_info(tmp_path / "again"), read_info(tmp_path / "out")
    assert resaved.manifest == saved.manifest and resaved.linears == saved.linears
    assert resaved.other_bytes == saved.other_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_in_memory_saves_itself(family: str, tmp_path: Path) -> None:
    model = packed_model(family)
    model.save_pretrained(tmp_path / "out")
    validate_packed(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_with_and_without_a_cache(family: str, tmp_path: Path) -> None:
    save_packed(packed_model(family), tokenizer(), tmp_path / "out", recipe={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokens(2, 7, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (2, 19) and torch.equal(cached[:, :7], prompt)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("name", ["char-gpt2", "stories260k", "wiki6m"])
def test_real_models_there_and_back(name: str, tmp_path: Path) -> None:
    source = shared_model(name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    packed = pack(model, ["4:8", "8:8", "1:4", "5:16"])
    ids = tokens(2, 64, 0, model.config.vocab_size)
    masked = logits(model, ids)
    replace_linears(model, packed)
    torch.testing.assert_close(logits(model, ids), masked, rtol=1e-5, atol=1e-4)
    in_memory = logits(model, ids)
    text_tokenizer = AutoTokenizer.from_pretrained(source)
    save_packed(model, text_tokenizer, tmp_path / "out", recipe={"model": str(source)})
    loaded = load_model(tmp_path / "out")
    assert torch.equal(logits(loaded.model, ids), in_memory)
    assert loaded.tokenizer("once upon").input_ids == text_tokenizer("once upon").input_ids
    assert read_info(tmp_path / "out").packed_bytes == sum(
        weight.values.nbytes if weight.pattern.is_dense else weight.nbytes for weight in packed.values()
    )
    prompt = ids[:1, :8]
    generated = loaded.model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > 8


@pytest.mark.parametrize("family", ["qwen3", "llama-tied", "gpt2", "gemma"])
def test_tied_embeddings_stay_tied_and_dense(family: str, tmp_path: Path) -> None:
    save_packed(packed_model(family), None, tmp_path / "out", recipe={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear and isinstance(embedding, nn.Embedding)
    assert head.weight.data_ptr() == embedding.weight.data_ptr()


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama with biases, tied embeddings and mixed patterns; not to be changed."""
    path = tmp_path_factory.mktemp("packed") / "out"
    return save_packed(packed_model("llama-tied", seed=3), tokenizer(), path, recipe={"seed": 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "float16", "auto", None])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtype_and_device_map(packed_dir: Path, dtype: Any, device_map: str | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir, dtype=dtype, device_map=device_map)
    expected = {"float16": torch.float16, "auto": torch.float32, None: torch.float32}.get(dtype, dtype)
    assert model.dtype == expected
    reference = packed_model("llama-tied", seed=3)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            other = reference.get_submodule(name)
            assert module.values.dtype == expected and module.bitmask.dtype == torch.uint8
            assert torch.equal(module.bitmask, other.bitmask)
            assert torch.equal(module.values, other.values.to(expected))
    assert logits(model, tokens(1, 5, 0)).dtype == expected


def test_offloads_to_disk(packed_dir: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(packed_dir)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    for buffers in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            packed_dir, device_map=places, offload_folder=tmp_path / f"offload{buffers}", offload_buffers=buffers
        )
        sparse = [module for module in model.model.layers[1].modules() if isinstance(module, SparseLinear)]
        assert sparse and all(module.values.is_meta and module.bitmask.is_meta == buffers for module in sparse)
        assert torch.equal(logits(model, tokens(2, 9, 0)), logits(whole, tokens(2, 9, 0)))


def test_loaded_linears_are_frozen_and_the_model_says_what_it_is(packed_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert sparse and not any(p.requires_grad for module in sparse for p in module.parameters())
    assert model.is_quantized and model.quantization_method == "msp"
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable() and quantizer.is_trainable and quantizer.is_compileable
    assert model.config.quantization_config.allocation["model.layers.0.self_attn.q_proj"] == "2:8"


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_kept_values_can_be_trained(family: str, tmp_path: Path) -> None:
    """Gradients at the kept positions are the masked dense model's, and a step moves values, not positions."""
    dense = build(family)
    packed = pack(dense)
    save_packed(packed_model(family), None, tmp_path / "out", recipe={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").requires_grad_(True)
    ids = tokens(2, 12, 0)
    losses = [candidate(ids, labels=ids).loss for candidate in (dense, model)]
    for loss in losses:
        loss.backward()
    names = [name for name, weight in packed.items() if not weight.pattern.is_dense]
    for name in names:
        linear = dense.get_submodule(name)
        gradient = linear.weight.grad if isinstance(linear, nn.Linear) else linear.weight.grad.t()
        expected = gradient[packed[name].kept()].view(packed[name].values.shape)
        torch.testing.assert_close(model.get_submodule(name).values.grad, expected)
    torch.optim.SGD([model.get_submodule(name).values for name in names], lr=0.05).step()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < losses[1]
    for name in names:
        assert torch.equal(model.get_submodule(name).bitmask, packed[name].bitmask)


def test_whole_model_compiles(packed_dir: Path) -> None:
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    ids = tokens(2, 9, 0)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, logits(model, ids))


def test_the_body_alone_and_another_head_load(packed_dir: Path, tmp_path: Path) -> None:
    ids = tokens(2, 9, 0)
    whole = AutoModelForCausalLM.from_pretrained(packed_dir)
    with torch.no_grad():
        body = AutoModel.from_pretrained(packed_dir)
        assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)
        body.save_pretrained(tmp_path / "body")
        assert read_info(tmp_path / "body").allocation["layers.0.self_attn.q_proj"] == NMPattern(2, 8)
        again = AutoModel.from_pretrained(tmp_path / "body")
        assert torch.equal(again(ids).last_hidden_state, whole.model(ids).last_hidden_state)
        classifier = AutoModelForSequenceClassification.from_pretrained(packed_dir, num_labels=3)
        assert torch.equal(classifier.model(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_a_dense_model_is_not_packed_by_loading_it(packed_dir: Path, tmp_path: Path) -> None:
    save("llama-tied", tmp_path / "dense")
    config = AutoConfig.from_pretrained(packed_dir).quantization_config
    with pytest.raises(MspError, match=r"prune it with msp\.prune"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=MspConfig(**config))


QUERY, KEY, VALUE, OUT = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qkvo")
Config, Tensors = dict[str, Any], dict[str, torch.Tensor]


def copy_of(packed_dir: Path, path: Path) -> Path:
    path.mkdir()
    for file in packed_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def refused(path: Path, message: str) -> None:
    """Both ways of loading refuse ``path`` with an ``MspError`` that says ``message``."""
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(MspError, match=message) as raised:
            load(path)
        assert not isinstance(raised.value, UsageError)


def change(table: str, name: str, value: Any) -> Callable[[Config], None]:
    return lambda config: config[table].update({name: value})


CONFIGS: dict[str, tuple[Callable[[Config], None], str]] = {
    "pattern that is none": (change("allocation", QUERY, "two of eight"), f"{QUERY}.*'two of eight'"),
    "pattern that is a number": (change("allocation", QUERY, 2), f"{QUERY}.*2 is not a pattern"),
    "pattern with too many kept": (change("allocation", QUERY, "9:8"), f"{QUERY}.*9:8"),
    "unknown group size": (change("allocation", QUERY, "2:7"), f"{QUERY}.*group size 7"),
    "another pattern": (
        change("allocation", QUERY, "3:8"),
        rf"{QUERY}\.values: shape \[32, 8\], needs \[32, 12\] for 3:8",
    ),
    "same size, another pattern": (change("allocation", QUERY, "1:4"), QUERY),
    "dense instead of packed": (change("allocation", QUERY, "8:8"), rf"{QUERY}\.weight: missing"),
    "packed instead of dense": (change("allocation", OUT, "2:8"), rf"{OUT}\.values: missing"),
    "another shape": (change("shapes", QUERY, [32, 64]), rf"{QUERY}: .*\[32, 32\] there, not \[32, 64\]"),
    "a shape that is none": (change("shapes", QUERY, [32, "32"]), rf"{QUERY}: .*is not \[out, in\]"),
    "a shape off the groups": (change("shapes", QUERY, [32, 36]), f"{QUERY}: 36 columns"),
    "an extra linear": (
        lambda config: [config[table].update({"model.layers.9.x": v}) for table, v in EXTRA.items()],
        "model.layers.9.x: LlamaForCausalLM has no such linear",
    ),
    "an entry that is no linear": (
        lambda config: [config[table].update({"model.norm": v}) for table, v in EXTRA.items()],
        "model.norm: a LlamaRMSNorm of LlamaForCausalLM, not a linear",
    ),
    "a linear left out": (
        lambda config: [config[table].pop(QUERY) for table in EXTRA],
        rf"{QUERY}\.(values|bitmask): packed in the checkpoint, but not in the allocation",
    ),
    "an allocation entry without shape": (change("allocation", "model.layers.9.x", "2:8"), r"model\.layers\.9\.x"),
    "no allocation": (lambda config: config.pop("allocation"), "allocation is missing"),
    "allocation of another type": (lambda config: config.update(allocation=["2:8"]), "allocation.* is not an object"),
    "no shapes": (lambda config: config.pop("shapes"), "shapes is missing"),
    "a later format": (lambda config: config.update(format=2), "format 2 is not 1"),
    "no format": (lambda config: config.pop("format"), "format None is not 1"),
}
EXTRA: dict[str, Any] = {"allocation": "2:8", "shapes": [32, 32]}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_changed_config_is_refused(case: str, packed_dir: Path, tmp_path: Path) -> None:
    path = copy_of(packed_dir, tmp_path / "out")
    edit, message = CONFIGS[case]
    config = json.loads((path / "config.json").read_text())
    edit(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    refused(path, message)
    if "no such linear" not in message and "not a linear" not in message and "there, not" not in message:
        with pytest.raises(MspError, match=message):
            validate_packed(path)


def flip(name: str, row: int, byte: int, bits: int) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name][row, byte] ^= bits

    return edit


TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "one bit more in the last group": (flip(f"{VALUE}.bitmask", -1, -1, 0x80), VALUE),
    "one bit fewer": (lambda tensors: tensors[f"{QUERY}.bitmask"][3].zero_(), QUERY),
    "a bit moved to the next group": (flip(f"{KEY}.bitmask", 0, 0, 0), KEY),
    "no bitmask": (lambda tensors: tensors.pop(f"{QUERY}.bitmask"), rf"{QUERY}\.bitmask: missing"),
    "no values": (lambda tensors: tensors.pop(f"{QUERY}.values"), rf"{QUERY}\.values: missing"),
    "no dense weight": (lambda tensors: tensors.pop(f"{OUT}.weight"), rf"{OUT}\.weight: missing"),
    "no bias": (lambda tensors: tensors.pop(f"{QUERY}.bias"), rf"{QUERY}\.bias: missing"),
    "no norm": (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight: missing"),
    "no embedding": (
        lambda tensors: tensors.pop("model.embed_tokens.weight"),
        r"(embed_tokens|lm_head)\.weight: missing",
    ),
    "values cut": (
        lambda t: t.update({f"{QUERY}.values": t[f"{QUERY}.values"][:, :-1].clone()}),
        rf"{QUERY}\.values: shape",
    ),
    "bitmask cut": (
        lambda t: t.update({f"{QUERY}.bitmask": t[f"{QUERY}.bitmask"][:-1].clone()}),
        rf"{QUERY}\.bitmask: shape",
    ),
    "bitmask of another type": (
        lambda t: t.update({f"{QUERY}.bitmask": t[f"{QUERY}.bitmask"].to(torch.int8)}),
        rf"{QUERY}\.bitmask: dtype I8, needs U8",
    ),
    "values of another type": (
        lambda t: t.update({f"{QUERY}.values": t[f"{QUERY}.values"].to(torch.int32)}),
        rf"{QUERY}\.values: dtype I32",
    ),
    "a packed tensor too many": (
        lambda t: t.update(
            {f"{OUT}.values": t[f"{QUERY}.values"].clone(), f"{OUT}.bitmask": t[f"{QUERY}.bitmask"].clone()}
        ),
        rf"{OUT}\.(values|bitmask): packed in the checkpoint",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_changed_tensors_are_refused(case: str, packed_dir: Path, tmp_path: Path) -> None:
    path = copy_of(packed_dir, tmp_path / "out")
    edit, message = TENSORS[case]
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    if case == "a bit moved to the next group":  # 1:4, two groups to a byte: the byte's count stays 2
        tensors[f"{KEY}.bitmask"][0, 0] = 0b0000_0011
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(path, message)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, packed_dir: Path, tmp_path: Path) -> None:
    path = copy_of(packed_dir, tmp_path / "out")
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(path, r"model\.safetensors: missing, truncated or not safetensors")
    with pytest.raises(MspError, match=r"model\.safetensors"):
        read_info(path)


def test_no_pickle_is_read(packed_dir: Path, tmp_path: Path) -> None:
    path = copy_of(packed_dir, tmp_path / "out")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    with pytest.raises(MspError, match="safetensors only"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(MspError, match=r"has no model\.safetensors"):
        load_model(path)
    with pytest.raises(MspError, match=r"no model\.safetensors"):
        read_info(path)


def test_a_state_dict_alone_is_refused(packed_dir: Path) -> None:
    config = AutoConfig.from_pretrained(packed_dir)
    with pytest.raises(MspError, match="not from a state dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=load_file(packed_dir / "model.safetensors"))


SCRIPT = """
import sys
{first}
lazy = not ({{"torch", "transformers"}} & set(sys.modules))
{second}
from transformers import AutoModelForCausalLM
import torch
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(lazy, sum(type(module).__name__ == "SparseLinear" for module in model.modules()))
"""


def test_importing_msp_is_enough_whichever_comes_first(packed_dir: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    orders = [("import msp", ""), ("from transformers import AutoConfig", "import msp")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(first=first, second=second), packed_dir],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, second in orders
    ]
    expected = sum(not linear.pattern.is_dense for linear in read_info(packed_dir).linears)
    for (first, _), process in zip(orders, running, strict=True):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.split() == [str(first == "import msp"), str(expected)]


def test_public_names_resolve() -> None:
    import msp

    assert msp.SparseLinear is SparseLinear and msp.NMPattern is NMPattern and msp.read_info is read_info
    assert set(msp.__all__) <= set(dir(msp))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        msp.nothing  # noqa: B018
