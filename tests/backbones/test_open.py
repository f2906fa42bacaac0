"""Models are open: what acts on modules (hooks, adapters, counters, ...) reaches all of them.

Each test uses the package that a user would use. A model that computes past its own modules
passes none of them, because such packages skip what is not called without saying so.
"""

import copy
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from linsight.backbones import ZOO
from linsight.backbones.blocks import PostNormBlock, TransformerBlock
from linsight.backbones.context import Context
from linsight.backbones.layers import BatchNormAct2d
from linsight.backbones.norms import PRepBN, set_training_progress
from linsight.kernels import force
from linsight.kernels.runtime.activation import activate
from linsight.tools.models import read_counts

from .conftest import lively

SIDE = 64


def smallest_of_each(kind: Callable[[str], Any]) -> list[str]:
    """The smallest model of each kind of models, a kind being what the function gives of a name."""
    parameters = {name: counts[0] for name, counts in read_counts().items()}
    names: dict[Any, str] = {}
    for name in sorted(ZOO, key=parameters.__getitem__):
        names.setdefault(kind(name), name)
    return sorted(names.values())


def smallest_with_each_part() -> list[str]:
    """Models of which at least one has each skeleton and each mixer."""
    names, seen = [], set()
    for name in FAMILIES:
        parts = {ZOO[name].family.skeleton, *mixers_of(name)}
        if not parts <= seen:
            names.append(name)
            seen |= parts
    return names


def mixers_of(name: str) -> tuple[str, ...]:
    """The names of the mixers of a model's stages."""
    mixer = (ZOO[name].family.config | ZOO[name].config)["mixer"]
    return (mixer,) if isinstance(mixer, str) else tuple(mixer)


FAMILIES = smallest_of_each(lambda name: id(ZOO[name].family))
SKELETONS = smallest_of_each(lambda name: ZOO[name].family.skeleton)
PARTS = smallest_with_each_part()


def few_blocks(name: str) -> dict[str, int | tuple[int, ...]]:
    """The arguments that leave a model few blocks, two of them in a stage with shifted windows."""
    config = ZOO[name].family.config | ZOO[name].config
    mixer = config.get("mixer", "")
    if not isinstance(mixer, str) and any(not isinstance(names, str) for names in mixer):
        return {}  # Its mixers are listed per block.
    return {"depths": (2, 1, 1, 1)} if "depths" in config else {"depth": 2}


def one_block_per_stage(name: str) -> dict[str, int | tuple[int, ...]]:
    """The arguments that leave a model as little as there is, for what takes long per layer."""
    return {"depths": (1, 1, 1, 1)} if "depths" in few_blocks(name) else {"depth": 1}


def create(name: str, **arguments) -> nn.Module:
    arguments = {"num_classes": 10, "img_size": SIDE} | few_blocks(name) | arguments
    return timm.create_model(name, **arguments)


def little(name: str, **arguments) -> nn.Module:
    """A model of few blocks in evaluation mode, in float64 so that comparisons are sharp."""
    return lively(create(name, **arguments).double())


