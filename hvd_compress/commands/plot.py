"""hvd-compress plot: what a training run sent and what that took, from its telemetry, as a picture or a page."""

from __future__ import annotations

import argparse
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pictures import figure
from .run_file import SPANS, Run, read

_PAGES = (".html", ".htm")
_LAYERS = 10  # that have lines of their own: those that send most
_POINTS = 400  # of a line: the means of as many stretches of steps


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "plot", help="what a run sent and what that took, from its telemetry", description=__doc__
    )
    parser.add_argument(
        "file", type=Path, metavar="RUN.jsonl", help="of telemetry.to_jsonl(), or HVD_COMPRESS_TELEMETRY=RUN.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=".png, .svg, or .html for one page with all in it; default RUN.png"
    )
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    out = options.out or options.file.with_suffix(".png")
    try:
        run = read(options.file)
        drawn = _drawn(run)
        if out.suffix in _PAGES:
            out.write_text(_page(run, options.file.name, drawn), encoding="utf-8")
        else:
            drawn.savefig(out)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    print("\n".join(": ".join(line) for line in _summary(run).items()))
    print(f"plot: {out.resolve()}")
    return 0


def _drawn(run: Run) -> Any:
    """Panels of what there is: bytes, time, rates and errors by step."""
    panels = [_bytes, *([_time] if run.seconds else []), *([_rates] if run.rates else [])]
    panels += [_errors] if run.errors else []
    drawn = figure(figsize=(10, 3.2 * len(panels)))
    for axes, panel in zip(drawn.subplots(len(panels), squeeze=False)[:, 0], panels):
        panel(axes, run)
        axes.grid(alpha=0.3)
    return drawn


def _bytes(axes: Any, run: Run) -> None:
    for label, found in (("gradients", run.raw), ("sent", run.sent)):
        axes.plot(*_line({step: count / 1e6 for step, count in found.items()}), label=label)
    axes.set(xlabel="step", ylabel="MB a step", yscale="log", title="bytes of this rank")
    axes.legend(fontsize="small")


def _time(axes: Any, run: Run) -> None:
    lines = [_line({step: 1e3 * seconds[kind] for step, seconds in run.seconds.items()}) for kind in SPANS]
    axes.stackplot(lines[0][0], *(values for _, values in lines), labels=SPANS)
    axes.set(xlabel="step", ylabel="ms a step", title="time in this library; exchange: waiting for answers")
    axes.legend(fontsize="small", loc="upper right")


def _rates(axes: Any, run: Run) -> None:
    _by_layer(axes, run, run.rates)
    axes.set(xlabel="step", ylabel="rate", yscale="log", title="density, bits, rank or bin size, by layer")


def _errors(axes: Any, run: Run) -> None:
    _by_layer(axes, run, run.errors)
    axes.set(xlabel="step", ylabel="error", title="what was not sent, of what was to be, by layer")


def _by_layer(axes: Any, run: Run, found: Mapping[str, Mapping[int, float]]) -> None:
    names = sorted(found, key=lambda name: -run.sent_by[name])
    for name in names[:_LAYERS]:
        axes.plot(*_line(found[name]), label=name, linewidth=1)
    more = f"and {len(names) - _LAYERS} that send less" if len(names) > _LAYERS else None
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), title=more, title_fontsize="x-small")


def _line(found: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Steps and values in the order of the steps; means where there are too many to see."""
    steps = sorted(found)
    stretch = -(-len(steps) // _POINTS)
    parts = [steps[start : start + stretch] for start in range(0, len(steps), stretch)]
    return [sum(part) / len(part) for part in parts], [sum(found[s] for s in part) / len(part) for part in parts]


def _summary(run: Run) -> dict[str, str]:
    raw, sent, steps = sum(run.raw.values()), sum(run.sent.values()), len(run.raw)
    found = {
        "steps": f"{steps}, {min(run.raw)} to {max(run.raw)}",
        "gradients": f"{raw / steps / 1e6:.4g} MB a step",
        "sent": f"{sent / steps / 1e6:.4g} MB a step, {raw / sent:.4g} times less" if sent else "nothing",
    }
    if run.seconds:
        means = {kind: sum(s[kind] for s in run.seconds.values()) / len(run.seconds) for kind in SPANS}
        found["ms a step"] = ", ".join(f"{kind} {1e3 * seconds:.2f}" for kind, seconds in means.items())
    return found


def _page(run: Run, name: str, drawn: Any) -> str:
    """HTML that needs nothing else."""
    picture = io.StringIO()
    drawn.savefig(picture, format="svg")
    svg = picture.getvalue()
    rows = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(v)}" for k, v in _summary(run).items())
    layers = "".join(
        f"<tr><td>{html.escape(layer)}<td>{count / len(run.raw):,.0f}"
        for layer, count in sorted(run.sent_by.items(), key=lambda pair: -pair[1])
    )
    return _HTML.format(title=html.escape(name), rows=rows, layers=layers, svg=svg[svg.index("<svg") :])


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
th, td {{ text-align: left; padding: .1rem 1rem .1rem 0; font-variant-numeric: tabular-nums; }}
svg {{ width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<table>{rows}</table>
{svg}
<details><summary>bytes sent in a step, by parameter</summary><table>{layers}</table></details>
</html>
"""
