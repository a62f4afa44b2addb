"""What a step is going to take with a method, on a network that need not be there: work is measured, links computed."""

from .comparison import GAIN, PLAIN, RATES, Maker, Row, compared, plain_of, recommended
from .timeline import PAYLOAD, Cluster, Compute, Step, predicted
from .traffic import Collective, Recorder
from .work import Work, measured

__all__ = [
    "GAIN",
    "PAYLOAD",
    "PLAIN",
    "RATES",
    "Cluster",
    "Collective",
    "Compute",
    "Maker",
    "Recorder",
    "Row",
    "Step",
    "Work",
    "compared",
    "measured",
    "plain_of",
    "predicted",
    "recommended",
]
