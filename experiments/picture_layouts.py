"""What `pictures.py` draws of every folder of docs/results."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from table_layouts import BASELINES, ORDERS

from orderppl.evaluation.figures import FORWARDS

Where = Mapping[str, Sequence[object]]


class Curves(NamedTuple):
    """Metrics against forwards, or against another metric of the same arms, which are joined by a label."""

    metrics: str = "path_nats"
    where: Where = {}
    xlabel: str = FORWARDS
    against: str = ""
    by: str = "family"


class Dots(NamedTuple):
    """Values with their intervals: a line for every combination of `rows`, a colour for every `series`."""

    label: str
    metric: str
    rows: str
    series: str = ""
    where: Where = {}
    even: float | None = None  # where nothing is gained or lost
    log: bool = False


STEPS = "steps (denoiser forwards per row)"
SEED_0 = {"training_seed": (None, 0)}
FIRST = Curves(where=SEED_0, xlabel=f"{STEPS}, training seed 0", by="arm")
NATS = "learned order better by, nats per token (paired)"
PAIRED = Dots(NATS, "advantage", "steps training_seed of", even=0.0)
REGION = {"run": ("T04-seed0", "T04-seed1", "T04-seed2")}
LESS = "path_nats less that of the baseline, nats per token"
GAP = Dots("expected gap to the log evidence, nats per sequence", "expected_gap_nats", "length steps", "arm")
AT_RANDOM = ("learned", "random", "top_prob", "entropy", "left_to_right", "best fixed order")
SAME = "time of decoding / time of the other"
PLAYED = {"policy": ("random", "top_prob", "entropy", "threshold"), "prompt_once": (False,)}
DECODED = Dots(SAME, "time_ratio", "denoiser vocab_size batch_size policy", "of", PLAYED, even=1.0)
TIMED = [
    Curves("accuracy", {"n": (200,)}, f"seconds per row at batch size {size}, of 200 rows", f"seconds_batch_{size}")
    for size in (1, 32)
]
UPDATED = Dots(
    "time of an update, library / by hand", "time_ratio", "denoiser mode", "steps", {"axis": ("steps",)}, 1.0
)
PAIRS = tuple(f"{name}, mode" for name in ("learned", "paper", "paper, from the prior", "paper, importance-weighted"))
WRITTEN = ("words", "last", "all")
# what spaces out a step
APART = ("periodic (1, 0)", "periodic (1, 2, 3, 0)", "periodic (0, 7, 6, 5, 4, 3, 2, 1)", "periodic (0, 1, 2, 3)")
APART += ("periodic on rows (1, 0)", "periodic (1, 0, 3, 2)", "random uniform spaced spread=4 T=8")
APART += ("threshold T=8 spaced spread=8 tau=0.02", "margin uniform spaced spread=8 T=8", "periodic (0, 3, 1, 3, 2, 3)")
APART += ("fixed_order periodic=True steps=[2, 1, 2, 0] T=3",)
CLUES = [
    Dots("forwards per puzzle", "forwards", "difficulty", "arm"),
    Dots("share solved", "solved", "difficulty", "arm"),
]
LAYOUTS: dict[str, list[Curves | Dots]] = {
    "antibodies": [FIRST, Dots("mean step of a region, from 0 (of 4)", "mean_step", "region", "run", REGION)],
    "antibodies-human": [FIRST, Dots("mean step of a region, from 0", "mean_step", "region", "steps")],
    "benchmark-decode": [DECODED],
    "benchmark-estimators": [
        Dots("noise over that of the default", "relative_sd", "task state", "estimator", even=1.0, log=True)
    ],
    "benchmark-speed": [UPDATED],
    "benchmark-speed-smdm": [Dots("share of the time of an update", "part_share", "part", "mode")],
    "chain": [GAP],
    "english": [
        *(
            FIRST._replace(where={**SEED_0, **ORDERS, "written": (what,)}, xlabel=f"{STEPS}, {what}")
            for what in WRITTEN
        ),
        PAIRED._replace(rows="written steps training_seed", where={"of": APART}),
    ],
    "equations-scan": [
        FIRST._replace(where={**SEED_0, **ORDERS}),
        PAIRED._replace(rows="steps training_seed", where={"of": APART}),
    ],
    "frontier-equations": [Curves()],
    "frontier-programs-wide": [Curves("accuracy", {"n": (597,)}), *TIMED],
    "gpu": [UPDATED._replace(where={"benchmark": ("speed",), **UPDATED.where}), DECODED],
    "gsm8k": [
        Dots(
            "path_nats less that of the baseline, nats per token",
            "path_nats_difference",
            "form arm",
            "baseline",
            BASELINES,
            0.0,
        )
    ],
    "learned-opponents": [
        Curves("accuracy", {"task": (task,)}, f"{FORWARDS}, {task}") for task in ("sudoku", "arithmetic", "gsm8k")
    ],
    "lists": [Curves("accuracy"), Dots("forwards per row", "forwards", "difficulty", "arm")],
    "loops": [FIRST, Dots("mean step of a loop, from 0", "mean_step", "region", "run")],
    "paper": [
        Dots("negative bound, nats per problem", "bound_nats", "steps arm", "training_seed"),
        Dots("accuracy of the policy alone", "accuracy", "steps family", "training_seed", {"family": PAIRS}),
    ],
    "phones": [Curves(xlabel=STEPS), PAIRED._replace(rows="steps training_seed")],
    "posterior": [Dots("gap to the log evidence, nats per sequence", "gap_nats", "arm", "training_seed")],
    "quickstart": [
        Dots("gap to the log evidence, nats per sequence", "gap_nats", "arm", where={"arm": AT_RANDOM}),
        Dots("antibodies: mean step of a region, from 0", "mean_step", "region"),
    ],
    "reactions": [
        FIRST._replace(where={**SEED_0, **ORDERS}),
        Dots("mean step of a kind of token, from 0", "mean_step", "kind", "steps"),
    ],
    "receptors": [FIRST._replace(where={**SEED_0, **ORDERS}), PAIRED],
    "sudoku": [Curves("accuracy"), *CLUES],
    "sudoku-unique": [Curves("accuracy"), *CLUES],
    "tree": [GAP],
}
