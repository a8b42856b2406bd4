"""Packed weights: codes, ties, scales, residual stages, exact sums without multiplications, checkpoints, the engine."""

import ctypes
import json
import re
import subprocess

import pytest
import torch
from conftest import randomize, tiny_config
from safetensors.torch import load_file, save_file

import openmimo
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.kernels import native
from openmimo.kernels.linear.packed import _FORMATS, _PACKED_LINEAR
from openmimo.kernels.operations import LINEAR, linear
from openmimo.kernels.weights import (
    PACKED,
    Packed,
    Packing,
    int8_input,
    pack,
    real_matrix,
    widely_linear,
)
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_model, save_model, slots
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule, quantize_model

needs_library = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def complex_values(packed):
    """The complex values of a packed fairy matrix."""
    real, imaginary = packed.dequantize(torch.float32).chunk(2)
    return torch.complex(real, imaginary)


def test_a_complex_code_is_the_sector_of_the_angle_and_ties_are_decided():
    """Sectors are [-45, 45) degrees and so on; zero is +1. The scales are the means over the sectors of each axis."""
    numbers = torch.tensor([[3 + 1j, 1 + 3j, -3 + 1j, 1 - 3j, 1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j, 0]])
    units = [1, 1j, -1, -1j, 1j, -1, -1j, 1, 1]
    packed = pack(torch.cat([numbers.real, numbers.imag]), Packing("fairy"))
    real_scale, imaginary_scale = (3 + 3 + 1 + 1 + 0) / 5, (3 + 3 + 1 + 1) / 4
    expected = [unit * (imaginary_scale if unit in (1j, -1j) else real_scale) for unit in units]
    assert complex_values(packed)[0].tolist() == pytest.approx(expected)


