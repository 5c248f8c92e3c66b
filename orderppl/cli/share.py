"""Make a learned order a folder to publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orderppl.cli.hints import any_class


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make a learned order a folder to publish: what decodes, its config and a card; no data, no guide.

        orderppl share runs/gsm8k --out my-order
        orderppl share runs/priced --policy AtPrice --policy.price 0.1 --mode false --out my-order
        hf upload OWNER/NAME my-order

    `orderppl generate my-order` and `orderppl.load_order("OWNER/NAME")` decode with it. A denoiser that was trained
    here goes along, in a folder inside; one that others have published is named.

    Args:
        run: run folder.
        policy: a wrapper of the run's policy, such as AtPrice; none when left out.
        mode: decode by the most probable sets; false: by draws.
        out: the new folder.
    """

    run: str
    policy: any_class("orderppl.policies.Policy") | None = None  # type: ignore[valid-type]
    mode: bool = True
    out: str = "my-order"
    POSITIONAL = "run"


def run(config: Config) -> None:
    """Load the run, and write what decodes."""
    from orderppl.config import build
    from orderppl.errors import UserError
    from orderppl.evaluation.results import read_results
    from orderppl.runs import load_run
    from orderppl.sharing import share_run

    loaded = load_run(config.run)
    known = {"policy": loaded.policy}
    policy = None if config.policy is None else build(config.policy, known, field="policy")
    try:
        results = read_results(Path(config.run) / "results" / "evaluate")["records"]
    except UserError:  # it was not evaluated
        results = []
    own = [record for record in results if record.get("arm") == "learned"]
    folder = share_run(loaded, config.out, policy=policy, mode=config.mode, results=own)
    print(f"shared: {folder} ({sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.3g} MB)")
