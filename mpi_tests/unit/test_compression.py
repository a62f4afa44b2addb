"""What a user picks and passes on: options, their limits, and what is printed of them."""

from __future__ import annotations

import math

import pytest
import torch

import hvd_compress
from hvd_compress import Compression, GradientCompression
from hvd_compress.compressors import BF16Compressor, FP16Compressor, NoneCompressor


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


METHODS = [Compression.terngrad, Compression.adacomp, Compression.topk]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *(("topk", {"density": density}, "density") for density in (0, -0.1, 1.01, math.nan, math.inf)),
        *(("adacomp", {"bin_size": size}, "bin_size") for size in (0, -1, 16385, 5.5, math.nan, "5")),
        *(("terngrad", {"clip_sigma": sigma}, "clip_sigma") for sigma in (0, -2.5, math.inf, math.nan)),
        ("topk", {"min_numel": -1}, "min_numel"),
        ("topk", {"bucket_bytes": 0}, "bucket_bytes"),
        ("topk", {"exclude": "embedding*"}, "exclude='embedding\\*'"),
        ("terngrad", {"exclude": ["0.*", "2.*"]}, "exclude='2.\\*'"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_with_their_value(method, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        getattr(Compression, method)(model().named_parameters(), **options)
    (value,) = options.values()
    assert (str(value) if not isinstance(value, list) else "2.*") in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_options_that_do_not_exist_are_refused(method):
    with pytest.raises(TypeError):
        method(model().named_parameters(), ratio=0.1)
    with pytest.raises(TypeError):
        method(model().named_parameters(), 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_cannot_work_are_refused(method):
    names = model().named_parameters()
    method(names)
    for wrong in (names, model().parameters(), model(), None):
        with pytest.raises(ValueError, match="named_parameters"):
            method(wrong)


VARIANTS = {
    "topk": ({}, {"density": 0.02}),
    "adacomp": ({}, {"bin_size": 64}),
    "terngrad": ({}, {"clip_sigma": None}, {"clip_sigma": 3.0}, {"share_scaler": False}),
    "fp16": ({},),
    "none": ({},),
    "bf16": ({},),
}
COMMON = ({}, {"min_numel": 5}, {"exclude": "0.*"}, {"exclude": ("0.*", "1.*")}, {"seed": 1}, {"bucket_bytes": 1000})


def test_what_is_printed_tells_everything_that_differs():
    printed = []
    for method, variants in VARIANTS.items():
        for options in [*variants, *COMMON[1:]]:
            printed.append(repr(getattr(Compression, method)(model().named_parameters(), **options)))
            assert printed[-1].startswith(f"Compression.{method}(")
            for name, value in options.items():
                assert f"{name}={(value,) if isinstance(value, str) else value!r}" in printed[-1]
    assert len(set(printed)) == len(printed)


def test_what_is_printed_is_the_whole_configuration():
    assert repr(Compression.topk(model().named_parameters(), density=0.25, exclude="1.*")) == (
        "Compression.topk(density=0.25, value_bits=32, min_numel=1024, exclude=('1.*',), seed=0, process_set=None, "
        "bucket_bytes=None, overlap=True, topology='auto', ranks_per_node=None, delay=0)"
    )


def test_what_differs_is_part_of_what_ranks_compare():
    descriptions = [
        repr(getattr(Compression, method)(model().named_parameters(), **options).description())
        for method, variants in VARIANTS.items()
        for options in [*variants, *COMMON[1:]]
    ]
    assert len(set(descriptions)) == len(descriptions)


@pytest.mark.parametrize(
    ("name", "compressor"), [("none", NoneCompressor()), ("fp16", FP16Compressor()), ("bf16", BF16Compressor())]
)
def test_casts_can_be_passed_unbound_or_called(name, compressor):
    unbound = getattr(Compression, name)
    assert isinstance(unbound, GradientCompression)
    assert unbound.compressor == compressor
    assert not unbound.bound
    with pytest.raises(ValueError, match=r"call it with model.named_parameters\(\)"):
        unbound.slots  # noqa: B018
    bound = unbound(model().named_parameters(), min_numel=7)
    assert bound is not unbound
    assert bound.bound
    assert (bound.compressor, bound.options.min_numel) == (compressor, 7)
    assert not getattr(Compression, name).bound
    with pytest.raises(TypeError, match="bound to its parameters already"):
        bound(model().named_parameters())


def test_each_reading_of_bf16_is_another_since_it_binds_to_an_optimizer():
    assert Compression.bf16 is not Compression.bf16


def test_options_given_to_what_is_not_bound_yet_stay():
    unbound = GradientCompression(BF16Compressor(), seed=5, min_numel=7)
    bound = unbound(model().named_parameters())
    assert (bound.options.seed, bound.options.min_numel) == (5, 7)


@pytest.mark.parametrize("name", ["none", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
def test_unbound_casts_come_back_in_the_type_they_had(name, dtype):
    gradient = torch.tensor([[1.0, -2.5]], dtype=dtype)
    sent, context = getattr(Compression, name).compress(gradient)
    assert sent.dtype == (torch.float16 if name == "fp16" else torch.float32 if dtype == torch.bfloat16 else dtype)
    back = getattr(Compression, name).decompress(sent, context)
    assert back.dtype == dtype
    assert torch.equal(back, gradient)


def test_the_public_names_are_there():
    assert set(hvd_compress.__all__) == {
        "Compression",
        "GradientCompression",
        "MismatchError",
        "WireError",
        "__version__",
    }
    assert all(hasattr(hvd_compress, name) for name in hvd_compress.__all__)
    assert isinstance(hvd_compress.__version__, str)


def test_rank_and_size_are_those_of_one_before_the_first_exchange():
    compression = Compression.topk(model().named_parameters())
    assert (compression.rank, compression.size) == (0, 1)
    assert compression.loss_scale is None


@pytest.mark.parametrize(
    ("optimizer", "accuracy", "printed"),
    [
        (torch.optim.SGD, "safe", "Compression.qsgd(bits=4"),
        (torch.optim.AdamW, "safe", "Compression.qsgd(bits=4, bucket_size=128"),
        (torch.optim.Adam, "aggressive", "Compression.onebit(momentum=0.0"),
        (torch.optim.SGD, "aggressive", "Compression.topk(density=0.01, value_bits=8"),
    ],
)
def test_what_is_recommended_goes_by_the_optimizer_and_is_said(optimizer, accuracy, printed, caplog, monkeypatch):
    monkeypatch.setattr(hvd_compress.compression, "warn_once", hvd_compress.log.log.warning)
    of = model()
    mine = optimizer(of.parameters(), lr=0.1)
    compression = Compression.recommended(of.named_parameters(), mine, accuracy=accuracy, exclude="1.*")
    assert repr(compression).startswith(printed)
    assert compression.options.exclude == ("1.*",)
    (said,) = caplog.messages
    assert said.startswith(f"Compression.recommended takes {printed}")
    assert optimizer.__name__ in said


def test_what_is_recommended_is_said_on_rank_0_alone_and_gives_way_to_the_operator(caplog, monkeypatch):
    of = model()
    mine = torch.optim.SGD(of.parameters(), lr=0.1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    Compression.recommended(of.named_parameters(), mine, accuracy="aggressive", bucket_bytes=77)
    assert not caplog.messages
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("HVD_COMPRESS_METHOD", "terngrad")
    other = Compression.recommended(of.named_parameters(), mine)
    assert repr(other).startswith("Compression.terngrad(")
    assert not any("recommended" in text for text in caplog.messages)


def test_an_accuracy_that_is_none_is_refused():
    of = model()
    with pytest.raises(ValueError, match="accuracy must be 'safe' or 'aggressive': 'high'"):
        Compression.recommended(of.named_parameters(), torch.optim.SGD(of.parameters(), lr=0.1), accuracy="high")
