"""Compressed activations: unbiased or exact by the function that saves, few bytes, and nothing else touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hvd_compress import kernels
from hvd_compress.activations import RULES, CompressedActivations
from hvd_compress.kernels import affine

EXACT = {
    "relu": F.relu,
    "relu of a tensor": lambda x: x.relu(),
    "relu in place": lambda x: F.relu_(x * 1),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "masked fill": lambda x: x.masked_fill(x > 0.5, 0.25),
    "division": lambda x: 1 / (x.abs() + 0.1),
    "square root": lambda x: (x.abs() + 0.1).sqrt(),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "softmax and a product": lambda x: x.softmax(-1) @ torch.ones(16, 3),
    "cumulative product": lambda x: x[..., :3].cumprod(-1),
    "indexing": lambda x: x.flatten()[torch.arange(2000) % 7],
}
UNBIASED = {
    "linear": lambda: nn.Linear(16, 16),
    "convolution": lambda: nn.Conv2d(4, 8, 3),
    "product": lambda: Applied(lambda x: x * x.detach().cos()),
    "matrix product": lambda: Applied(lambda x: x @ x.detach().transpose(-1, -2)),
    "layer norm": lambda: Applied(lambda x: F.layer_norm(x, x.shape[1:])),
    "batch norm": lambda: Applied(lambda x: F.batch_norm(x, None, None, training=True)),
    "exponential": lambda: Applied(lambda x: x.exp()),
}


class Applied(nn.Module):
    """A function of a data tensor and of a parameter of its shape."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.weight - 1)


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)).sum()


def gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Of the data and of all parameters, in one."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    y = model(x)
    (loss or loss_of)(y).backward()
    wanted = [p.grad for p in model.parameters()] + ([x.grad] if x.grad is not None else [])
    return torch.cat([gradient.reshape(-1) for gradient in wanted])