def test_codes_agree_with_the_angle_of_many_numbers():
    numbers = torch.complex(draw(40, 50), draw(40, 50, seed=1))
    sector = ((numbers.angle() + torch.pi / 4) // (torch.pi / 2)).to(torch.int64) % 4
    units = torch.tensor([1, 1j, -1, -1j])[sector]
    for per_row in (False, True):
        values = complex_values(pack(torch.cat([numbers.real, numbers.imag]), Packing("fairy", 1, per_row)))
        assert torch.equal(torch.sgn(values).real.round(), units.real)
        assert torch.equal(torch.sgn(values).imag.round(), units.imag)
        for row in range(40 if per_row else 1):
            part = slice(row, row + 1) if per_row else slice(None)
            mean = numbers[part].real.abs()[units[part].real != 0].mean()
            assert values[part].abs()[units[part].real != 0] == pytest.approx(mean.item())


def test_ternary_and_binary_codes_are_those_of_their_papers():
    weight = torch.tensor([[0.5, -0.5, 2.0, -2.0, 0.2, 0.0, -0.3, 2.5]])
    mean = weight.abs().mean().item()
    ternary = pack(weight, Packing("ternary")).dequantize(torch.float32)
    assert ternary[0].tolist() == pytest.approx([0, 0, mean, -mean, 0, 0, 0, mean])
    binary = pack(weight, Packing("binary")).dequantize(torch.float32)
    assert binary[0].tolist() == pytest.approx([mean, -mean, mean, -mean, mean, mean, -mean, mean])


def test_relative_errors_of_gaussian_weights():
    """The values that follow from the normal distribution: 1 - 2/pi for one bit, and so on."""
    weight = draw(500, 500)
    expected = {
        ("binary", 1): 0.3634, ("fairy", 1): 0.3634, ("ternary", 1): 0.264, ("fairy2i", 1): 0.3634,
        ("fairy2i", 2): 0.1310, ("fairy2i", 3): 0.0586, ("fairy2i", 4): 0.0331,
    }  # fmt: skip
    for (name, stages), error in expected.items():
        left = weight - pack(weight, Packing(name, stages)).dequantize(torch.float32)
        assert ((left**2).mean() / (weight**2).mean()).item() == pytest.approx(error, rel=0.01)


def test_each_residual_stage_divides_the_error():
    weight = draw(300, 300)
    errors = [
        ((weight - pack(weight, Packing("fairy2i", stages)).dequantize(torch.float32)) ** 2).sum().item()
        for stages in (1, 2, 3, 4)
    ]
    ratios = [before / after for before, after in zip(errors, errors[1:], strict=False)]
    assert ratios == pytest.approx([2.8, 2.2, 1.8], rel=0.03)


@pytest.mark.parametrize("shape", [(6, 8), (5, 8), (6, 7), (1, 1), (65, 33)], ids=str)
def test_the_widely_linear_form_is_the_real_product_and_goes_back(shape):
    matrix, x = draw(*shape), draw(shape[1], seed=1)
    parts = widely_linear(matrix)
    assert torch.allclose(real_matrix(parts, shape), matrix, atol=1e-6)
    u, w = torch.complex(*parts)
    padded = torch.nn.functional.pad(x, (0, shape[1] % 2))
    z = torch.complex(*padded.chunk(2))
    y = u @ z + w @ z.conj()
    assert torch.allclose(torch.cat([y.real, y.imag])[: shape[0]], matrix @ x, atol=1e-5)


def test_every_matrix_of_a_checkpoint_goes_to_the_widely_linear_form_and_back(folder):
    matrices = [slot.target for slot in slots(load_model(folder)) if slot.target.ndim == 2]
    assert len(matrices) > 30
    for matrix in matrices:
        back = real_matrix(widely_linear(matrix), tuple(matrix.shape))
        assert (back - matrix).abs().max() < 1e-6 * matrix.abs().max()


def test_inputs_have_255_levels_for_each_row_or_half_and_the_gradient_of_the_identity():
    x = draw(3, 10).requires_grad_()
    for halves in (1, 2):
        rounded = int8_input(x, halves)
        for part, levels in zip(x.split(10 // halves, 1), rounded.split(10 // halves, 1), strict=True):
            step = part.abs().amax(1, keepdim=True) / 127
            assert torch.allclose(levels / step, (part / step).round(), atol=1e-4)
        (gradient,) = torch.autograd.grad(rounded.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))
    assert torch.equal(int8_input(torch.zeros(2, 4)), torch.zeros(2, 4))


def integers(name, shape, stages):
    """A packed weight and inputs whose product is an exact integer: scales are powers of two, input steps are 1."""
    packed = pack(draw(*shape), Packing(name, stages))
    packed.scales.copy_(2.0 ** torch.arange(packed.scales.numel()).view(packed.scales.shape))
    x = torch.randint(-127, 128, (9, shape[1]), generator=torch.Generator().manual_seed(1))
    x[:, 0], x[:, -1] = 127, -127
    return packed, x, x @ packed.dequantize(torch.float32).to(torch.int64).T


@needs_library
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("shape", [(34, 65), (8, 1), (64, 640)], ids=str)
@pytest.mark.parametrize("name", PACKED)
@torch.inference_mode()
def test_sums_of_integers_are_exact(name, shape, stages):
    packed, x, exact = integers(name, shape, stages)
    ours = dict(LINEAR.backends())["packed"].run(x.float(), ((packed, None),))
    assert torch.equal(ours.to(torch.int64), exact)


_TARGETS = {"avx512": ["-mavx512bw", "-mavx512f"], "avx2": ["-mavx2", "-mpopcnt"], "portable": []}


@needs_library
@pytest.mark.parametrize(
    "target", ["portable", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avx512", "avx2"))]
)
def test_the_inner_loop_has_no_multiplication(target, tmp_path):
    """Reads the instructions of the compiled functions that hold the inner loop."""
    source, assembly = native.SOURCES / "packed.c", tmp_path / "packed.s"
    flags = ["-std=gnu11", "-O3", "-fPIC", "-S", *_TARGETS[target]]
    done = subprocess.run([*native.find_compiler(), *flags, str(source), "-o", str(assembly)], capture_output=True)
    if done.returncode:
        pytest.skip("the compiler does not know this processor")
    text = assembly.read_text()
    for name in ("rows1", "rows2", "rows4"):
        body = re.search(rf"^_?openmimo_packed_{name}:\n(.*?)\.cfi_endproc", text, re.MULTILINE | re.DOTALL)[1]
        instructions = re.findall(r"^\t([a-z]\w*)", body, re.MULTILINE)
        assert len(instructions) > 10
        assert not [word for word in instructions if re.search("mul|madd|fma|dpb|dpw|dot", word)]


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("target", ["avx2", "portable"])
def test_sums_of_integers_are_exact_on_other_processors(target, tmp_path):
    """Compiles the kernel without the widest instructions."""
    library = tmp_path / "packed.so"
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", *_TARGETS[target]]
    command = [*native.find_compiler(), *flags, str(native.SOURCES / "packed.c"), "-o", str(library), "-lm"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler does not know this processor")
    function = ctypes.CDLL(str(library)).openmimo_packed_linear
    function.argtypes = (ctypes.c_char_p,)
    for name in PACKED:
        packed, x, exact = integers(name, (34, 200), 2)
        wide, out = x.float(), torch.empty(9, 34)
        addresses = (wide.data_ptr(), packed.codes.data_ptr(), packed.scales.data_ptr(), out.data_ptr())
        assert not function(_PACKED_LINEAR.pack(*addresses, 9, 200, 34, 34, 2, _FORMATS[name], False, 1))
        assert torch.equal(out.to(torch.int64), exact)


@needs_library
@torch.inference_mode()
def test_threads_change_no_bit():
    """The codes are large enough to be split between threads."""
    weight, x, before = pack(draw(1600, 1400), Packing("fairy2i", 2)), draw(3, 1400, seed=1), torch.get_num_threads()
    outputs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outputs.append(linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(*outputs)


@torch.inference_mode()
def test_stacked_matrices_are_packed_one_by_one():
    weight = draw(3, 12, 20)
    stacked = pack(weight, Packing("fairy2i", 2), 2)
    assert stacked.shape == weight.shape
    for expert in range(3):
        for start in (0, 6):
            alone = pack(weight[expert, start : start + 6], Packing("fairy2i", 2))
            part = stacked.select(expert).rows(start, start + 6)
            assert torch.equal(part.codes, alone.codes) and torch.equal(part.scales, alone.scales)
            assert torch.equal(
                stacked.dequantize(torch.float32)[expert, start : start + 6], alone.dequantize(torch.float32)
            )


def test_inputs_that_are_not_finite_give_results_that_are_not():
    packed = pack(draw(6, 8), Packing("fairy2i"))
    for bad in (torch.nan, torch.inf):
        x = draw(2, 8)
        x[1, 3] = bad
        for name in ("reference", *(["packed"] if native.library() else [])):
            out = dict(LINEAR.backends())[name].run(x, ((packed, None),))
            assert out[0].isfinite().all() and not out[1].isfinite().any()


# --- models and checkpoints ------------------------------------------------------------------------------------------

IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with experts and an MTP head, whose codes do not fill their bytes."""
    path = tmp_path_factory.mktemp("packed") / "plain"
    save_model(randomize(MiMo(tiny_config(mtp_heads=1, num_layers=3)), 3), path)
    return path


@pytest.fixture(scope="module")
def packed_folder(folder):
    path = folder.parent / "fairy2i"
    config = ConvertConfig(quantize="fairy2i", stages=2, dtype="float32")
    convert(folder, path, config, start=lambda total: lambda num_bytes: None)
    return path


def held(model):
    modules = [module for module in model.modules() if isinstance(module, QuantizableModule)]
    return [module.held_weight(name) for module in modules for name in module.blocks]


def logits(model):
    with torch.inference_mode():
        return model.logits(IDS)


def test_a_converted_checkpoint_is_the_model_quantized_in_memory(folder, packed_folder):
    converted, in_memory = load_model(packed_folder, weights="fairy2i"), load_model(folder)
    quantize_model(in_memory, Packing("fairy2i", 2))
    assert torch.equal(logits(converted), logits(in_memory))
    assert torch.equal(logits(converted), logits(load_model(folder, weights="fairy2i")))
    assert len(held(converted)) > 15 and all(isinstance(weight, Packed) for weight in held(converted))
    numbers = sum(weight.shape.numel() for weight in held(converted))
    assert 2.0 < sum(weight.nbytes for weight in held(converted)) * 8 / numbers < 2.2
    entry = json.loads((packed_folder / "config.json").read_text())["quantization_config"]
    assert entry == {"quant_method": "openmimo_packed", "format": "fairy2i", "stages": 2, "scales": "tensor"}
    plain, original = logits(load_model(packed_folder)), logits(load_model(folder))
    assert 0 < (plain - logits(converted)).abs().mean() < 0.1 * (plain - original).abs().mean()


@pytest.mark.parametrize(
    "packing",
    [
        Packing("binary", 3, True),
        *(pytest.param(packing, marks=pytest.mark.slow) for packing in (Packing("ternary"), Packing("fairy2i", 4))),
    ],
    ids=["binary", "ternary", "fairy2i"],
)
def test_a_packed_model_is_saved_and_loaded_as_it_is(folder, tmp_path, packing):
    model = load_model(folder)
    quantize_model(model, packing)
    openmimo.save_model(model, tmp_path / "copy")
    loaded = load_model(tmp_path / "copy", weights=packing.format)
    assert {weight.packing for weight in held(loaded)} == {packing}
    assert torch.equal(logits(loaded), logits(model))
    model.double().float().to("cpu")
    assert torch.equal(logits(loaded), logits(model))
    new = randomize(MiMo(model.config), 9)
    LLM(model).engine.update_weights(new.state_dict(), version=1)
    quantize_model(new, packing)
    assert torch.equal(logits(model), logits(new))


@pytest.mark.parametrize("batched", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "batched"])
def test_drafts_do_not_change_the_text_of_packed_weights(packed_folder, batched):
    prompts = [IDS.tolist(), IDS[5:12].tolist(), IDS[20:].tolist()][: 3 if batched else 1]
    params = SamplingParams(max_tokens=16, temperature=0.0)
    plain, drafted = (LLM(packed_folder, weights="fairy2i", speculative=speculative) for speculative in (False, True))
    texts = [[c.token_ids for c in llm.generate(prompts, params)] for llm in (plain, drafted)]
    assert texts[0] == texts[1]


def damaged(packed_folder, tmp_path, change):
    """A copy of the checkpoint after `change(tensors)`."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in packed_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("", lambda t: t[0, 0, 0, 0].add_(1), "checksum"),
        ("_scales", lambda t: t.mul_(-1), "negative"),
        ("_scales", lambda t: t.fill_(torch.nan), "NaN"),
        ("_packed", lambda t: t[2].add_(1), "checksum"),
        ("_packed", lambda t: t[0].add_(2), "shape|differ"),
    ],
)
@pytest.mark.parametrize("weights", ["fairy2i", "plain"])
def test_corrupt_codes_and_scales_are_an_error(packed_folder, tmp_path, part, change, message, weights):
    copy = damaged(packed_folder, tmp_path, lambda tensors: change(tensors[NAME + part]))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(copy, weights=weights)
    assert NAME in str(error.value)


@pytest.mark.parametrize("part", ["_scales", "_packed"])
def test_a_missing_part_is_an_error(packed_folder, tmp_path, part):
    copy = damaged(packed_folder, tmp_path, lambda tensors: tensors.pop(NAME + part))
    with pytest.raises(CheckpointError, match=f"{NAME}.*{part}"):
        load_model(copy)


def test_impossible_codes_are_named():
    ternary = pack(draw(4, 9), Packing("ternary"))
    assert ternary.problem() is None
    ternary.codes[0, 0, 0, 0, 0, 0] = 0
    ternary.codes[0, 0, 0, 0, 1, 0] = 1
    assert "-0" in ternary.problem()
    fairy = pack(draw(4, 9), Packing("fairy"))
    fairy.codes[0, 0, 0, 0, 0, 1] |= 2  # column 9 of 0 to 8
    assert "behind the last column" in fairy.problem()


def test_other_formats_and_settings_are_refused(folder, packed_folder, tmp_path):
    with pytest.raises(ConfigError, match="fairy is for complex weights"):
        load_model(folder, weights="fairy")
    with pytest.raises(ConfigError, match="stages"):
        ConvertConfig(stages=2)
    with pytest.raises(ConfigError, match="stages"):
        ConvertConfig(quantize="fairy2i", stages=5)
    with pytest.raises(ConfigError, match="packs split projections"):
        ConvertConfig(quantize="fairy2i", projections="fused_qkv")
    config = packed_folder / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["stages"] = 3
    copy = damaged(packed_folder, tmp_path, lambda tensors: None)
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="stages"):
        load_model(copy)


def test_a_packed_checkpoint_is_converted_back(packed_folder, tmp_path):
    config = ConvertConfig(dtype="float32")
    convert(packed_folder, tmp_path / "plain", config, start=lambda total: lambda num_bytes: None)
    assert torch.equal(logits(load_model(tmp_path / "plain")), logits(load_model(packed_folder)))


def test_gradients_pass_through_packed_weights():
    x, weight = torch.randn(3, 50, requires_grad=True), pack(torch.randn(20, 50), Packing("fairy2i", 2))
    (ours,) = torch.autograd.grad(linear(x, weight).sum(), x)
    assert torch.allclose(ours, weight.dequantize(torch.float32).sum(dim=0).expand(3, -1), atol=1e-5)
