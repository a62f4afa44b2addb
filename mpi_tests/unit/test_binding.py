"""Which parameters are compressed, whose gradient a tensor is, and what is refused."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from hvd_compress.binding import Binding, calling_optimizer, parameters_of_optimizer
from hvd_compress.compressors import BF16Compressor, FP16Compressor, NoneCompressor, TopKCompressor
from hvd_compress.gradient_compression import GradientCompression
from hvd_compress.memory import ErrorFeedback

SHAPES = {
    "conv.weight": (32, 16, 3, 3),
    "conv.bias": (32,),
    "fc.weight": (64, 32),
    "fc.bias": (5000,),
    "head.weight": (10, 64),
    "scale": (),
}


def parameters(shapes=SHAPES) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def binding(pairs=None, compressor=None, min_numel: int = 1024, exclude=()) -> Binding:
    pairs = parameters() if pairs is None else pairs
    return Binding(pairs, compressor or TopKCompressor(), ErrorFeedback(), min_numel=min_numel, exclude=exclude, seed=0)


def chosen(**options) -> set[str]:
    bound = binding(**options)
    return {slot.name for slot, compressed in zip(bound.slots, bound.compressed) if compressed}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"conv.weight", "fc.weight"}),
        ({"min_numel": 0}, {"conv.weight", "fc.weight", "head.weight"}),
        ({"min_numel": 640}, {"conv.weight", "fc.weight", "head.weight"}),
        ({"min_numel": 641}, {"conv.weight", "fc.weight"}),
        ({"min_numel": 2049}, {"conv.weight"}),
        ({"exclude": ["fc.weight"]}, {"conv.weight"}),
        ({"exclude": ["*.weight"]}, set()),
        ({"exclude": ["c*", "h*"]}, {"fc.weight"}),
        ({"compressor": BF16Compressor()}, {"conv.weight", "fc.weight"}),
    ],
    ids=str,
)
def test_what_is_large_and_not_excluded_is_compressed(options, expected):
    assert chosen(**options) == expected


@pytest.mark.parametrize("compressor", [NoneCompressor(), FP16Compressor()])
def test_summed_compressors_take_everything_that_is_not_excluded(compressor):
    assert chosen(compressor=compressor) == set(SHAPES)
    assert "fc.weight" not in chosen(compressor=compressor, exclude=["fc.*"])


def test_integers_are_not_compressed():
    assert chosen(pairs=[("table", torch.zeros(100, 100, dtype=torch.int64)), *parameters()]) == {
        "conv.weight",
        "fc.weight",
    }


def test_vectors_are_compressed_where_there_is_nothing_else():
    flat = {"first": (5000,), "second": (1023,), "third": (1024,), "temperature": ()}
    assert chosen(pairs=parameters(flat)) == {"first", "third"}
    assert chosen(pairs=parameters(flat | {"matrix": (2, 2)})) == set()


def test_slots_stand_in_the_order_of_the_names():
    bound = binding()
    assert [(slot.name, slot.parameter.index, tuple(slot.parameter.shape)) for slot in bound.slots] == [
        (name, index, shape) for index, (name, shape) in enumerate(SHAPES.items())
    ]
    assert bound.describe()[2] == ("fc.weight", [64, 32], "torch.float32")


TENSOR = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "has no \\(name, parameter\\) pairs.*read only once"),
        (iter(()), "has no \\(name, parameter\\) pairs.*read only once"),
        ([TENSOR], "must be \\(name, parameter\\) pairs"),
        (torch.nn.Linear(3, 3).parameters(), "must be \\(name, parameter\\) pairs"),
        (torch.nn.Linear(3, 3).state_dict(), "must be \\(name, parameter\\) pairs"),
        (torch.nn.Linear(3, 3), "has no \\(name, parameter\\) pairs.*model.named_parameters"),
        ([("a", TENSOR, 1)], "must be \\(name, parameter\\) pairs"),
        ([("a", None)], "must be \\(name, parameter\\) pairs"),
        ([("a", TENSOR), ("b", TENSOR.clone()), ("a", TENSOR.clone())], "more than one parameter a"),
        ([("first", TENSOR), ("second", TENSOR)], "under two names.*first.*second"),
    ],
    ids=["list", "iterator", "tensor", "parameters()", "state_dict()", "module", "triple", "None", "names", "tensors"],
)
def test_parameters_that_cannot_work_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        binding(pairs=pairs)


def test_a_generator_that_was_read_already_is_refused():
    names = torch.nn.Linear(3, 3).named_parameters()
    list(names)
    with pytest.raises(ValueError, match="read only once"):
        binding(pairs=names)


def test_an_exclusion_that_matches_nothing_is_refused_with_the_names():
    with pytest.raises(ValueError, match="exclude='fc_weight' matches no parameter") as caught:
        binding(exclude=["conv*", "fc_weight"])
    assert "head.weight" in str(caught.value)


@pytest.fixture
def trained():
    pairs = parameters()
    for _, parameter in pairs:
        parameter.grad = torch.ones_like(parameter)
    return binding(pairs=pairs)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_known_in_any_order(trained, seed):
    order = random.Random(seed)
    for step in range(6):
        indices = list(range(len(SHAPES)))
        if step % 2 == 0:
            order.shuffle(indices)
        for index in indices[: order.randrange(1, 7)]:
            assert trained.identify(trained.parameters[index].grad) == index


def test_new_gradients_are_known(trained):
    for _ in range(3):
        for index, parameter in enumerate(trained.parameters):
            parameter.grad = torch.ones_like(parameter)
            assert trained.identify(parameter.grad) == index


@pytest.mark.parametrize("stranger", ["equal", "view", "old"])
def test_a_tensor_that_is_no_gradient_is_refused(trained, stranger):
    gradient = trained.parameters[2].grad
    if stranger == "old":
        trained.parameters[2].grad = None
    tensor = {"equal": gradient.clone(), "view": gradient.view(-1), "old": gradient}[stranger]
    with pytest.raises(ValueError, match=r"is not the gradient of any parameter.*sparse_as_dense=False"):
        trained.identify(tensor)


def test_a_parameter_in_place_of_a_gradient_points_to_adasum(trained):
    with pytest.raises(NotImplementedError, match=r"Adasum.*op=hvd.Average"):
        trained.identify(trained.parameters[0])


class Caller(torch.optim.SGD):
    """As Horovod's: it holds the compression, and calls it from one of its methods."""

    def __init__(self, parameters, compression):
        super().__init__(parameters, lr=0.1)
        self._compression = compression

    def call(self, function):
        return function()


