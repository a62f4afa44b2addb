"""Rates that follow the gradients: what a choice costs, which choice is best, and how all ranks come to the same."""

from .controller import Controller, Replay
from .costs import TimeCost, bytes_cost
from .options import Options
from .planner import Planner
from .policies import Accordion, FracTrain, LGreCo, Policy
from .solver import Plan, solve
from .trials import Timetable, Trials

__all__ = [
    "Accordion",
    "Controller",
    "FracTrain",
    "LGreCo",
    "Options",
    "Plan",
    "Planner",
    "Policy",
    "Replay",
    "TimeCost",
    "Timetable",
    "Trials",
    "bytes_cost",
    "solve",
]
