"""Files of a model folder: allowed locations, allowed content, and exact copies when a model is saved."""

import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import save_sound_checkpoint
from rich.console import Console
from safetensors.torch import load_file, save_file

import openmimo
from openmimo.cli import main
from openmimo.core.errors import CheckpointError, ConfigError, DataError, UserError
from openmimo.core.registry import Registry
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.data.tokenizer import Tokenizer
from openmimo.data.tokenizer_files import read_companions
from openmimo.kernels.dispatch import Backend
from openmimo.model.audit import audit
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.merge import merge
from openmimo.model.presets import model_config, tiny
from openmimo.train.config import CheckpointConfig, SftConfig
from openmimo.train.pretrain import sft

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_sound_checkpoint(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "m"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(call, *arguments, error=UserError) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_folder_of_a_run_names_its_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(folder, run / "model")
    for load in (openmimo.load_model, Tokenizer.load):
        assert refused(load, run).endswith(f"is the folder of a run. Give the folder of its model: {run / 'model'}.")


# --- locations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["absolute", "parent", "inside", "null"])
def test_the_index_names_files_of_its_folder_only(folder, place):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    other = shutil.copytree(folder, folder.parent / "other")
    (folder / "sub").mkdir()
    for file in set(weight_map.values()):
        shutil.copy(other / file, folder / "sub")
    prefix = {"absolute": f"{other}/", "parent": "../other/", "inside": "sub/", "null": "\0"}[place]
    edit(folder / INDEX, weight_map={name: prefix + file for name, file in weight_map.items()})
    assert "must not contain a path" in refused(openmimo.load_model, folder, error=CheckpointError)


def test_links_lead_nowhere_but_to_the_blobs_of_a_hub_cache(folder, tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert openmimo.load_model(snapshot).companions.files["tokenizer.json"]
    Tokenizer.load(snapshot)
    for name in ("config.json", "tokenizer.json", INDEX, "generation_config.json"):
        copy = Path(shutil.copytree(snapshot, tmp_path / f"copy-{name}"))
        (copy / name).unlink()
        (copy / name).symlink_to(repository / "blobs" / f"blob-{name}")
        assert "outside its folder" in refused(openmimo.load_model, copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", INDEX, "shard"])
def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(folder, name):
    path = sorted(folder.glob("*.safetensors"))[0] if name == "shard" else folder / name
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a pipe" in refused(openmimo.load_model, folder)
    path.unlink()
    path.mkdir()
    assert f"{path} is a folder" in refused(openmimo.load_model, folder)


@pytest.mark.parametrize(
    "verb",
    [["generate", "--prompt", "x"], ["serve"], ["eval"], ["convert", "out"], ["merge", "out", "--children", "x"]],
)
def test_verbs_say_that_a_folder_does_not_exist(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openmimo", verb[0], "nowhere", *verb[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "nowhere does not exist" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": "false"}, {"add_swa_attention_sink_bias": "false"}, {"attention_bias": 0},
        {"norm_topk_prob": "true"}, {"topk_group": 0}, {"eos_token_id": "x"}, {"eos_token_id": 99999},
        {"eos_token_id": [0, -1]}, {"initializer_range": "x"}, {"rms_norm_eps": -1.0}, {"layernorm_epsilon": 0},
        {"rms_norm_eps": float("nan")}, {"rope_theta": 0}, {"rope_theta": -5.0}, {"swa_rope_theta": float("inf")},
        {"vocab_size": 2**60}, {"vocab_size": 299.0}, {"num_attention_heads": 10**9}, {"num_hidden_layers": 10**12},
        {"num_hidden_layers": -1}, {"num_nextn_predict_layers": 10**9}, {"n_routed_experts": 10**9},
        {"max_position_embeddings": 0}, {"attention_value_scale": 1e30}, {"partial_rotary_factor": 2},
        {"quantization_config": {"quant_method": "gptq"}}, {"hybrid_layer_pattern": "01"}, {"layer_types": {}},
        {"rope_parameters": [1]}, {"sliding_window": "9"}, {"head_dim": True},
    ],
    ids=str,
)  # fmt: skip
def test_config_values_are_checked_by_type_and_range(folder, changes):
    path = folder / "config.json"
    edit(path, **changes)
    for call in (openmimo.load_model, lambda folder: audit(model_config(str(folder)))):
        message = refused(call, folder, error=ConfigError)
        assert str(path) in message
        assert next(iter(changes)) in message


def test_all_findings_of_a_config_are_listed_at_once(folder):
    edit(folder / "config.json", vocab_size=-1, tie_word_embeddings="no", swiglu_limit=7.0)
    message = refused(openmimo.load_model, folder)
    assert all(key in message for key in ("vocab_size", "tie_word_embeddings", "swiglu_limit"))


def test_a_config_of_more_layers_or_experts_than_the_weights_is_refused_before_it_is_built(folder):
    edit(folder / "config.json", n_routed_experts=1 << 16)
    assert "n_routed_experts is 65536, but the weights hold 8" in refused(openmimo.load_model, folder)


def test_a_key_that_stands_twice_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"vocab_size": 7,', 1))
    assert "'vocab_size' occurs twice" in refused(openmimo.load_model, folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"eos_token": 5}), ("tokenizer_config.json", {"pad_token": {"text": "x"}}),
        ("tokenizer_config.json", {"chat_template": [1]}), ("tokenizer_config.json", {"chat_template": "{% if %}"}),
        ("generation_config.json", {"eos_token_id": "x"}), ("generation_config.json", {"eos_token_id": []}),
        ("generation_config.json", {"eos_token_id": [10**6]}), ("generation_config.json", {"eos_token_id": True}),
        ("tokenizer.json", {"model": []}), ("tokenizer.json", {"added_tokens": [{"id": 0}]}),
        ("tokenizer.json", {"pre_tokenizer": None}), ("tokenizer.json", {"added_tokens": "x"}),
    ],
    ids=str,
)  # fmt: skip
def test_tokenizer_files_are_checked(folder, file, changes):
    edit(folder / file, **changes)
    message = refused(Tokenizer.load, folder, error=DataError)
    assert file in message
    assert next(iter(changes)) in message


