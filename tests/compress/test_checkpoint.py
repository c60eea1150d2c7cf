"""Checkpoints: everything that can be wrong with one ends in one line, and outputs are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    compress_linears,
    logits,
    refused,
    relative_error,
    save_source,
    save_tokenizer,
    tiny_model,
)
from safetensors.torch import load_file, save_file

from tensormill.compress import checkpoint, output
from tensormill.compress.checkpoint import (
    check_output,
    inspect_checkpoint,
    is_compressed,
    load,
    open_model,
    read_header,
    save_compressed,
)
from tensormill.compress.output import whole_directory
from tensormill.errors import CheckpointError, InvalidArgument, ModelError, OutputError

SOURCE = Path(checkpoint.__file__).parents[2]
WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An uncompressed checkpoint in one file; tests copy it before they damage it."""
    return save_source(tiny_model("llama", tied=True), tmp_path_factory.mktemp("source") / "one")


@pytest.fixture(scope="module")
def original_shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "shards"
    return save_source(tiny_model("llama"), folder, max_shard_size="100KB")


@pytest.fixture
def source(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def shards(original_shards, tmp_path) -> Path:
    return Path(shutil.copytree(original_shards, tmp_path / "model"))


@pytest.fixture(scope="module")
def compressed(original, tmp_path_factory) -> Path:
    model, tokenizer = open_model(original)
    compress_linears(model, 4, 32, False)
    return save_compressed(model, tokenizer, original, tmp_path_factory.mktemp("out") / "w4")


def edit_json(file: Path, **values) -> None:
    config = json.loads(file.read_text())
    config.update(values)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- opening


def test_open_model_gives_the_model_and_its_tokenizer(original):
    model, tokenizer = open_model(original)
    assert relative_error(logits(model), logits(tiny_model("llama", tied=True))) < 1e-6
    assert tokenizer("word3 word4")["input_ids"] == [3, 4]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


def test_open_model_reads_shards_and_casts(original_shards):
    assert len(list(original_shards.glob("*.safetensors"))) > 1
    model, _ = open_model(str(original_shards), dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_inspection_reads_headers_only(original_shards):
    info = inspect_checkpoint(original_shards)
    parameters = dict(tiny_model("llama").named_parameters())
    assert {name: tensor.shape for name, tensor in info.tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }
    assert info.nbytes == sum(4 * parameter.numel() for parameter in parameters.values())
    assert info.quantization is None and not is_compressed(original_shards)


def test_a_model_without_tokenizer_opens(source):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert open_model(source)[1] is None


def test_what_is_not_a_model_is_refused(tmp_path, source):
    assert "doesn't exist" in refused(lambda: open_model(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "not a model: it has no config.json" in refused(lambda: open_model(tmp_path / "empty"))
    assert "is a file" in refused(lambda: open_model(source / WEIGHTS))
    assert "no built-in model" in refused(lambda: open_model("builtin:nothing"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(lambda: open_model(tmp_path / "empty"))
    assert not is_compressed(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": 3}'])
def test_a_damaged_config_is_refused(source, text):
    (source / "config.json").write_text(text)
    assert "config.json" in refused(lambda: open_model(source))


def test_a_checkpoint_without_weights_is_refused(source):
    (source / WEIGHTS).unlink()
    assert "no weights" in refused(lambda: open_model(source))
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    text = refused(lambda: open_model(source))
    assert "pickled" in text and "save_pretrained" in text


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(source, keep):
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[:keep])
    text = refused(lambda: open_model(source))
    assert "truncated" in text and WEIGHTS in text


def test_a_longer_file_is_refused(source):
    with (source / WEIGHTS).open("ab") as stream:
        stream.write(b"x")
    assert "is damaged" in refused(lambda: open_model(source))


def test_a_git_lfs_pointer_is_named(source):
    (source / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(lambda: open_model(source))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        "F32",
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, entry):
    write_header(tmp_path / WEIGHTS, json.dumps({"a": entry}).encode(), 4)
    refused(lambda: read_header(tmp_path / WEIGHTS))


def write_header(file: Path, header: bytes, payload: int) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(payload))


def test_overlaps_and_duplicates_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(tmp_path / WEIGHTS, json.dumps({"a": entry, "b": entry}).encode(), 4)
    assert "overlapping" in refused(lambda: read_header(tmp_path / WEIGHTS))
    text = json.dumps(entry)
    write_header(tmp_path / WEIGHTS, f'{{"a": {text}, "a": {text}}}'.encode(), 4)
    assert "damaged" in refused(lambda: read_header(tmp_path / WEIGHTS))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damaged_byte_makes_another_error(original, tmp_path_factory, data):
    """Any byte of the header changed: read as before or refused, never another exception."""
    raw = bytearray((original / WEIGHTS).read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("fuzz") / WEIGHTS
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_header(file)


def test_an_index_and_its_shards_must_agree(shards):
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
    moved = next(name for name, shard in weight_map.items() if shard == names[0])
    edit_json(index, weight_map={**weight_map, moved: names[1]})
    text = refused(lambda: open_model(shards))
    assert moved in text and names[1] in text
    edit_json(index, weight_map={**weight_map, moved: "../other.safetensors"})
    assert "outside" in refused(lambda: open_model(shards))
    edit_json(index, weight_map=["a"])
    assert "index.json is damaged" in refused(lambda: open_model(shards))
    edit_json(index, weight_map=weight_map)
    (shards / names[-1]).rename(shards / "elsewhere")
    assert f"names the shard {names[-1]}, which is missing" in refused(lambda: open_model(shards))
    index.unlink()
    assert "shards but no" in refused(lambda: open_model(shards))


def test_a_tensor_that_the_model_needs_is_named(source):
    edit_tensors(source, lambda tensors: tensors.pop(NORM))
    assert f"no tensor {NORM}" in refused(lambda: open_model(source))


def test_a_tensor_of_another_shape_is_named(source):
    edit_tensors(source, lambda tensors: tensors.update({NORM: torch.ones(63)}))
    text = refused(lambda: open_model(source))
    assert NORM in text and "(63,)" in text and "(64,)" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_named(source, value, dtype):
    edit_tensors(source, lambda tensors: tensors.update({NORM: torch.full((64,), value, dtype=dtype)}))
    assert f"{NORM} in" in refused(lambda: open_model(source))


def test_a_model_that_is_quantized_already_is_refused(compressed, source):
    text = refused(lambda: open_model(compressed))
    assert "already quantized" in text and "tensormill.load(path)" in text
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    text = refused(lambda: open_model(source))
    assert "already quantized (gptq)" in text and "tensormill.load" not in text


def test_integers_for_weights_are_refused(source):
    edit_tensors(source, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}))
    text = refused(lambda: open_model(source))
    assert f"{NORM} in" in text and "holds integers (I8)" in text


def test_an_unknown_activation_is_named(source):
    edit_json(source / "config.json", hidden_act="nonsense")
    assert "'nonsense' is not known" in refused(lambda: open_model(source))


def test_remote_code_and_unknown_models_are_refused(source):
    edit_json(source / "config.json", model_type="somebodys")
    assert "doesn't know" in refused(lambda: open_model(source))
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Somebodys"})
    assert "code from its own repository" in refused(lambda: open_model(source))
    edit_json(source / "config.json", model_type="vit")
    assert "causal language model" in refused(lambda: open_model(source))


def test_a_damaged_tokenizer_is_refused(source):
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refused(lambda: open_model(source))


def test_devices_are_checked(original):
    assert "given device" in refused(lambda: open_model(original, device="nothing"), InvalidArgument)
    if not torch.cuda.is_available():
        assert "no GPU" in refused(lambda: open_model(original, device="cuda"), InvalidArgument)


def test_unused_tensors_are_reported(source):
    edit_tensors(source, lambda tensors: tensors.update({"vision.weight": torch.ones(3)}))
    with pytest.warns(UserWarning, match=r"vision\.weight"):
        open_model(source)


# --- saving and loading


def test_files_travel_along(original, compressed):
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE", "chat_template.jinja"):
        assert (compressed / name).read_bytes() == (original / name).read_bytes()
    assert (compressed / "generation_config.json").read_bytes() == (
        original / "generation_config.json"
    ).read_bytes()
    config = json.loads((compressed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((original / "config.json").read_text())
    assert quantization["quant_method"] == "compressed-tensors"
    assert is_compressed(compressed)
    assert checkpoint.open_tokenizer(compressed)("word5")["input_ids"] == [5]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in compressed.iterdir()}
    assert len(modes) == 1, "one file is readable for others and another is not"


def test_load_gives_the_saved_model_in_eval_mode(original, compressed):
    expected = compress_linears(open_model(original)[0], 4, 32, False)
    model = load(compressed)
    assert relative_error(logits(model), logits(expected)) < 1e-6
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_have_an_index_that_load_reads(tmp_path, compressed, original):
    model = load(compressed)
    folder = save_compressed(model, None, original, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    assert relative_error(logits(load(folder)), logits(model)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_source_dtype_is_kept(tmp_path, dtype):
    source = save_source(tiny_model("qwen2", dtype=dtype), tmp_path / "source")
    for computed in (None, torch.float32):
        model, tokenizer = open_model(source, dtype=computed)
        compress_linears(model, 8, 32, False)
        folder = save_compressed(model, tokenizer, source, tmp_path / str(computed))
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                assert tensor.dtype == (computed or dtype)
            elif tensor.is_floating_point():
                assert tensor.dtype == dtype
        loaded = load(folder)
        assert loaded.dtype == dtype
        scale = loaded.model.layers[0].mlp.up_proj.weight_scale
        assert torch.equal(scale, tensors["model.layers.0.mlp.up_proj.weight_scale"])
        if computed is None:
            assert torch.equal(logits(loaded), logits(model))
        # Rounding of what isn't quantized to the source's dtype, through two layers.
        assert relative_error(logits(load(folder, dtype=torch.float32)), logits(model)) < 3e-2


def test_save_without_a_source_writes_the_model_s_own_files(tmp_path, compressed):
    folder = save_compressed(load(compressed), checkpoint.open_tokenizer(compressed), None, tmp_path / "new")
    assert {"config.json", "generation_config.json", "tokenizer.json", WEIGHTS} <= left_in(folder)
    assert relative_error(logits(load(folder)), logits(load(compressed))) < 1e-6


def test_extra_files_are_part_of_the_whole(tmp_path, compressed):
    def extra(written: Path) -> dict[str, str]:
        return {"sizes.txt": str((written / "model.safetensors").stat().st_size)}

    folder = save_compressed(load(compressed), None, None, tmp_path / "new", extra_files=extra)
    assert (folder / "sizes.txt").read_text() == str((folder / "model.safetensors").stat().st_size)


def test_saving_leaves_the_model_as_it_was(tmp_path, compressed):
    model = load(compressed)
    before, config, generation = logits(model), model.config.to_dict(), model.generation_config.to_dict()
    save_compressed(model, None, compressed.parent / "w4", tmp_path / "new")
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation


def test_a_generation_config_that_transformers_would_not_write_travels(tmp_path, source):
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    model = compress_linears(open_model(source)[0], 4, 32, False)
    folder = save_compressed(model, None, source, tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.6


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, original):
    out = tmp_path / "out" / "w4"
    assert "no compressed linear" in refused(
        lambda: save_compressed(open_model(original)[0], None, original, out), ModelError
    )
    model = compress_linears(open_model(original)[0], 4, 32, False)
    model.model.norm.weight.data[3] = float("nan")
    assert "model.norm.weight has NaN" in refused(
        lambda: save_compressed(model, None, original, out), ModelError
    )
    tied = compress_linears(open_model(original)[0], 4, 32, False, head=True)
    assert "tied" in refused(lambda: save_compressed(tied, None, original, out), ModelError)
    assert not out.parent.exists()


def test_load_refuses_what_is_not_packed(original, source):
    assert "is not compressed" in refused(lambda: load(original))
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantized with 'gptq'" in refused(lambda: load(source))


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape", "weight_zero_point"])
def test_load_names_a_missing_part(compressed, tmp_path, part):
    folder = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    name = f"model.layers.1.mlp.down_proj.{part}"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"no tensor {name}" in refused(lambda: load(folder))


def test_load_refuses_a_config_of_another_checkpoint(compressed, tmp_path):
    folder = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    for change in ({"num_bits": 3}, {"group_size": 16}, {"symmetric": True}):
        original_weights = dict(weights)
        weights.update(change)
        (folder / "config.json").write_text(json.dumps(config))
        refused(lambda: load(folder))
        weights.update(original_weights)
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: load(folder))


def test_load_refuses_infinite_scales(compressed, tmp_path):
    folder = Path(shutil.copytree(compressed, tmp_path / "damaged"))
    name = "model.layers.0.mlp.up_proj.weight_scale"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(float("inf")))
    assert name in refused(lambda: load(folder))


# --- whole or not at all


def test_destinations_are_refused(tmp_path, source, compressed):
    def save(target, **more):
        return save_compressed(load(compressed), None, source, target, **more)

    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert "is a file" in refused(lambda: save(tmp_path / "file"), OutputError)
    assert "exists and isn't empty" in refused(lambda: save(tmp_path / "full"), OutputError)
    assert "isn't a checkpoint" in refused(lambda: save(tmp_path / "full", overwrite=True), OutputError)
    for target in (source, source / "below", tmp_path):
        assert "overlaps the source" in refused(lambda t=target: save(t, overwrite=True), OutputError)
    assert "isn't a writable directory" in refused(lambda: save(tmp_path / "file" / "below"), OutputError)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
    assert left_in(tmp_path) == {"model", "file", "full", "empty"}
    assert inspect_checkpoint(save(tmp_path / "empty")).quantization
    assert inspect_checkpoint(save(tmp_path / "a" / "b" / "new")).quantization


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_directory(tmp_path, compressed, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda first, second: False)
    target = Path(shutil.copytree(compressed, tmp_path / "out"))
    (target / "stale.json").write_text("x")
    save_compressed(load(compressed), None, None, target, overwrite=True)
    assert "stale.json" not in left_in(target) and left_in(tmp_path) == {"out"}
    assert load(target)


def test_little_free_space_is_seen_before_writing(tmp_path, compressed, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    text = refused(lambda: save_compressed(load(compressed), None, None, tmp_path / "out"), OutputError)
    assert "disk has 0.0 MB left" in text
    check_output(tmp_path / "out")
    assert left_in(tmp_path) == set()


def full_disk_from_safetensors(path):
    from safetensors import SafetensorError

    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FAILURES = {
    "safetensors": (full_disk_from_safetensors, OutputError, "the disk is full"),
    "system": (
        lambda path: OSError(errno.ENOSPC, "No space left on device"),
        OutputError,
        "the disk is full",
    ),
    "quota": (lambda path: OSError(errno.EDQUOT, "Disk quota exceeded"), OutputError, "Disk quota exceeded"),
    "tokenizers": (
        lambda path: Exception("No space left on device (os error 28)"),
        OutputError,
        "disk is full",
    ),
    "interrupt": (lambda path: KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
    "anything": (lambda path: ZeroDivisionError("bug"), ZeroDivisionError, "bug"),
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_half_way_leaves_what_was_there(tmp_path, compressed, monkeypatch, failure, existing):
    make, error, text = FAILURES[failure]
    model = load(compressed)
    target = tmp_path / "out"
    if existing:
        shutil.copytree(compressed, target)
    before = {file: (target / file).read_bytes() for file in left_in(target)} if existing else {}

    def fail(folder, **more):
        (Path(folder) / WEIGHTS).write_bytes(b"half")
        raise make(folder)

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(error, match=text):
        save_compressed(model, None, None, target, overwrite=existing)
    assert left_in(tmp_path) == ({"out"} if existing else set())
    assert before == ({file: (target / file).read_bytes() for file in left_in(target)} if existing else {})


def test_sigterm_removes_the_half_written_directory(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from tensormill.compress.output import whole_directory\n"
        "with whole_directory(sys.argv[1]) as partial:\n"
        "    (partial / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while True: signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, timeout=120)
    assert done.returncode == -signal.SIGTERM
    assert left_in(tmp_path) == set()


def test_a_handler_of_the_caller_s_own_stays(tmp_path):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("x")
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [signal.SIGTERM] and left_in(tmp_path / "out") == {"a"}


def test_a_destination_filled_meanwhile_is_not_lost(tmp_path):
    def race():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("theirs")

    refused(race, OutputError)
    assert left_in(tmp_path) == {"out"} and left_in(tmp_path / "out") == {"b"}


def test_a_link_is_followed(tmp_path, compressed):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    save_compressed(load(compressed), None, None, tmp_path / "link" / "out")
    assert left_in(tmp_path / "disk") == {"out"}


def test_the_tokenizer_is_written_where_the_source_has_none(tmp_path, source):
    model = compress_linears(open_model(source)[0], 4, 32, False)
    for file in source.glob("tokenizer*"):
        file.unlink()
    save_tokenizer(tmp_path / "other")
    tokenizer = checkpoint.open_tokenizer(tmp_path / "other")
    folder = save_compressed(model, tokenizer, source, tmp_path / "out")
    assert checkpoint.open_tokenizer(folder)("word7")["input_ids"] == [7]
