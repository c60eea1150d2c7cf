"""Models that read images: the language model is found and compressed, the rest kept; pairs calibrate it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import (
    IMAGE_SIDE,
    IMAGE_TOKEN,
    PATCH,
    VISION_LANGUAGE,
    architecture_model,
    deepstack_model,
    other_vision_language_model,
    vision_language_model,
)
from packed_models import relative_error
from safetensors.torch import load_file, save_file
from test_compressed_tensors import PLAIN as PLAIN_LANGUAGE
from test_fold import change, fold_all, outputs
from test_streaming import assert_same, losses
from torch import nn

from tensormill.compress import awq, compress, gptq, journal
from tensormill.compress.block_calls import record_calls
from tensormill.compress.calibration import Calibration, stream_blocks
from tensormill.compress.checkpoint import (
    inspect_checkpoint,
    load,
    open_model,
    open_processor,
    save_compressed,
)
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.compress.formats.registry import format_named
from tensormill.compress.recipe import Step
from tensormill.compress.streaming import OnDisk, fingerprint, open_source
from tensormill.compress.structure import discover, find_blocks
from tensormill.errors import CheckpointError, DataError, InvalidArgument

WORDS = 90
PATCHES = (IMAGE_SIDE // PATCH) ** 2
TOKENS = torch.randint(0, WORDS, (3, 24), generator=torch.Generator().manual_seed(1))
SMALL = {"group_size": 16, "n_grid": 4, "clip_grid": 8}


def words(count: int, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(0, WORDS, (count,), generator=draw))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint with its processor, and pairs of images and texts beside it."""
    image_module = pytest.importorskip("PIL.Image")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llava")
    vision_language_model().save_pretrained(folder / "model")
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<image>": IMAGE_TOKEN, "<unk>": 91, "</s>": 92}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    lines = []
    for index in range(5):
        draw = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (40 + index, 50, 3), generator=draw, dtype=torch.uint8)
        image_module.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
        lines.append({"image": f"images/{index}.png", "text": words(6 + 3 * index, index)})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "text.txt").write_text(words(400, 9))
    return folder


def test_the_language_model_is_found_beside_a_larger_vision_tower():
    model = vision_language_model()

    def weights(part: nn.Module) -> int:
        return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))

    assert weights(model.model.vision_tower) > 2 * weights(model.model.language_model)
    assert find_blocks(model) == [f"model.language_model.layers.{index}" for index in range(2)]
    structure = discover(model)
    assert len(structure.blocks[0].mappings) == 4
    assert structure.outside == ("lm_head",)
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert set(structure.left_out) == {name for name in linears if "vision" in name or "projector" in name}


