"""Rates that follow the gradients: what a choice costs, which choice is best, and how all ranks come to the same."""

from .controller import Controller, Replay
from .costs import TimeCost, bytes_cost
from .options import Options
from .planner import Planner
from .policies import Accordion, LGreCo, Policy
from .solver import Plan, solve

__all__ = [
    "Accordion",
    "Controller",
    "LGreCo",
    "Options",
    "Plan",
    "Planner",
    "Policy",
    "Replay",
    "TimeCost",
    "bytes_cost",
    "solve",
]
