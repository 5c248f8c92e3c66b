"""Can a learned order be trusted, and what is it like? Diagnostics in arviz's terms."""

from orderppl.diagnostics.backend import InferenceData, load, save
from orderppl.diagnostics.calibration import calibrate, simulate
from orderppl.diagnostics.draws import OrderDraws, draw_orders
from orderppl.diagnostics.importance import bound_curve, importance_report, pareto_k
from orderppl.diagnostics.training import read_log, training_trace, validation_trace

__all__ = [
    "InferenceData",
    "OrderDraws",
    "bound_curve",
    "calibrate",
    "draw_orders",
    "importance_report",
    "load",
    "pareto_k",
    "read_log",
    "save",
    "simulate",
    "training_trace",
    "validation_trace",
]