def test_folding_changes_nothing():
    model = vision_language_model(dtype=torch.float64)
    structure = discover(model)
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < 1e-10


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The models of `VISION_LANGUAGE` compressed and saved, and their logits: made when first asked for."""
    root, made = tmp_path_factory.mktemp("others"), {}

    def compressed(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            model = other_vision_language_model(name)
            report = awq.apply(model, awq.AWQConfig(**SMALL), Calibration(TOKENS))
            assert sum(layer.nmse for layer in report.layers) < sum(layer.loss_rtn for layer in report.layers)
            folder = save_compressed(model, None, None, root / name)
            with torch.no_grad():
                made[name] = folder, model(TOKENS).logits
        return made[name]

    return compressed


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_others_are_found_and_folded(name):
    model = other_vision_language_model(name, torch.float64)
    unfuse_experts(model)
    structure = discover(model)
    for block in structure.blocks:
        assert "language_model" in block.name or "text_model" in block.name
        assert sum(".experts." not in edge.producer for edge in block.mappings) == 4
    towers = {
        name.removeprefix("model.").split(".")[0] for name in structure.left_out if "router" not in name
    }
    assert towers and not towers & {"language_model", "text_model"}
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < 1e-6


@pytest.mark.parametrize("name", VISION_LANGUAGE)
def test_others_are_compressed_and_loaded(name, others):
    folder, expected = others(name)
    with torch.no_grad():
        assert relative_error(load(folder)(TOKENS).logits, expected) < 1e-5


def test_others_are_read_by_plain_transformers(others, tmp_path):
    pytest.importorskip("compressed_tensors")
    folders = {name: str(others(name)[0]) for name in VISION_LANGUAGE}
    request = json.dumps([folders, TOKENS.tolist(), str(tmp_path / "logits")])
    program = PLAIN_LANGUAGE.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], input=request, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, found in load_file(tmp_path / "logits").items():
        assert relative_error(found, others(name)[1]) < 1e-5, name


def test_pairs_become_windows_of_their_own_length(source):
    processor = open_processor(source / "model")
    found = Calibration.from_pairs(source / "pairs.jsonl", processor)
    assert found.lengths == [PATCHES + 6 + 3 * index for index in range(5)]
    assert found.tokens.shape == (5, PATCHES + 18)
    for (tokens, inputs), length in zip(found.chunks(4), found.lengths, strict=True):
        assert tokens.shape == (1, length) and (tokens == IMAGE_TOKEN).sum() == PATCHES
        assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIDE, IMAGE_SIDE)
    few = Calibration.from_pairs(source / "pairs.jsonl", processor, samples=2, length=PATCHES + 4)
    assert few.lengths == [PATCHES + 4, PATCHES + 4]
    whole_image = Calibration.from_pairs(source / "pairs.jsonl", processor, length=3)
    assert whole_image.lengths == [PATCHES] * 5


def test_blocks_see_the_images(source):
    model, _ = open_model(source / "model")
    pairs = Calibration.from_pairs(source / "pairs.jsonl", open_processor(source / "model"))
    seen: list[torch.Tensor] = []
    layer = model.model.language_model.layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for tokens, inputs in pairs.chunks(1):
            model(tokens, **inputs)
    hook.remove()
    x = torch.cat(seen)
    for block in stream_blocks(model, discover(model), pairs):
        statistics = block.observe()["self_attn.q_proj"]
    assert statistics.tokens == len(x) == sum(pairs.lengths)
    assert torch.allclose(statistics.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-5)


def image_windows(model: nn.Module) -> Calibration:
    """Two windows of an image and words, as Qwen's processor would make them."""
    merged = (IMAGE_SIDE // PATCH // model.config.vision_config.spatial_merge_size) ** 2
    draw = torch.Generator().manual_seed(0)
    inputs, side = [], IMAGE_SIDE // PATCH
    tokens = torch.tensor([[92, *[IMAGE_TOKEN] * merged, 93, *range(start, start + 9)] for start in (0, 30)])
    for window in tokens:
        pixels = torch.randn(PATCHES, 2 * 3 * PATCH**2, generator=draw)
        kinds = (window == IMAGE_TOKEN).long().unsqueeze(0)
        grid = torch.tensor([[1, side, side]])
        inputs.append({"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds})
    return Calibration(tokens, inputs)


@pytest.mark.parametrize("config_class", ["Qwen3VLConfig", "Qwen3VLMoeConfig"])
def test_blocks_are_calibrated_on_what_the_model_adds_between_them(config_class, tmp_path):
    model = deepstack_model(config_class)
    windows, blocks = image_windows(model), find_blocks(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}
    gave: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}
    hooks = []
    for name in blocks:
        part = model.get_submodule(name)
        hooks.append(
            part.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].clone()))
        )
        hooks.append(part.register_forward_hook(lambda _m, _a, output, name=name: gave[name].append(output)))
    with torch.no_grad():
        for tokens, inputs in windows.chunks(1):
            model(tokens, **inputs)
    for hook in hooks:
        hook.remove()
    assert all(not torch.equal(gave[blocks[0]][i], seen[blocks[1]][i]) for i in range(2))

    def check(model: nn.Module, residence: OnDisk | None, inputs: str) -> None:
        structure = discover(model, residence=residence)
        for block in stream_blocks(model, structure, windows, inputs=inputs, residence=residence):
            assert all(map(torch.equal, block.hidden, seen[block.name]))
            block.observe()

    for inputs in ("original", "compressed"):
        check(model, None, inputs)
    if config_class == "Qwen3VLConfig":
        model.save_pretrained(tmp_path)
        empty, info = open_source(tmp_path, None)
        residence = OnDisk(empty, info, format_named("compressed-tensors"), journal.JournalElsewhere({}))
        check(empty, residence, "original")
        residence.close()


@pytest.mark.filterwarnings("ignore:plain transformers reads the experts:UserWarning")
@pytest.mark.parametrize("config_class", ["Qwen3VLConfig", "Qwen3VLMoeConfig"])
def test_a_model_with_additions_between_blocks_is_compressed_and_loaded(config_class, tmp_path):
    model = deepstack_model(config_class)
    windows = image_windows(model)
    report = awq.apply(model, awq.AWQConfig(symmetric=True, **SMALL), windows)
    assert sum(layer.nmse for layer in report.layers) < sum(layer.loss_rtn for layer in report.layers)
    assert all(".visual." in name or name.endswith(".mlp.gate") for name in report.left_out)
    folder = save_compressed(model, None, None, tmp_path / "out")
    with torch.no_grad():
        for tokens, inputs in windows.chunks(1):
            expected = model(tokens, **inputs).logits
            assert relative_error(load(folder)(tokens, **inputs).logits, expected) < 1e-5


