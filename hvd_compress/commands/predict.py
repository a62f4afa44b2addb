"""hvd-compress predict: what a training step is going to take with each method, and from which link on it pays."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..log import log
from ..prediction import Compute, compared, recommended
from . import methods, model_file, network, quantities, tables
from . import predict_report as report

_METHODS = "bf16,qsgd,terngrad,onebit,topk,dgc,adacomp,scalecom,powersgd"
_LAYER = 1000  # of a model that only the number of parameters is known of: matrices of so many rows and columns


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="what a step is going to take with each method, on a link that you name",
        description=f"{__doc__} Bytes and a rank's work are measured here, with simulated ranks; the link is computed.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model",
        metavar="FILE:FUNCTION",
        help="a function that returns your model, or a pair: the model, and a function of it that computes its loss",
    )
    model.add_argument(
        "--parameters", type=quantities.count, metavar="25M", help="of a model of matrices of 1000 x 1000"
    )
    parser.add_argument(
        "--backward",
        type=quantities.seconds,
        metavar="85ms",
        help="of one step; measured here if --model computes a loss",
    )
    parser.add_argument(
        "--other",
        type=quantities.seconds,
        metavar="40ms",
        help="forward pass, optimizer and data of one step; default: half of the backward pass, or as measured",
    )
    methods.add_to(parser, _METHODS)
    parser.add_argument("--adam", action="store_true", help="recommend nothing that was seen to slow Adam down")
    parser.add_argument("--json", action="store_true", help="all that was found, for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="step time by link and by ranks")
    network.add_to(parser)
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    log.setLevel(logging.ERROR)  # what compressions warn of is what the table is for
    torch.set_num_threads(1)
    try:
        if options.plot is not None:
            report.check_picture(options.plot)
        named, compute = _model(options)
        cluster = network.cluster_of(options)
        if not options.json:
            tables.check()
        rows = compared(methods.makers_of(options.methods), named, cluster, compute)
        best, assumed = recommended(rows, adam=options.adam), report.assumptions(cluster, compute, named)
        if options.json:
            found = {"assumptions": assumed, "cluster": vars(cluster), "compute": vars(compute)}
            print(
                json.dumps(found | {"rows": [report.as_json(row) for row in rows], "recommended": best.name}, indent=1)
            )
        else:
            report.print_table(rows, best, assumed)
        if options.plot is not None:
            report.plot(options.plot, rows, named, cluster, compute)
            print(f"plot: {options.plot.resolve()}", file=sys.stderr if options.json else sys.stdout)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return 0


def _model(options: argparse.Namespace) -> tuple[list[tuple[str, Tensor]], Compute]:
    """Tensors that have the shapes of the parameters, and what a step computes."""
    compute = None
    if options.model is not None:
        model, loss = model_file.maker(options.model)()
        named = [(name, torch.zeros(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"{options.model}: the model has no parameters to train")
        if loss is not None and options.backward is None:
            compute = model_file.timed(model, loss)
    else:
        if options.parameters < 1:
            raise ValueError(f"--parameters must be at least 1: {options.parameters}")
        whole, rest = divmod(options.parameters, _LAYER * _LAYER)
        named = [(f"weight{number}", torch.zeros(_LAYER, _LAYER)) for number in range(whole)]
        if rest or not whole:
            side = max(1, math.isqrt(rest))
            named.append(("rest", torch.zeros(side, max(1, rest // side))))
    if compute is None:
        if options.backward is None:
            raise ValueError("give --backward, or a --model whose function returns a pair of a model and its loss")
        compute = Compute(options.backward, options.backward / 2)
    if options.other is not None:
        compute = Compute(compute.backward_seconds, options.other)
    return named, compute
