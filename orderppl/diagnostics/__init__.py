"""Can a learned order be trusted, and what is it like? Diagnostics in arviz's terms.

`to_inference_data` draws orders from a guide; `orderppl.diagnostics.order` has the statistics of draws one by one,
`order_statistics` all at once; figures are in `orderppl.diagnostics.plots`.
"""

from orderppl.diagnostics.agreement import agreement
from orderppl.diagnostics.backend import InferenceData, load, save
from orderppl.diagnostics.calibration import calibrate, simulate
from orderppl.diagnostics.draws import OrderDraws, draw_orders, prior_log_weights
from orderppl.diagnostics.importance import bound_curve, importance_report, pareto_k
from orderppl.diagnostics.inference_data import set_correlation, to_inference_data
from orderppl.diagnostics.report import add_order_statistics, alarms, order_statistics, summarise
from orderppl.diagnostics.training import read_log, training_trace, validation_trace

__all__ = [
    "InferenceData",
    "OrderDraws",
    "add_order_statistics",
    "agreement",
    "alarms",
    "bound_curve",
    "calibrate",
    "draw_orders",
    "importance_report",
    "load",
    "order_statistics",
    "pareto_k",
    "prior_log_weights",
    "read_log",
    "save",
    "set_correlation",
    "simulate",
    "summarise",
    "to_inference_data",
    "training_trace",
    "validation_trace",
]