class Net(nn.Module):
    """A convolutional network with all that these are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def data(of: nn.Module) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(8, 4, 32, 32) if isinstance(of, Net) else torch.randn(8, 64, 64)[:, :32]


# The quantiser


def test_worked_example():
    """Of 0.5 to 2 in two bits: steps of a half, and up by the part of a step that is left where the number is less."""
    values = torch.tensor([0.5, 2.0, 1.0, 1.25, 1.25, 0.6, 0.6, 1.9])
    uniform = torch.tensor([0.99, 0.0, 0.99, 0.4999, 0.5, 0.75, 0.85, 0.25])
    low, span = affine.ranges_of(values)
    parts = affine.pack_affine(values, low, span, 2, (uniform * 2**24).to(torch.int32))
    payload = torch.cat(parts)
    assert payload.numel() == affine.affine_bytes(8, 2) == 8 + 64
    assert parts[0].view(torch.float32).tolist() == [0.5, 0.5]
    assert affine.unpack_affine(payload, 8, 2).tolist() == [0.5, 2.0, 1.0, 1.0, 1.5, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_quantiser_is_unbiased(bits):
    values = images().view(-1)
    total = torch.zeros_like(values)
    step = 2 * values.abs().max() / (2**bits - 1)
    for turn in range(400):
        payload, out = (
            torch.empty(affine.affine_bytes(values.numel(), bits), dtype=torch.uint8),
            torch.empty_like(values),
        )
        kernel = kernels.of(values)
        assert kernel.affine_encode(values, bits, kernels.stream_key(turn), payload) == payload.numel()
        kernel.affine_decode(payload, bits, out)
        assert (out - values).abs().max() <= step
        total += out
    assert (total / 400 - values).abs().max() < step / 2 / 400**0.5 * 5.5


# Functions


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    """Gradients are those without, to the bit: by signs and shapes, or for functions that are left alone."""
    model, x = Applied(EXACT[name]), images()
    plain = gradients(model, x)
    with CompressedActivations(model, 1, nonlinear_bits=1):
        assert torch.equal(gradients(model, x), plain)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name):
    """The mean over passes tends to the gradient without: the error of that of 64 is an eighth of that of one."""
    torch.manual_seed(0)
    model, x = UNBIASED[name](), images()
    plain = gradients(model, x)[1:]  # without that of the one weight of Applied, a sum
    with CompressedActivations(model, 2) as activations:
        several = torch.stack([gradients(model, x)[1:] for _ in range(64)])
        assert activations.saved.ratio > 1
    one, mean = (several - plain).norm(dim=1).mean(), (several.mean(0) - plain).norm()
    assert one > 0
    assert mean < one / 8 * 1.3


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, torch.sigmoid])
def test_nonlinear(function):
    """Not unbiased, hence in more bits, whatever is asked for what is linear."""
    model, x = Applied(function), images()
    plain = gradients(model, x)
    errors = []
    for bits in (4, 8):
        with CompressedActivations(model, 1, nonlinear_bits=bits):
            errors.append(float((gradients(model, x) - plain)[1:].norm() / plain[1:].norm()))
    assert 0 < errors[1] < errors[0] / 8
    assert errors[0] < 0.2


def test_leaky_relu_of_a_small_slope_knows_what_is_negative():
    model, x = Applied(lambda x: F.leaky_relu(x * 1e-20, 0.2, inplace=True)), images()
    plain = gradients(model, x)
    with CompressedActivations(model, 1):
        assert torch.equal(gradients(model, x), plain)


def test_dropout_keeps_its_mask():
    """Which it has as numbers, on the CPU: two values are exact even in one bit, up to rounding."""
    model, x = Applied(lambda x: F.dropout(x, 0.3)), images()
    plain = gradients(model, x)
    with CompressedActivations(model, 1) as activations:
        torch.testing.assert_close(gradients(model, x), plain)
    assert activations.saved.ratio > 20


def test_every_rule_names_a_function():
    for name in RULES:
        owners = (torch, F, Tensor, torch._C._nn)
        assert any(hasattr(owner, name) for owner in owners), name


# Models


@pytest.mark.parametrize("of", [net, transformer])
def test_memory(of):
    """At two bits at least eight times less, by what is counted and by what the hooks of autograd see."""
    model = of()
    x, storages = data(model), {}

    def seen(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 1024:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        model(x)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    dense = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    with CompressedActivations(model) as activations:
        model(x).sum().backward()
    saved = activations.saved
    assert saved.ratio > 8
    assert abs(saved.dense_bytes - dense) < 0.02 * dense
    layers = activations.saved_by_layer().values()
    assert sum(layer.saved_bytes for layer in layers) == saved.saved_bytes


@pytest.mark.parametrize("of", [net, transformer])
def test_eight_bits_are_close(of):
    model = of()
    x = data(model)
    plain = gradients(model, x)
    with CompressedActivations(model, 8, nonlinear_bits=8):
        compressed = gradients(model, x)
    assert 0 < (compressed - plain).norm() < 0.01 * plain.norm()
    assert torch.equal(gradients(model, x), plain)  # and gone


@pytest.mark.parametrize("of", [net, transformer])
def test_autocast(of):
    """What is made of a weight in bfloat16 is no activation; or its noise would be in all gradients."""
    model = of()
    x = data(model)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, x, lambda y: y.float().square().mean())

    plain = run()
    with CompressedActivations(model, 8, nonlinear_bits=8) as activations:
        assert (run() - plain).norm() < 0.03 * plain.norm()
        assert activations.saved.ratio > 1.5
    copies = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: copies.append(t) or t, lambda t: t):
        run()
    assert any(t.dtype == torch.bfloat16 and t.numel() in {p.numel() for p in model.parameters()} for t in copies)


def test_parameters_and_statistics_stay():
    """A layer whose input needs no gradient has its own from the input alone, one that is exact here."""
    model, x = nn.Linear(64, 64), torch.eye(64).repeat(4, 1)  # of zeros and ones, which one bit can tell
    plain = gradients(model, x)
    with CompressedActivations(model, 1) as activations:
        assert torch.equal(gradients(model, x), plain)
    assert activations.saved.dense_bytes == x.nbytes


@pytest.mark.parametrize("x", [images(dtype=torch.float64), images()[:1, :1], images() * 3e38], ids=str)
def test_what_is_not_quantised_stays(x):
    """Double precision, little, and what is not finite."""
    model = Applied(lambda x: x.exp() * x)
    plain = gradients(model, x)
    with CompressedActivations(model, 1):
        assert torch.equal(gradients(model, x).nan_to_num(7.0), plain.nan_to_num(7.0))


def test_memory_that_is_freed_and_used_again_is_not_mistaken():
    """Each input is freed as soon as it is quantised, so that the next one takes its place."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(128, 128), nn.Tanh())))
    x = torch.randn(64, 128)
    plain = gradients(model, x)
    with CompressedActivations(model, 8, nonlinear_bits=8):
        assert (gradients(model, x) - plain).norm() < 0.05 * plain.norm()