PLAIN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
assert "tensormill" not in sys.modules
folder, inputs, out = json.loads(sys.stdin.read())
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, out)
"""


@pytest.mark.parametrize(
    ("format", "symmetric"), [("compressed-tensors", True), ("compressed-tensors", False), ("gptq", True)]
)
def test_checkpoints_give_the_same_logits_for_images_and_text(source, tmp_path, format, symmetric):
    model, tokenizer = open_model(source / "model")
    untouched = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "vision" in name or "proj" in name
    }
    pairs = Calibration.from_pairs(source / "pairs.jsonl", open_processor(source / "model"))
    report = awq.apply(model, awq.AWQConfig(symmetric=symmetric, **SMALL), pairs)
    assert len(report.layers) == 14 and len(report.left_out) == 26
    for name, value in model.state_dict().items():
        if "vision_tower" in name or "multi_modal_projector" in name:
            assert torch.equal(value, untouched[name])
    if format != "compressed-tensors":
        from tensormill.compress.formats.float16_scales import round_scales

        round_scales(model)
    folder = save_compressed(model, tokenizer, source / "model", tmp_path / "out", format=format)
    tokens, inputs = next(iter(pairs.chunks(1)))
    with torch.no_grad():
        expected = model(tokens, **inputs).logits
        found = load(folder)
        assert set(compressed_linears(found)) == set(compressed_linears(model))
        assert relative_error(found(tokens, **inputs).logits, expected) < 1e-5
        assert relative_error(found(TOKENS).logits, model(TOKENS).logits) < 1e-5
    assert open_processor(folder).image_token == "<image>"
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        save_file({"input_ids": tokens, **inputs}, tmp_path / "inputs.safetensors")
        request = json.dumps([str(folder), str(tmp_path / "inputs.safetensors"), str(tmp_path / "logits")])
        done = subprocess.run(
            [sys.executable, "-I", "-c", PLAIN], input=request, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert relative_error(load_file(tmp_path / "logits")["logits"], expected) < 1e-5


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_whole_job_on_pairs_and_on_text(source, tmp_path, method):
    settings = {"group_size": 16, "symmetric": True, "calibration_samples": 4, "calibration_length": 24}
    common = {"text": [source / "text.txt"], "max_tokens": 200, "device": "cpu"}
    from_pairs = compress(
        source / "model",
        method,
        output=tmp_path / "pairs",
        calibration_pairs=source / "pairs.jsonl",
        **common,
        **settings,
    )
    from_text = compress(
        source / "model",
        method,
        output=tmp_path / "text",
        calibration_text=[source / "text.txt"],
        evaluate=False,
        **common,
        **settings,
    )
    assert from_pairs.perplexity["compressed"] > 1 and len(from_pairs.left_out) == 26
    assert "at full precision by design" in " ".join(one.text for one in from_text.findings())
    written = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert "model.multi_modal_projector.linear_1" in written["left_out"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("pairs", "text"))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.endswith("packed"))


STREAMED = {"group_size": 16, "symmetric": True, "calibration_samples": 4, "calibration_length": 24}


@pytest.fixture
def run(source, tmp_path):
    def compress_to(name: str, method: str, model: Path = source / "model", **settings):
        pairs, text = source / "pairs.jsonl", [source / "text.txt"]
        common = {"calibration_pairs": pairs, "text": text, "max_tokens": 200, "stream": True, **STREAMED}
        return compress(model, method, output=tmp_path / name, **{**common, **settings})

    return compress_to


@pytest.mark.parametrize(
    ("method", "dtype", "format"),
    [
        ("awq", torch.float32, "compressed-tensors"),
        ("gptq", torch.bfloat16, "gptq"),
        ("rtn", None, "awq"),
    ],
)
def test_from_disk_to_disk_it_is_the_same_bit_for_bit(run, tmp_path, method, dtype, format):
    settings = {"dtype": dtype, "format": format, "evaluate": dtype == torch.float32}
    expected = run("memory", method, stream=False, **settings)
    found = run("disk", method, **settings)
    assert_same(tmp_path / "memory", tmp_path / "disk")
    assert losses(found) == losses(expected) and found.left_out == expected.left_out
    if settings["evaluate"]:
        for name in ("original", "rtn", "compressed"):
            assert found.perplexity[name] == pytest.approx(expected.perplexity[name], rel=1e-5)
    assert open_processor(tmp_path / "disk").image_token == "<image>"


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_run_on_pairs_that_ends_goes_on(run, tmp_path, monkeypatch, method):
    run("whole", method, evaluate=False)
    finish, done = journal.Journal._append, []

    def fail(self, entry) -> None:
        finish(self, entry)
        done.append(entry.get("part"))
        if done[-1] == "model.language_model.layers.0":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "_append", fail)
        with pytest.raises(KeyboardInterrupt):
            run("again", method, evaluate=False)
    report = run("again", method, evaluate=False)
    assert report.environment["resumed_parts"] > 0
    assert_same(tmp_path / "whole", tmp_path / "again")


def test_other_images_start_anew(source):
    info = inspect_checkpoint(source / "model")
    step = Step.of("awq", STREAMED)
    pairs = Calibration.from_pairs(source / "pairs.jsonl", open_processor(source / "model"))
    other = [{**each, "pixel_values": each["pixel_values"] + 1} for each in pairs.inputs]
    digests = {
        fingerprint(info, step.method, step.config, calibration)["calibration"]
        for calibration in (pairs, replace(pairs, inputs=other), replace(pairs, inputs=None))
    }
    assert len(digests) == 3


def test_a_tower_that_uses_the_weights_of_its_parts_is_loaded_whole(source, tmp_path):
    """SigLIP's pooling hands the weights of its output projection to a function."""
    vision_language_model(vision_config="SiglipVisionConfig").save_pretrained(tmp_path / "siglip")
    pixels = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE)
    tokens = torch.cat([torch.full((1, PATCHES), IMAGE_TOKEN), TOKENS[:1]], dim=1)
    tokens = tokens[:, 1:]  # the first patch is taken for a class token

    def hidden(model: nn.Module, residence: OnDisk | None) -> torch.Tensor:
        blocks = find_blocks(model)
        return record_calls(model, blocks, tokens, inputs={"pixel_values": pixels}, residence=residence)[0]

    model, info = open_source(tmp_path / "siglip", None)
    residence = OnDisk(model, info, format_named("compressed-tensors"), journal.JournalElsewhere({}))
    with residence.entrance():
        found = hidden(model, residence)
    residence.close()
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(found, hidden(open_model(tmp_path / "siglip")[0], None))