def test_a_vocabulary_without_all_bytes_and_moved_ids_are_refused(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"][0]["id"] += 100
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert "added_tokens[0]" in refused(Tokenizer.load, folder)
    values["added_tokens"][0]["id"] -= 100
    values["model"]["vocab"].pop("~")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert "bytes" in refused(Tokenizer.load, folder)


def test_a_stated_truncation_does_not_cut_texts(folder):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=truncation)
    assert len(Tokenizer.load(folder).encode("a longer text")) > 2


# --- weights that contradict the config ------------------------------------------------------------------------------


def test_contradictions_of_the_index_are_listed(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    name = next(name for name, file in weight_map.items() if file == files[0])
    edit(folder / INDEX, weight_map={**weight_map, name: files[1], "model.ghost": files[0]})
    message = refused(openmimo.load_model, folder)
    assert f"{name} in {files[1]}, but {files[0]} holds it" in message
    assert "model.ghost" in message


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_the_shape_of_the_index_is_checked(folder, content):
    (folder / INDEX).write_text(content)
    assert INDEX in refused(openmimo.load_model, folder, error=CheckpointError)


def test_a_tensor_that_two_files_hold_is_refused(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second)
    assert f"holds {name} twice" in refused(openmimo.load_model, folder)


def test_a_tensor_that_stands_twice_in_one_header_is_refused(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().strip()
    name, entry = next(iter((k, v) for k, v in json.loads(header).items() if k != "__metadata__"))
    text = f'{{"{name}":{json.dumps(entry)},{header[1:]}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert f"'{name}' occurs twice" in refused(openmimo.load_model, folder)


def test_tied_embeddings_next_to_another_head_are_refused(folder, tmp_path):
    edit(folder / "config.json", tie_word_embeddings=True)
    assert "tie_word_embeddings" in refused(openmimo.load_model, folder)
    path = next(path for path in folder.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**load_file(path), "lm_head.weight": embedding.clone()}, path)
    assert torch.equal(openmimo.load_model(folder).lm_head.weight, embedding)  # two equal copies are allowed


def test_heads_that_transformers_has_dropped_are_no_error(folder, capsys):
    for path in folder.glob("*.safetensors"):
        save_file({name: t for name, t in load_file(path).items() if "model.mtp." not in name}, path)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={name: file for name, file in weight_map.items() if "model.mtp." not in name})
    assert openmimo.load_model(folder).config.num_mtp_heads == 0
    assert "states 1 MTP heads, but the weights hold none" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quantized(sound, tmp_path_factory):
    target = tmp_path_factory.mktemp("fp8")
    for layout in ("split", "fused_qkv"):
        config = ConvertConfig(dtype="fp8", projections=layout)
        convert(sound, target / layout, config, start=lambda total: lambda count: None)
    return target