def images(batch: int = 2) -> Tensor:
    """Images that are higher than wide, so that a transposed map cannot pass."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE // 2, dtype=torch.float64, generator=generator)


def one_image() -> Tensor:
    """An image for tests that make many passes."""
    return images(1)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if not any(part.children())}


def of_type(model: nn.Module, kind: type | tuple[type, ...]) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def put(model: nn.Module, name: str, part: nn.Module) -> None:
    """Replace the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def distance(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The number of times that each leaf module's `forward` runs in one pass."""
    counts = Counter()
    handles = [
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, part in leaves(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return {name: counts[name] for name in leaves(model)}


def not_once(model: nn.Module, x: Tensor) -> dict[str, int]:
    return {name: times for name, times in calls(model, x).items() if times != 1}


# Hooks.


class PastItsModules(nn.Module):
    """What models must not do: use the weight of a module without a call, and call one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(F.conv2d(x, self.conv.weight, self.conv.bias)))


def test_the_count_of_calls_sees_a_model_that_goes_past_its_modules():
    assert not_once(PastItsModules(), torch.randn(1, 3, 8, 8)) == {"conv": 0, "act": 2}


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_the_count_of_calls_agrees_with_timms_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        # timm's fused attention gives the rate of its dropout to PyTorch's operator.
        timms_own = {name: 0 for name in leaves(model) if name.endswith(".attn_drop")}
        assert not_once(model, torch.empty(1, 3, 224, 224)) == timms_own


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ZOO)
def test_each_leaf_module_runs_once_per_pass(name, training):
    with torch.device("meta"), force("reference"):
        model = create(name, drop_path_rate=0.1).train(training)
        assert not_once(model, torch.empty(2, 3, SIDE, SIDE)) == {}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_leaf_module_runs_once_where_kernels_run(name, training, monkeypatch):
    """The models take the paths of the Triton kernels, of which none is launched."""
    from triton.runtime.jit import KernelInterface

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launches = []
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda *_: lambda *args, **options: launches.append(args)
    )
    model = create(name, drop_path_rate=0.1).train(training)
    with force("triton"):
        assert not_once(model, torch.randn(2, 3, SIDE, SIDE)) == {}
    assert launches


# Folding constants.


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_constants_keep_the_outputs(name):
    model, x = little(name), images()
    folded = reparameterize_model(model)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_leaf_module_runs_once_after_folding(name):
    with torch.device("meta"), force("reference"):
        model = reparameterize_model(create(name).eval())
        assert not_once(model, torch.empty(2, 3, SIDE, SIDE)) == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_leaves_no_batch_norm_after_a_convolution(name):
    """Only a batch norm that follows no convolution or linear layer directly may be left."""
    before, after = create(name).eval(), reparameterize_model(create(name).eval())
    kinds = nn.modules.batchnorm._BatchNorm
    if of_type(before, kinds):
        assert len(of_type(after, kinds)) < len(of_type(before, kinds))


# Adapters.


def adapted(model: nn.Module) -> nn.Module:
    """The model with an adapter at each linear layer, as peft initialises it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(model, config)
    # peft keeps adapters in float32.
    return model.double()


def test_peft_can_be_imported_from_a_checkout():
    """No folder of the repository may hide a package that others import by the same name."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", "import linsight.backbones, peft"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The weights `lora_B`, which begin at zero, so that adapters change nothing at first."""
    return {name: p for name, p in model.named_parameters() if ".lora_B." in name}


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_trains_all_linear_layers_and_nothing_else(name):
    model = adapted(little(name)).train()
    assert len(scales(model)) == len(of_type(little(name), nn.Linear))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    F.cross_entropy(model(images()), torch.tensor([1, 3])).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(scales(model))


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_each_lora_adapter_changes_the_output(name):
    model, x = adapted(little(name)), one_image()
    wanted = model(x)
    silent = []
    for layer, scale in scales(model).items():
        nn.init.normal_(scale)
        if distance(model(x), wanted) < 1e-9:
            silent.append(layer)
        nn.init.zeros_(scale)
    assert silent == []


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_merged_lora_gives_the_same_output(name):
    model, x = adapted(little(name)), images()
    for scale in scales(model).values():
        nn.init.normal_(scale, std=0.1)
    wanted = model(x)
    assert distance(wanted, little(name)(x)) > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


# Counters of operations.


@pytest.mark.parametrize(
    ("name", "kernels"),
    [(name, "triton") for name in ZOO] + [(name, "reference") for name in SKELETONS],
)
def test_operations_counted_by_pytorch(name, kernels):
    """What docs/zoo.md says, from a user's call; a model in training counts the same."""
    with torch.device("meta"), force(kernels):
        model = timm.create_model(name).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    _, multiply_adds = read_counts()[name]
    assert counter.get_total_flops() == pytest.approx(2 * multiply_adds, rel=0.01)


def count_attention(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of `scaled_dot_product_attention`, which fvcore does not know."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    *batch, tokens, dim = query
    pairs = torch.Size(batch).numel() * tokens * key[-2]
    return Counter(attention=pairs * (dim + value[-1]))


# How fvcore names the operators that it counts.
PRODUCTS = ("addmm", "attention", "bmm", "conv", "einsum", "linear", "matmul")
NO_PRODUCTS = ("adaptive_avg_pool2d", "batch_norm", "layer_norm", "upsample_bilinear2d")


@pytest.mark.parametrize("name", PARTS)
def test_operations_counted_by_fvcore(name):
    from fvcore.nn import FlopCountAnalysis

    # PyTorch cannot trace a convolution on the meta device, so this computes.
    model = timm.create_model(name).eval().requires_grad_(False)
    counter = FlopCountAnalysis(model, torch.randn(1, 3, 224, 224))
    counter.set_op_handle("aten::scaled_dot_product_attention", count_attention)
    counter.unsupported_ops_warnings(False)
    # docs/zoo.md counts convolutions and matrix products alone, fvcore norms and pooling besides.
    counts = counter.by_operator()
    products = sum(counts[kind] for kind in PRODUCTS)
    assert products == pytest.approx(read_counts()[name][1], rel=0.01)
    assert counts.keys() <= {*PRODUCTS, *NO_PRODUCTS}
    # fvcore calls a module uncalled, too, if it computes nothing that is traced.
    uncalled = [part for part in counter.uncalled_modules() if has_weights(model, part)]
    assert uncalled == []


def has_weights(model: nn.Module, name: str) -> bool:
    return any(True for _ in model.get_submodule(name).parameters(recurse=False))


# Quantisation.


def float32(name: str, **arguments) -> tuple[nn.Module, Tensor]:
    """A model as it is quantised, with its constants folded, and its images."""
    return reparameterize_model(lively(create(name, **arguments))), images().float()


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_torchao_quantises_each_linear_layer(name, config):
    from torchao import quantization
    from torchao.utils import TorchAOBaseTensor

    model, x = float32(name)
    wanted = model(x)
    quantization.quantize_(model, getattr(quantization, config)())
    linear = of_type(model, nn.Linear)
    assert [n for n, m in linear.items() if not isinstance(m.weight, TorchAOBaseTensor)] == []
    assert 0 < distance(model(x), wanted) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_dynamic_quantisation_replaces_each_linear_layer(name):
    model, x = float32(name)
    wanted = model(x)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    found = of_type(quantized, torch.ao.nn.quantized.dynamic.Linear)
    assert set(found) == set(of_type(model, nn.Linear))
    assert of_type(quantized, nn.Linear) == {}
    got = quantized(x)
    assert distance(got, wanted) > 0
    # The error of eight bits is PyTorch's: the model is to compute what these layers give.
    for layer, part in of_type(model, nn.Linear).items():
        part.register_forward_hook(give(found[layer]))
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("name", SKELETONS)
def test_pt2e_quantises_each_convolution_and_linear_layer(name):
    from torchao.quantization.pt2e import quantize_pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, x = float32(name, **one_block_per_stage(name))
    with torch.no_grad():
        wanted = model(x)
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    # Without `strict` a program tells the quantiser no functions, only the classes of modules, of
    # which it knows PyTorch's own convolution but none that derives from it.
    program = torch.export.export(model, (x,), strict=True)
    prepared = pt2e.prepare_pt2e(program.module(), quantizer)
    prepared(x)
    quantized = pt2e.convert_pt2e(prepared, fold_quantize=False)
    weights = {
        node.args[0].target
        for node in quantized.graph.nodes
        if node.target is torch.ops.quantized_decomposed.quantize_per_channel.default
    }
    layers = of_type(model, (nn.Linear, nn.Conv2d))
    assert {f"{name}.weight" for name in layers} - weights == set()
    with torch.no_grad():
        assert 0 < distance(quantized(x), wanted) < 0.1


# Maps of what a class depends on (Grad-CAM).


def as_map(tokens: Tensor, prefix: int, height: int, width: int) -> Tensor:
    """Tokens (B, P + H * W, C) or a map (B, H, W, C) as (B, C, H, W), which Grad-CAM draws."""
    if tokens.ndim == 3:
        tokens = tokens[:, prefix:].unflatten(1, (height, width))
    return tokens.permute(0, 3, 1, 2)


def grad_cam_target(model: nn.Module, where: str) -> nn.Module:
    last = model.stages[-2] if hasattr(model, "stages") else model.blocks
    if where == "stage":
        return last if hasattr(model, "stages") else last[-2]
    block = (last.blocks if hasattr(model, "stages") else last)[-1]
    # The norms of a post-norm block give the residual sum besides, which is no map to draw.
    return block.mlp if isinstance(block, PostNormBlock) else block.norm1


@pytest.mark.parametrize("where", ["stage", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_grad_cam_draws(name, where):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = lively(create(name)), images().float()
    # The last stage but one has a map of more than a few pixels; the plain ViT has one stride.
    height, width = x.shape[2] // 16, x.shape[3] // 16
    prefix = 0 if hasattr(model, "stages") else model.num_prefix_tokens
    cam = GradCAM(
        model,
        [grad_cam_target(model, where)],
        reshape_transform=partial(as_map, prefix=prefix, height=height, width=width),
    )
    # A map whose weights are all negative is drawn as zeros, so each class is drawn once.
    classes = [ClassifierOutputTarget(label) for label in range(10)]
    drawn = cam(input_tensor=x[:1].expand(10, -1, -1, -1), targets=classes)
    assert drawn.shape == (10, *x.shape[2:])
    assert (drawn.std((1, 2)) > 0.01).sum() >= 3


# Copies.


def assert_copies_agree(model: nn.Module, x: Tensor) -> None:
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        with torch.no_grad():
            wanted = copy.deepcopy(model)(x)
            assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_agree(name):
    model, x = little(name), images()
    with torch.inference_mode():
        model(x)
    assert_copies_agree(model, x)
    model.train()
    model(x).square().sum().backward()
    assert_copies_agree(model, x)
    folded = reparameterize_model(model.eval())
    with torch.inference_mode():
        folded(x)
    assert_copies_agree(folded, x)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_weights_of_its_own(name):
    model, x = little(name), images()
    with torch.no_grad():
        wanted = model(x)
        for parameter in copy.deepcopy(model).parameters():
            parameter.zero_()
        assert torch.equal(model(x), wanted)


# Other modules in the place of the model's own.


class Poison(nn.Module):
    """A module that stands for the given one, and whose outputs are all NaN.

    Attributes of the given module that are no tensors can be read, because a model may ask for the
    width of a layer. Its weights cannot: code that reads them computes past the module.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.part._parameters or name in self.part._buffers:
                raise
            return getattr(self.part, name)

    def forward(self, *args, **kwargs):
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda x: torch.full_like(x, torch.nan), self.part(*args, **kwargs)
        )


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_poisoned_leaf_module_poisons_the_output(name):
    # Pooled over its map, a model's output depends on the last block's convolutions of the map,
    # which the class token, read by default, does not see.
    model, x = lively(create(name, global_pool="avg")), one_image().float()
    clean, failures = [], {}
    for leaf, part in leaves(model).items():
        put(model, leaf, Poison(part))
        try:
            # PyTorch's fused attention on a CPU gives zeros for NaN queries if keys are few.
            with sdpa_kernel(SDPBackend.MATH):
                if not model(x).isnan().all():
                    clean.append(leaf)
        except AttributeError as error:
            failures[leaf] = str(error)
        put(model, leaf, part)
    assert (clean, failures) == ([], {})


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
# Classes are compared by name, because timm has its own versions of some of PyTorch's.
ACTIVATIONS = {"GELU", "GELUTanh", "ReLU", "SiLU", "Swish", "Hardswish", "HardSwish", "Tanh", "ELU"}


class NormOfChannels(nn.Module):
    """Root-mean-square norm over the axis of `channels`, which can replace any norm of a model."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        shape = getattr(norm, "normalized_shape", None) or (norm.num_features,)
        self.weight = nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        # PyTorch's batch and group norms have channels second, other norms may have them last.
        own = type(norm).__module__.startswith("torch.nn")
        self.second = own and not hasattr(norm, "normalized_shape")

    def forward(self, x: Tensor) -> Tensor:
        last = x.shape[-1] == self.weight.numel() and not self.second
        x = x if last else x.movedim(1, -1)
        x = F.rms_norm(x, self.weight.shape, self.weight)
        return x if last else x.movedim(-1, 1)


def convolution_like(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution of PyTorch with the shapes of `conv`, but other weights, padding, dilation."""
    wide = conv.kernel_size[0] % 2 == 1 and conv.kernel_size[0] > 1
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        # A dilation of two needs twice the padding for as many outputs.
        padding=tuple(2 * side for side in conv.padding) if wide else conv.padding,
        dilation=2 if wide else 1,
        groups=conv.groups,
        padding_mode="circular" if any(conv.padding) and not wide else "zeros",
        dtype=torch.float64,
    )


def observe(model: nn.Module, leaf: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the output of a leaf module."""
    seen = []
    handle = model.get_submodule(leaf).register_forward_hook(
        lambda part, args, output: seen.append((args[0], output))
    )
    model(x)
    handle.remove()
    assert len(seen) == 1, f"{leaf} ran {len(seen)} times"
    return seen[0]


def other_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Modules that a user may put in the place of a leaf."""
    if type(part).__name__ in ACTIVATIONS:
        # timm's Swish is PyTorch's SiLU.
        own = {"Swish": "SiLU"}.get(type(part).__name__, type(part).__name__)
        yield from (act() for act in (nn.SiLU, nn.ReLU, nn.Tanh) if act.__name__ != own)
    elif isinstance(part, nn.Linear):
        yield nn.Linear(part.in_features, part.out_features, dtype=torch.float64)
        yield nn.Sequential(copy.deepcopy(part), nn.Tanh())
    elif isinstance(part, NORMS):
        yield NormOfChannels(part)
        other = copy.deepcopy(part)
        for weight in other.parameters():
            nn.init.normal_(weight)
        yield other
        if isinstance(part, nn.BatchNorm2d) and type(part) is nn.BatchNorm2d:
            yield nn.GroupNorm(1, part.num_features, dtype=torch.float64)
    elif isinstance(part, nn.Conv2d):
        yield convolution_like(part)


def give(other: nn.Module) -> Callable:
    """A hook that gives another module's result in the place of its module's own."""

    def hook(part: nn.Module, args: tuple, output: Tensor | tuple[Tensor, Tensor]) -> Any:
        # A norm of the model's own class may give a residual sum, and that sum normalised.
        if isinstance(output, tuple):
            return output[0], other(output[0])
        # Another norm takes the place of the norm alone; the model still activates its result.
        activates = isinstance(part, BatchNormAct2d) and not isinstance(other, BatchNormAct2d)
        return activate(other(*args), part.activation) if activates else other(*args)

    return hook


def replace(
    model: nn.Module, others: dict[str, nn.Module], x: Tensor, plain: Tensor
) -> dict[str, str]:
    """What is wrong with the output when other modules stand in the place of leaves.

    Args:
        model: given back as it was.
        others: the other modules, by the names of the leaves.
        x: images.
        plain: the model's own output.

    Returns:
        The faults by leaf, which are looked for only if the leaves together have one.
    """
    parts = {leaf: model.get_submodule(leaf) for leaf in others}
    handles = [parts[leaf].register_forward_hook(give(other)) for leaf, other in others.items()]
    try:
        wanted = model(x)
        for handle in handles:
            handle.remove()
        for leaf, other in others.items():
            put(model, leaf, other)
        got = model(x)
        fault = "" if torch.equal(got, wanted) else f"{distance(got, wanted):.1e} off"
        if distance(got, plain) < 1e-9:
            fault = "changes nothing"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
        for leaf, part in parts.items():
            put(model, leaf, part)
    if not fault:
        return {}
    if len(others) == 1:
        return {leaf: f"{type(other).__name__}: {fault}" for leaf, other in others.items()}
    singly = [replace(model, {leaf: other}, x, plain) for leaf, other in others.items()]
    faults = {leaf: text for found in singly for leaf, text in found.items()}
    return faults or {", ".join(others): fault}


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_another_module_computes_in_the_place_of_a_leaf(name):
    """The output is what it is when a hook puts the other module's result in the leaf's place.

    All leaves of a kind are replaced together, while the layers between them are the model's own;
    that each one has an effect is shown by the poison.
    """
    # Windows that divide the map: no hook can tell what stands at the places of a padded one.
    options = {"mixer_options": {"window": {"window_size": 4}}} if "swin" in name else {}
    if "window" not in mixers_of(name):
        options = {}
    model, x = little(name, **options), images()
    plain = model(x)
    faults = {leaf: "does not run" for leaf, times in calls(model, x).items() if times != 1}
    rounds, kinds = defaultdict(dict), set()
    for leaf, part in leaves(model).items():
        if leaf in faults:
            continue
        for number, other in enumerate(other_modules(part)):
            kinds.add(type(part))
            # A batch norm that has just been made would train.
            rounds[kind_of(part), number][leaf] = other.eval()
    for others in rounds.values():
        faults |= replace(model, others, x, plain)
    assert faults == {}
    for expected in (nn.Conv2d, nn.Linear, NORMS):
        assert any(issubclass(kind, expected) for kind in kinds), f"none of {expected} is a leaf"
    assert any(kind.__name__ in ACTIVATIONS for kind in kinds), "no activation is a leaf"


def kind_of(part: nn.Module) -> str:
    """What a leaf is, for its replacement together with others."""
    kinds = {nn.Linear: "linear", nn.Conv2d: "convolution"} | dict.fromkeys(NORMS, "norm")
    return next((kind for base, kind in kinds.items() if isinstance(part, base)), "activation")


@torch.inference_mode()
def test_another_projection_stands_at_padded_places():
    """Tokens of zeros around a map are projected by whatever module projects the others."""
    model, x = little("softmax_swin_tiny"), images()
    wanted = model(x)
    for leaf, part in of_type(model, nn.Linear).items():
        if leaf.endswith("in_proj"):
            put(model, leaf, nn.Sequential(part, nn.Identity()))
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("dilation", lambda conv: {"dilation": 2, "padding": tuple(2 * p for p in conv.padding)}),
        ("padding_mode", lambda conv: {"padding_mode": "circular"}),
        ("groups", lambda conv: {"groups": 1 if conv.groups > 1 else 2}),
    ],
    ids=["dilation", "padding_mode", "groups"],
)
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_convolutions_heed_their_own_attributes(name, attribute, change):
    """A convolution of the model's class computes what PyTorch's with the same attributes computes.

    A class that is no plain convolution (it adds its input, or applies an activation) must change
    its output.
    """
    model, x = little(name), images()
    failures = {}
    for leaf, part in of_type(model, nn.Conv2d).items():
        sides = {*part.padding, *(side // 2 for side in part.kernel_size)}
        if attribute != "groups" and (sides == {0} or len(sides) > 1):
            continue  # Without a border of half the kernel, neither keeps the shape or has effect.
        if attribute == "groups" and (part.in_channels % 2 or part.out_channels % 2):
            continue
        shape = {
            "stride": part.stride,
            "padding": part.padding,
            "groups": part.groups,
            "bias": part.bias is not None,
        }
        peer = nn.Conv2d(
            part.in_channels, part.out_channels, part.kernel_size, **shape | change(part)
        ).double()
        try:
            given, before = observe(model, leaf, x)
            other = copy.deepcopy(part)
            other.__dict__.update(
                {key: value for key, value in vars(peer).items() if not key.startswith("_")}
            )
            other._reversed_padding_repeated_twice = peer._reversed_padding_repeated_twice
            # The groups' number is in the shape of the weights.
            if attribute == "groups":
                other.weight = peer.weight
            else:
                peer.weight = part.weight
            peer.bias = other.bias
            wanted = peer(given)
            put(model, leaf, other)
            _, got = observe(model, leaf, x)
            put(model, leaf, part)
        except (AssertionError, RuntimeError, ValueError) as error:
            put(model, leaf, part)
            failures[leaf] = f"{type(error).__name__}: {error}"
            continue
        if distance(got, before) < 1e-9:
            failures[leaf] = "changes nothing"
        elif is_plain(part, given, before) and distance(got, wanted) > 1e-9:
            failures[leaf] = f"{distance(got, wanted):.1e} off"
    assert failures == {}


def is_plain(conv: nn.Conv2d, x: Tensor, output: Tensor) -> bool:
    """Whether a module gives a convolution of its first input, and nothing more."""
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.shape == output.shape and distance(output, y) < 1e-9


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_synchronised_batch_norms_keep_the_outputs(name):
    """The conversions of PyTorch and timm lose no activation together with a norm."""
    model, x = little(name), images()
    wanted = model(x)
    norms = of_type(model, nn.modules.batchnorm._BatchNorm)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # timm has its own conversion for its norms with an activation.
    synchronised = timm.layers.convert_sync_batchnorm(synchronised)
    assert set(of_type(synchronised, nn.SyncBatchNorm)) == set(norms)
    torch.testing.assert_close(synchronised(x), wanted)


# Axes.


class Halved(TransformerBlock):
    """A block of the user's own, which any skeleton holds."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return 0.5 * super().forward(x, context)


def norms_of_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of each block, without the norms of its mixer."""
    return {
        name: part
        for name, part in leaves(model).items()
        if "norm" in name.rpartition(".")[2]
        and "blocks." in name
        and ".mixer." not in name
        and not isinstance(part, nn.Identity)  # timm's MLPs have a place for a norm
    }


def parts_of_mlps(model: nn.Module) -> list[nn.Module]:
    return [part for name, part in model.named_modules() if ".mlp" in name]


def assert_trains(model: nn.Module) -> None:
    """Each parameter gets a gradient."""
    model = lively(model.double()).train()
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "axes",
    [
        {"norm_layer": "prepbn", "act_layer": "relu"},
        {"mlp_layer": timm.layers.GluMlp, "block": Halved},
    ],
    ids=["norm-activation", "mlp-block"],
)
@pytest.mark.parametrize("name", SKELETONS)
def test_another_model_exports(name, axes):
    """An exported program of a model whose parts are others gives the same output."""
    model, x = little(name, **one_block_per_stage(name), **axes), images()
    with torch.inference_mode():
        wanted = model(x)
    program = torch.export.export(model, (x,))
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), wanted)


def is_called(name: str) -> Callable[[nn.Module], bool]:
    return lambda part: type(part).__name__.lower() == name


NORM_LAYERS = {
    "prepbn": ("prepbn", is_called("prepbn")),
    "rmsnorm": ("rmsnorm", is_called("rmsnorm")),
    "layernorm": ("layernorm", lambda part: isinstance(part, nn.LayerNorm)),
    "partial": (
        partial(timm.layers.LayerNorm, eps=0.125),
        lambda part: isinstance(part, timm.layers.LayerNorm) and part.eps == 0.125,
    ),
}


@pytest.mark.parametrize("norm_layer", NORM_LAYERS)
@pytest.mark.parametrize("name", SKELETONS)
def test_another_norm(name, norm_layer):
    value, is_chosen = NORM_LAYERS[norm_layer]
    norms = norms_of_blocks(create(name))
    model = create(name, norm_layer=value)
    assert norms_of_blocks(model).keys() == norms.keys() != set()
    assert [n for n, part in norms_of_blocks(model).items() if not is_chosen(part)] == []
    assert_trains(model)


def test_a_progressive_norm_moves_from_layer_to_batch_norm():
    """As SLAB trains it: the output of training depends on how far training is."""
    model, x = lively(create("rala_vit_nano", norm_layer="prepbn").double()).train(), images()
    assert of_type(model, PRepBN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        outputs = []
        for progress in (0, 0.5, 1):
            set_training_progress(model, progress)
            assert {part.progress.item() for part in of_type(model, PRepBN).values()} == {progress}
            outputs.append(model(x))
    assert distance(outputs[1], outputs[0]) > 1e-3
    assert distance(outputs[1], outputs[2]) > 1e-3


ACT_LAYERS = {"relu": nn.ReLU, "silu": nn.SiLU, nn.ReLU: nn.ReLU}


def has_activation(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is an activation, or a layer that the kernels compute together with it."""
    return isinstance(part, kind) or getattr(part, "activation", None) == kind.__name__.lower()


@pytest.mark.parametrize("act_layer", ACT_LAYERS)
@pytest.mark.parametrize("name", SKELETONS)
def test_another_activation(name, act_layer):
    model = create(name, act_layer=act_layer)
    parts = parts_of_mlps(model)
    assert not any(type(part).__name__ == "GELU" for part in parts)
    blocks = [n for n, _ in model.named_modules() if n.rpartition(".")[0].endswith("blocks")]
    assert sum(has_activation(part, ACT_LAYERS[act_layer]) for part in parts) == len(blocks) > 0
    assert_trains(model)


@pytest.mark.parametrize("name", SKELETONS)
def test_another_feed_forward_network(name):
    model = create(name, mlp_layer=timm.layers.GluMlp)
    mlps = [part for n, part in model.named_modules() if n.endswith(".mlp")]
    assert mlps
    assert {type(part) for part in mlps} == {timm.layers.GluMlp}
    assert_trains(model)


def blocks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each stage."""
    return (
        [list(s.blocks) for s in model.stages] if hasattr(model, "stages") else [list(model.blocks)]
    )


@pytest.mark.parametrize("name", SKELETONS)
def test_another_block(name):
    """The block is given as one class for all depths, and as one per depth."""
    default = create(name)
    kind = type(blocks_of(default)[0][0])

    class Doubled(kind):
        def forward(self, x, context):
            return 2 * super().forward(x, context)

    all_doubled = create(name, block=Doubled)
    assert {type(block) for stage in blocks_of(all_doubled) for block in stage} == {Doubled}
    assert_trains(all_doubled)

    wanted = [[type(block) for block in stage] for stage in blocks_of(default)]
    wanted[0][1] = Doubled
    mixed = create(name, block=wanted)
    assert [[type(block) for block in stage] for stage in blocks_of(mixed)] == wanted
    default, mixed = lively(default.double()), mixed.double().eval()
    mixed.load_state_dict(default.state_dict())
    block = blocks_of(default)[0][1]
    block.register_forward_hook(lambda _, args, output: 2 * output)
    with torch.inference_mode():
        torch.testing.assert_close(mixed(images()), default(images()))
