"""What `tables.py` prints of every folder of docs/results."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

# what is compared where
PLACES = ("task", "written", "domains", "chain", "grid", "measured", "steps", "n", "training_seed", "target_nfe")


class Layout(NamedTuple):
    """A table of the records of some metrics whose labels have some of the values (None: no such label)."""

    title: str
    metrics: str
    rows: str
    columns: str = "metric"
    where: Mapping[str, Sequence[object]] = {}


PAIRED = "learned opponent advantage worst best", " ".join(("arm", *PLACES, "of"))
COMPARED = Layout("Learned against the best opponent (`of`)", *PAIRED)
ARMS = {"arm": ("learned", "learned, drawn", "best fixed order", "random", "top_prob", "entropy", "left_to_right")}
GAPS = [
    Layout("Expected gap to the log evidence, nats", "expected_gap_nats", "length steps", "arm"),
    Layout("Gap to the log evidence on test rows, nats", "gap_nats", "length steps", "arm", ARMS),
]
BY_ARM = Layout("Gap to the log evidence, nats", "gap_nats expected_gap_nats", "arm")
NATS = Layout("Nats per token", "path_nats", "arm nfe")
BASELINES = {"baseline": (*(f"random uniform T={t}" for t in (2, 4, 8)), "threshold at equal NFE")}
SPREAD = {"family": ("learned", "long search", "periodic", "random uniform", "top_prob uniform", "entropy uniform")}
MODES = {"axis": ("steps",), "mode": ("stacked", "sequential", "policy")}
UPDATES = Layout("Time of an update, library / by hand", "time_ratio", "measured denoiser mode", "steps", MODES)
PLAYED = {"policy": ("random", "top_prob", "entropy", "threshold")}
DECODING = Layout("Time of decoding / ...", "time_ratio", "denoiser vocab_size batch_size policy prompt", "of", PLAYED)
COST = "accuracy nfe nfe_stopped seconds_batch_1 seconds_batch_32"
AGAINST = "advantage", "steps arm", "forwards of", {"measured": ("accuracy",), "forwards": ("equal", "T")}
SHARES = "cpu_used_share used_share part_share saved_megabytes gradient_megabytes"
ORDERS = {"family": ("learned", "periodic", "spaced", "random uniform", "top_prob uniform", "left_to_right uniform")}
CLUES = [
    COMPARED,
    Layout("Forwards by the number of clues", "forwards", "difficulty", "arm"),
    Layout("Share solved by the number of clues", "solved", "difficulty", "arm"),
]
LAYOUTS: dict[str, list[Layout]] = {
    "english": [
        COMPARED,
        NATS._replace(rows="written family", columns="steps", where=ORDERS),
        Layout("Share of neighbours that are revealed in the same step", "neighbours_together", "written arm", "steps"),
        Layout("Mean step of a kind of token, from 0", "mean_step", "written kind", "steps"),
    ],
    "loops": [
        COMPARED,
        NATS._replace(title="Nats per residue", rows="chain family", columns="steps", where=ORDERS),
        Layout("Written freely: nats of an independent model", "judge_nats", "steps arm"),
        Layout("Edits per residue, to the nearest natural loop and apart", "natural_edits edits_apart", "arm region"),
    ],
    "receptors": [COMPARED, NATS._replace(title="Nats per residue", rows="family", columns="steps", where=ORDERS)],
    "lists": [
        COMPARED,
        Layout("Forwards of each difficulty", "forwards", "difficulty", "arm"),
        Layout("Solved, and the most that any rule can solve", "solved limit", "difficulty", "arm"),
    ],
    "frontier-programs-wide": [COMPARED, Layout("Costs, seconds per row", COST, "arm", where={"n": (200, 32)})],
    **dict.fromkeys(("chain", "tree"), GAPS),
    **dict.fromkeys(("sudoku", "sudoku-unique"), CLUES),
    "phones": [
        Layout("Better than the best opponent by, and distance to a search", "advantage regret", "steps training_seed"),
        NATS._replace(title="Nats per phone", rows="family", columns="steps", where=SPREAD),
    ],
    "posterior": [BY_ARM],
    "quickstart": [BY_ARM, NATS._replace(title="Antibodies, nats per residue", rows="arm")],
    "gsm8k": [Layout("Less the baseline", "path_nats_difference", "form arm nfe baseline", where=BASELINES)],
    "paper": [
        Layout("Negative bound on held-out problems, nats per problem", "bound_nats", "steps arm", "training_seed"),
        Layout("Bound above that of the policy alone", "advantage", "steps arm", where={"measured": ("bound",)}),
        Layout("Policies without their guides", "accuracy path_nats marginal_nats nfe", "steps family"),
        Layout("More accurate than the heuristics by, with as many forwards and with T", *AGAINST),
    ],
    "benchmark-speed": [UPDATES],
    "benchmark-speed-smdm": [Layout("An update", f"{SHARES} peak_megabytes", "metric part variant", "mode")],
    "benchmark-decode": [DECODING],
    "gpu": [UPDATES, DECODING],
    "benchmark-estimators": [
        Layout("Standard deviation of a gradient", "gradient_sd", "task state", "estimator"),
        Layout("The same over that of the default", "relative_sd", "task state", "estimator"),
        Layout("Learned after so many denoiser rows, nats per token", "path_nats", "task rows", "estimator"),
        Layout("Share of another's rows that the default needs", "rows_ratio", "task", "estimator"),
        Layout("Largest |z| of the mean gradient against the exact one", "bias_z", "task", "estimator"),
    ],
}