@pytest.mark.parametrize(
    ("layout", "part", "change", "named"),
    [
        ("split", "mlp.up_proj.weight_scale_inv", lambda scale: scale * float("nan"), "NaN"),
        ("split", "mlp.up_proj.weight_scale_inv", lambda scale: -scale, "negative"),
        ("split", "mlp.up_proj.weight_scale_inv", lambda scale: scale.to(torch.int32), "I32"),
        ("split", "mlp.up_proj.weight", lambda weight: weight.float(), "there is a"),
        ("split", "mlp.up_proj.weight", lambda weight: weight.flatten(), "another shape"),
        ("split", "mlp.up_proj.weight", lambda weight: None, "unexpected"),
        ("split", "self_attn.v_proj.weight_scale_inv", lambda scale: torch.ones(7, 1), "v_proj"),
        ("fused_qkv", "self_attn.qkv_proj.weight", lambda weight: weight[:-1].contiguous(), "rows"),
        ("fused_qkv", "self_attn.qkv_proj.weight_scale_inv", lambda scale: torch.ones(1, 1), "blocks"),
    ],
)
def test_scales_and_fused_rows_are_checked(quantized, tmp_path, layout, part, change, named):
    folder = Path(shutil.copytree(quantized / layout, tmp_path / "m"))
    path, name = folder / "model.safetensors", f"model.layers.0.{part}"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, path)
    message = refused(openmimo.load_model, folder, error=CheckpointError)
    assert named in message
    assert part in message


# --- files that are copied -------------------------------------------------------------------------------------------


def companion_texts(folder: Path) -> dict[str, str]:
    return dict(read_companions(folder).files)


def carried(folder: Path) -> dict[str, str]:
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
             "chat_template.jinja", "additional_chat_templates/rag.jinja")  # fmt: skip
    return {name: (folder / name).read_text() for name in names}


@pytest.fixture
def published(folder) -> Path:
    """A folder whose files have more content than the package reads, like published ones."""
    ids = [290, 292, 5]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "temperature": 0.3}, indent=4))
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>", model_max_length=512, split_special_tokens=False)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\r\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("own")
    return folder


def test_a_saved_model_carries_the_files_of_its_folder(published, tmp_path):
    model = openmimo.load_model(published)
    openmimo.save_model(model, tmp_path / "copy")
    assert carried(tmp_path / "copy") == carried(published)
    assert Tokenizer.load(tmp_path / "copy").eos_token_ids == (290, 292, 5)
    llm = openmimo.LLM(tmp_path / "copy")
    assert len(llm.generate(["The"], openmimo.SamplingParams(max_tokens=3))[0].token_ids) >= 1
    convert(published, tmp_path / "converted", ConvertConfig(), start=lambda total: lambda count: None)
    merge(str(published), [str(tmp_path / "copy")], str(tmp_path / "merged"))
    for other in ("converted", "merged"):
        assert carried(tmp_path / other) == carried(published)


def test_fine_tuning_carries_the_files_of_its_folder(published, tmp_path, without_figures):
    (published / "chat_template.jinja").unlink()  # the template of this fixture has no assistant turns to train on
    lines = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(64)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig("chat", options={"path": str(tmp_path / "chats.jsonl")})
    config = SftConfig(
        checkpoint=str(published), run_folder=str(tmp_path / "run"), device="cpu", dtype="float32", loader_workers=1,
        mixture=MixtureConfig((source,), validation_fraction=0.5), steps=2, sequence_length=256, global_batch_size=2,
        micro_batch_size=2, checkpoints=CheckpointConfig(every_steps=1),
    )  # fmt: skip
    model = sft(config, console=Console(file=io.StringIO()))
    before = companion_texts(published)
    assert "generation_config.json" in before
    assert companion_texts(model) == before
    assert companion_texts(tmp_path / "run" / "checkpoints" / "step-00000002") == before
    assert Tokenizer.load(model).eos_token_ids == (290, 292, 5)


