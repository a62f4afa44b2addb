"""What this rank sent, how long that took, what it lost: counted always or recorded on request, kept within bounds."""

from .closing import summary
from .counts import Telemetry
from .records import Collective, ParameterStep, StepSeconds, Traffic
from .spans import KINDS, Spans

__all__ = ["KINDS", "Collective", "ParameterStep", "Spans", "StepSeconds", "Telemetry", "Traffic", "summary"]
