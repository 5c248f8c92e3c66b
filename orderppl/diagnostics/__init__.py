"""Can a learned order be trusted, and what is it like? Diagnostics in arviz's terms.

`to_inference_data` draws orders from a guide, and `diagnose` does all there is; `orderppl.diagnostics.order` has the
statistics of draws one by one, figures are in `orderppl.diagnostics.plots`.
"""

from orderppl.diagnostics.agreement import agreement
from orderppl.diagnostics.backend import load, save
from orderppl.diagnostics.calibration import calibrate
from orderppl.diagnostics.diagnosis import Diagnosis, diagnose
from orderppl.diagnostics.draws import draw_orders, prior_log_weights
from orderppl.diagnostics.importance import bound_curve, importance_report
from orderppl.diagnostics.inference_data import to_inference_data
from orderppl.diagnostics.statistics import alarms, order_statistics, summarise
from orderppl.diagnostics.training import read_log, training_trace

__all__ = [
    "Diagnosis",
    "agreement",
    "alarms",
    "bound_curve",
    "calibrate",
    "diagnose",
    "draw_orders",
    "importance_report",
    "load",
    "order_statistics",
    "prior_log_weights",
    "read_log",
    "save",
    "summarise",
    "to_inference_data",
    "training_trace",
]