def test_the_command_takes_pairs(source, tmp_path):
    command = [
        *(sys.executable, "-m", "tensormill", "compress", str(source / "model"), "--no-evaluate"),
        *("--group-size", "16", "--set", "n_grid=4", "--set", "calibration_samples=2"),
        *("--device", "cpu", "--calibration-pairs"),
    ]
    pairs, missing = source / "pairs.jsonl", tmp_path / "missing.jsonl"
    done = subprocess.run([*command, str(pairs), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "preprocessor_config.json").exists() or (
        tmp_path / "out" / "processor_config.json"
    ).exists()
    done = subprocess.run(
        [*command, str(missing), "-o", str(tmp_path / "no")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "missing.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "no").exists()


def test_methods_run_on_pairs_in_half_precision(source):
    model, _ = open_model(source / "model", dtype=torch.bfloat16)
    pairs = Calibration.from_pairs(source / "pairs.jsonl", open_processor(source / "model"), samples=2)
    report = gptq.apply(model, gptq.GPTQConfig(group_size=16), pairs)
    assert all(layer.nmse < 0.2 for layer in report.layers)


def test_bad_pairs_are_refused(source, tmp_path):
    processor = open_processor(source / "model")

    def given(line: str) -> str:
        (tmp_path / "pairs.jsonl").write_text("\n" + line)
        with pytest.raises(DataError) as caught:
            Calibration.from_pairs(tmp_path / "pairs.jsonl", processor)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "line 2" in given('{"image": 3, "text": "w1"}')
    assert "line 2" in given("[1, 2]") and "line 2" in given("{")
    assert "missing.png, which doesn't exist" in given('{"image": "missing.png", "text": "w1"}')
    assert "broken.png can't be read" in given('{"image": "broken.png", "text": "w1"}')
    with pytest.raises(InvalidArgument, match="at least 1 of each"):
        Calibration.from_pairs(source / "pairs.jsonl", processor, samples=0)
    with pytest.raises(InvalidArgument, match="expected one of them"):
        compress(
            source / "model",
            output=tmp_path / "out",
            calibration_pairs=source / "pairs.jsonl",
            calibration_text=[source / "text.txt"],
        )


def test_a_model_that_reads_no_images_has_no_use_for_pairs(source, tmp_path):
    architecture_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="processor"):
        compress(tmp_path / "llama", output=tmp_path / "out", calibration_pairs=source / "pairs.jsonl")
    assert not (tmp_path / "out").exists()


def test_inputs_and_lengths_must_fit_the_tokens():
    with pytest.raises(DataError, match="inputs of 1 windows, expected 3"):
        Calibration(TOKENS, inputs=[{}])
    with pytest.raises(DataError, match="1 to 24 tokens"):
        Calibration(TOKENS, lengths=[1, 2, 25])
