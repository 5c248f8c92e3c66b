"""Can a learned order be trusted, and what is it like? Diagnostics in arviz's terms.

`to_inference_data` draws orders from a guide, and `diagnose` does all there is; `orderppl.diagnostics.order` has the
statistics of draws one by one, figures are in `orderppl.diagnostics.plots`.
"""

from orderppl.diagnostics.calibration import calibrate
from orderppl.diagnostics.diagnosis import diagnose
from orderppl.diagnostics.draws import draw_orders
from orderppl.diagnostics.importance import bound_curve, importance_report
from orderppl.diagnostics.inference_data import to_inference_data
from orderppl.diagnostics.statistics import order_statistics

__all__ = [
    "bound_curve",
    "calibrate",
    "diagnose",
    "draw_orders",
    "importance_report",
    "order_statistics",
    "to_inference_data",
]
