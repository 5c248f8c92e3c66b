"""Learned orders to publish: what decodes of a run, in a folder of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from orderppl.errors import UserError
from orderppl.files import TEMPORARY, write_text
from orderppl.identity import identity_of, is_loaded, tensors_of
from orderppl.runs import DENOISER, INFO, Run, finish_run, start_run

CARD = "README.md"


def share_run(run: Run, folder: str | Path, *, policy: Any = None, mode: bool = True, results: Any = None) -> Path:
    """Make what decodes of a run a folder to publish: the policy alone, its config and a card; no data, no guide.

    A denoiser that was trained here goes along, in a folder inside; another one is named.

    Args:
        run: a fit.
        folder: a new one.
        policy: the run's own when left out; or a wrapper of it, such as `AtPrice(run.policy, 0.1)`.
        mode: decode by the most probable sets, not by draws.
        results: what it was measured to do, JSON values.

    Raises:
        UserError: the folder exists, or there is no policy to share.
    """
    folder, policy = Path(folder), run.policy if policy is None else policy
    if folder.exists():
        raise UserError("out", f"{folder} exists", "give a new folder")
    if policy is None:
        raise UserError("run", f"{run.folder} holds no order", "share a run of fit-order")
    along = _goes_along(run)
    known = {**(run.info["denoiser"] or {}), **({"name": None, "weights": None} if along else {})}
    info = {"denoiser": known or None, "response": run.info["response"], "results": results}
    parts = {"policy": policy, "num_steps": run.num_steps, "mode": mode, "denoiser": None if along else run.denoiser}
    making = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    try:
        start_run(making, "policy", parts, info=info)
        finish_run(making, parts, run.info["updates"])
        if along:
            trained = {"denoiser": run.denoiser, "data": None, "fit": None}
            start_run(making / DENOISER, "denoiser", trained)
            finish_run(making / DENOISER, trained)
        write_text(making / CARD, _card(folder.name, run.num_steps, known, type(run.denoiser).__name__))
        os.replace(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _goes_along(run: Run) -> bool:
    """Whether nobody else has the denoiser: it was trained with the order, in a run of its own, or in a script."""
    if run.denoiser is None or not any(True for _ in tensors_of(run.denoiser)):
        return False
    source = Path(str(identity_of(run.denoiser)["name"]))
    trained = bool(run.config.get("fit", {}).get("train_denoiser", False))
    return trained or not is_loaded(run.denoiser) or (source / INFO).is_file()


def _card(name: str, num_steps: int, known: dict[str, Any], kind: str) -> str:
    """What the hub shows of an order."""
    published = str(known.get("name"))
    lines = ["---", "library_name: orderppl", "tags: [masked-diffusion, generation-order]"]
    lines += [f"base_model: {published}"] * (published.count("/") == 1 and not Path(published).exists())
    lines += ["---", "", "# A learned generation order", ""]
    lines.append(f"In which order, and how many at a time, to reveal tokens in at most {num_steps} steps.")
    if known:
        of = known.get("name") or f"a {kind}"
        lines.append(f"Learned for {of}: V = {known['vocab_size']}, MASK {known['mask_index']}.")
    lines += ["", "```python", "import orderppl", "", f'order = orderppl.load_order("{name}")']
    lines += ["orderppl.decode(order.denoiser, order.policy, batch, max_steps=order.num_steps, mode=order.mode)", "```"]
    return "\n".join([*lines, ""])