def test_a_tensor_that_several_save_is_kept_once():
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(
                layer(x.view(shape)).sum() for layer, shape in zip(self.layers, [(64, 64), (2, 32, 64), (64, 64)])
            )

    model = Thrice()
    with CompressedActivations(model, 2) as activations:
        model(torch.randn(64, 64)).backward()
    assert activations.saved.saved_bytes == kernels.affine_bytes(64 * 64, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_keeps_what_it_keeps(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = net(), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(checkpoint(self.inner, x, use_reentrant=reentrant))

    model, x = Checkpointed(), data(net())
    plain = gradients(model, x)
    with CompressedActivations(model, 1) as activations:
        assert torch.equal(gradients(model, x), plain)  # what the outer layer saves is little
        assert activations.saved.dense_bytes < 2 * x.nbytes


def test_channels_last():
    model = net().to(memory_format=torch.channels_last)
    x = data(model).to(memory_format=torch.channels_last)
    plain = gradients(model, x)
    with CompressedActivations(model, 8):
        assert (gradients(model, x) - plain).norm() < 0.01 * plain.norm()


def test_accumulated_and_repeated_backward():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    x = torch.randn(64, 64)
    with CompressedActivations(model) as activations:
        first, second = model(x).sum(), model(-x).square().sum()  # two passes, whose backward is yet to come
        first.backward(retain_graph=True)
        one = model[1].weight.grad.clone()
        first.backward()
        assert torch.equal(model[1].weight.grad, 2 * one)
        second.backward()
        assert activations.state_dict() == {"passes": 2, "bits": 2, "chosen": {}}


def test_no_gradient_nothing_kept():
    model = net().eval()
    with CompressedActivations(model) as activations, torch.no_grad():
        model(data(model))
    assert activations.saved.dense_bytes == 0


def test_a_forward_that_raises_leaves_nothing_behind():
    model = Applied(lambda x: (_ for _ in ()).throw(KeyError("inside")))
    with CompressedActivations(model, 1):
        with pytest.raises(KeyError, match="inside"):
            model(images())
        x = images().requires_grad_()
        (x * x).sum().backward()  # outside of the model
        assert torch.equal(x.grad, 2 * x.detach())
        model.function = lambda x: x * x.detach()
        assert not torch.equal(gradients(model, images())[1:], images().view(-1))


def test_resumes_to_the_same_bits():
    model, x = net(), data(net())
    with CompressedActivations(model, seed=3) as activations:
        gradients(model, x)
        state = activations.state_dict()
        second, third = gradients(model, x), gradients(model, x)
    assert not torch.equal(second, third)
    with CompressedActivations(model, seed=3) as activations:
        activations.load_state_dict(state)
        assert torch.equal(gradients(model, x), second)
        assert torch.equal(gradients(model, x), third)
    with CompressedActivations(model, seed=4) as activations:
        activations.load_state_dict(state)
        assert not torch.equal(gradients(model, x), second)


# Bits for each layer


def test_layers_have_the_bits_that_they_are_given():
    model, x = net(), data(net())
    with CompressedActivations(model, layers={"head.*": 0, "body.[0-3]": 8, "body.*": 1}) as activations:
        gradients(model, x)
        layers = activations.saved_by_layer()
    assert layers["head.2"].ratio == 1
    assert 3.5 < layers["body.0"].ratio < 4
    assert 24 < layers["body.4"].ratio < 26


def test_chosen_bits_send_less_and_make_no_more_noise():
    model, x = transformer(), data(transformer())
    numel = sum(p.numel() for p in model.parameters())
    plain = gradients(model, x)[:numel]

    def noise() -> float:
        return sum(float((gradients(model, x)[:numel] - plain).square().sum()) for _ in range(8))

    with CompressedActivations(model, 2) as activations:
        uniform, before = noise(), activations.saved.saved_bytes
        state = torch.get_rng_state(), gradients(model, x)
        chosen = activations.choose_bits(lambda: loss_of(model(x)), alone=True)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert torch.equal(torch.cat([p.grad.reshape(-1) for p in model.parameters()]), state[1][: -x.numel()])
        assert len(set(chosen.values())) > 1
        assert noise() < 1.1 * uniform
        assert activations.saved.saved_bytes < before
        assert activations.state_dict()["chosen"] == chosen


def test_bits_that_are_given_stay_when_others_are_chosen():
    model, x = net(), data(net())
    with CompressedActivations(model, layers={"body.*": 3}) as activations:
        running = model.body[1].running_mean.clone()
        assert activations.choose_bits(lambda: model(x).sum(), alone=True).keys() == {"head.1", "head.2"}
        assert torch.equal(model.body[1].running_mean, running)
        gradients(model, x)
        assert 9.4 < activations.saved_by_layer()["body.4"].ratio < 9.9


def test_bits_that_are_a_function_are_asked_for_at_each_pass():
    now = [2.0]
    model, x = transformer(), data(transformer())
    with CompressedActivations(model, bits=lambda: now[0], nonlinear_bits=lambda: max(now[0], 4)) as activations:
        gradients(model, x)
        few = activations.saved.saved_bytes
        chosen = activations.choose_bits(lambda: loss_of(model(x)), alone=True)
        gradients(model, x)
        state, as_chosen = activations.state_dict(), activations.saved.saved_bytes
        assert state["chosen"] == chosen != {}
        now[0] = 6.0
        gradients(model, x)
        many = activations.saved.saved_bytes
        assert activations.state_dict()["chosen"] == {}  # it was so for 2 bits
        assert as_chosen < few < many
        now[0] = 2.0
        activations.load_state_dict(state)
        gradients(model, x)
        assert activations.saved.saved_bytes == as_chosen
        now[0] = 2.5
        with pytest.raises(ValueError, match=r"bits must be a whole number from 1 to 8: 2\.5"):
            model(x)
        now[0] = 6.0
        gradients(model, x)  # nothing is left of the pass that failed
        assert activations.saved.saved_bytes == many
    with CompressedActivations(model, bits=6, nonlinear_bits=6) as activations:
        gradients(model, x)
        assert activations.saved.saved_bytes == many


def test_nothing_to_choose_for():
    model = Applied(torch.tanh)
    with CompressedActivations(model) as activations, pytest.raises(RuntimeError, match="nothing to choose for"):
        activations.choose_bits(lambda: model(images()).sum(), alone=True)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be a whole number from 1 to 8: 0"),
        ({"bits": 2.5}, "bits must be a whole number from 1 to 8: 2.5"),
        ({"nonlinear_bits": 9}, "nonlinear_bits must be"),
        ({"layers": {"body.0": 32}}, r"layers\['body.0'\] must be"),
        ({"layers": {"bodi": 2}}, "'bodi', which fits no module; there are body, body.0"),
        ({"min_numel": 0}, "min_numel must be at least 1"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        CompressedActivations(net(), **options)


def test_compiled_models_are_refused():
    """In a process of its own, since dynamo stays loaded."""
    script = """
import pytest, torch
from torch import nn
from hvd_compress.activations import CompressedActivations
model = nn.Sequential(nn.Linear(64, 64))
with CompressedActivations(model):
    for compiled in (torch.compile(model, backend="eager"), torch.compile(lambda x: model(x).sum(), backend="eager")):
        with pytest.raises(RuntimeError, match="Remedy: compile neither"):
            compiled(torch.randn(64, 64))
    model(torch.randn(64, 64)).sum().backward()
with pytest.raises(ValueError, match="Remedy: compile neither"):
    CompressedActivations(nn.Sequential(torch.compile(model, backend="eager")))
model.compile(backend="eager")
with pytest.raises(ValueError, match="Remedy: compile neither"):
    CompressedActivations(model)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