def two_layers():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_the_parameters_of_an_unbound_compression_are_its_optimizers():
    compression = GradientCompression(BF16Compressor())
    model = two_layers()
    optimizer = Caller([{"params": module.parameters()} for module in model], compression)
    found = list(parameters_of_optimizer(optimizer.call(lambda: calling_optimizer(compression))))
    assert [name for name, _ in found] == ["0.0", "0.1", "1.0", "1.1"]
    assert all(a is b for (_, a), b in zip(found, model.parameters()))


def test_of_several_optimizers_with_a_compression_the_calling_one_is_found_even_when_frozen():
    compression = GradientCompression(BF16Compressor())
    optimizers = [Caller(two_layers().parameters(), compression) for _ in range(3)]
    gc.freeze()
    try:
        found = [optimizer.call(lambda: calling_optimizer(compression)) for optimizer in optimizers]
    finally:
        gc.unfreeze()
    assert all(a is b for a, b in zip(found, optimizers))


def test_a_compression_that_no_optimizer_calls_says_what_to_do():
    compression = GradientCompression(BF16Compressor())
    other = Caller(two_layers().parameters(), GradientCompression(BF16Compressor()))
    assert calling_optimizer(compression) is None
    assert other.call(lambda: calling_optimizer(compression)) is None
    with pytest.raises(ValueError, match=r"call it with model.named_parameters\(\)"):
        compression.binding  # noqa: B018