def test_an_extended_model_changes_the_tokenizers_length_and_nothing_else(published, tmp_path):
    model, tokenizer = openmimo.load_model(published), Tokenizer.load(published)
    model.extend_context(full_rope_theta=None, max_positions=2048)
    openmimo.save_model(model, tmp_path / "own")
    openmimo.save_model(model, tmp_path / "given", tokenizer=tokenizer)
    before = carried(published)
    expected = json.loads(before.pop("tokenizer_config.json")) | {"model_max_length": 2048}
    for name in ("own", "given"):
        after = carried(tmp_path / name)
        assert json.loads(after.pop("tokenizer_config.json")) == expected
        assert after == before


def test_the_files_of_another_tokenizer_do_not_stay(published, tmp_path):
    other = Tokenizer.train(["another text for another vocabulary"], vocab_size=280)
    openmimo.save_model(openmimo.load_model(published), tmp_path / "m", tokenizer=other)
    assert not (tmp_path / "m" / "generation_config.json").exists()
    assert Tokenizer.load(tmp_path / "m").fingerprint == other.fingerprint


def test_transformers_sees_the_same_after_saving(published, tmp_path):
    transformers = pytest.importorskip("transformers")
    openmimo.save_model(openmimo.load_model(published), tmp_path / "copy", tokenizer=Tokenizer.load(published))
    seen = []
    for folder in (published, tmp_path / "copy"):
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        generation = transformers.GenerationConfig.from_pretrained(folder)
        ids = (peer.eos_token_id, peer.bos_token_id, peer.pad_token_id, peer.chat_template, peer.model_max_length)
        seen.append((ids, generation.to_dict()))
    assert seen[0] == seen[1]


def test_saved_files_have_the_mode_of_the_umask(sound, tmp_path):
    before = os.umask(0o027)
    try:
        openmimo.save_model(openmimo.load_model(sound), tmp_path / "m")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o640}


# --- convert, merge, plug-ins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [0, -1, 1e-9, float("nan"), float("inf"), "4"])
def test_impossible_shard_sizes_are_refused(gigabytes):
    with pytest.raises(ConfigError, match="max_shard_gigabytes"):
        ConvertConfig(max_shard_gigabytes=gigabytes)


def test_merge_refuses_before_it_loads(sound, tmp_path):
    other = openmimo.load_model(sound)
    other.extend_context(full_rope_theta=9e4, max_positions=512)
    openmimo.save_model(other, tmp_path / "child")
    before = (tmp_path / "child" / "config.json").read_bytes()
    for base, children, out, scale, named in (
        ("nowhere", ["nowhere"], sound, 1.0, "already exists"),
        ("nowhere", ["nowhere"], tmp_path / "new", float("nan"), "scale"),
        (sound, [tmp_path / "child"], tmp_path / "child", 1.0, "already exists"),
        (sound, [tmp_path / "child"], tmp_path / "new", 1.0, "layers"),
    ):
        with pytest.raises(UserError, match=named):
            merge(str(base), [str(child) for child in children], str(out), scale=scale)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "child" / "config.json").read_bytes() == before


@torch.no_grad()
def test_a_merge_is_the_mean_of_the_changes(sound, tmp_path):
    base = openmimo.load_model(sound)
    for number in (1, 2):
        child = openmimo.load_model(sound)
        for parameter in child.parameters():
            parameter.add_(number * 0.1)
        openmimo.save_model(child, tmp_path / f"child{number}")
    children = [str(tmp_path / "child1"), str(tmp_path / "child2")]
    merge(str(sound), children, str(tmp_path / "mean"))
    merge(str(sound), children, str(tmp_path / "sum"), method="task_arithmetic", scale=2.0)
    for name, change in (("mean", 0.15), ("sum", 0.6)):
        merged = dict(openmimo.load_model(tmp_path / name).named_parameters())
        for key, parameter in base.named_parameters():
            torch.testing.assert_close(merged[key], parameter + change)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError: No module"),
        ("import os\nos.nothing", "line 2: AttributeError"),
    ],
)
def test_a_plug_in_that_fails_to_import_says_where(tmp_path, monkeypatch, code, named):
    module = f"plugin_{abs(hash(code))}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("openmimo.kernels.linear", Backend)
    message = refused(registry.get, f"{module}:PLUGIN", error=ConfigError)
    assert "cannot be imported" in message
    assert named in message
    assert "PYTHONPATH" in refused(registry.get, "no_such_module_here:PLUGIN", error=ConfigError)


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 2**60}, {"hidden_size": 0}, {"norm_epsilon": float("nan")}, {"max_positions": -1}, {"layers": ()}],
    ids=str,
)
def test_impossible_models_are_refused_in_python(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(tiny(), **change)
