"""Learn the order in which a pretrained antibody model should write a heavy variable domain, or its loops.

    python experiments/antibodies.py --train ../shared/data/antibodies/heavy.csv --steps 4 --out runs/antibodies
    python experiments/antibodies.py --train heavy.csv --regions CDR1,CDR2,CDR3 --steps 4 --out runs/loops
    python experiments/antibodies.py --out runs/drawn          # no file: sequences drawn from the model itself

The order is a plan: one distribution over the steps per aligned position, blind to the residues that are to be written
and therefore deployable. With `--regions` only these are written and the framework is given. The table gives
`path_nats` on held-out sequences: nats per residue along each arm's own order, with the same number of steps (adaptive
rules use as many as they need, up to that budget). The oracle ranks positions by the probability of the true residue.
The figure shows what was learned, region by region.
"""

from pathlib import Path

import pandas as pd
import torch
from antibody_judge import AntibodyJudge
from jsonargparse import auto_cli
from torch import Tensor

from orderppl import Batch, decode
from orderppl.data import Antibodies, Examples
from orderppl.data.sequences import REGIONS, antibody_regions
from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.results import write_results
from orderppl.figures import save_figure
from orderppl.models import PositionTable
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.policies import Plan, Ranked

from molecules import compare, figure_of, learn_plan, mean_by_group, revealed_steps, step_shares

SHORTEST, LONGEST = 112, 128  # residues of a drawn domain, the bulk of human heavy domains
LEFT = 98  # aligned positions counted from the left end; the others are counted from the right end


def draw_sequences(denoiser: AntibodyDenoiser, path: Path, count: int = 90, temperature: float = 0.25) -> Path:
    """Draw domains from the denoiser, one residue a step in random order, and keep them in a FASTA file."""
    if path.is_file():
        return path
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count, 1), generator=generator)
    attended = torch.arange(LONGEST) < lengths
    canvas = Batch(torch.full(attended.shape, denoiser.mask_index), attended)
    written = decode(
        denoiser, Ranked("random"), canvas, max_steps=LONGEST, temperature=temperature, generator=generator
    )
    rows = zip(written.sequences, attended, strict=True)
    domains = [denoiser.tokenizer.decode(tokens[seen].tolist()) for tokens, seen in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">drawn-{i}\n{domain}\n" for i, domain in enumerate(domains)), "utf-8")
    return path


def main(
    train: Path | None = None,
    steps: int = 4,
    regions: str | None = None,
    names: str | None = None,
    seed: int = 0,
    split: int = 0,
    rows: int = 60_000,
    lr: float = 0.2,
    bonus: float = 0.03,
    judged: int = 0,
    out: Path = Path("runs/antibodies"),
) -> None:
    """Learn a plan and compare it on held-out domains.

    Args:
        train: FASTA or CSV file; sequences are drawn from the model when left out.
        steps: step budget T.
        regions: what is to be written, such as CDR1,CDR2,CDR3; the whole domain when left out.
        names: regular expression of the names to use.
        seed: of the fit.
        split: seed of what is held out.
        rows: denoiser rows that the fit may spend.
        lr: learning rate.
        bonus: weight of the entropy bonus at the start; it fades.
        judged: held-out domains that are also written freely and judged by an independent model (antiberty, 97 MB).
        out: folder of run and results.
    """
    denoiser = AntibodyDenoiser()
    source = draw_sequences(denoiser, out / "drawn.fasta") if train is None else train
    data = Antibodies(str(source), regions=regions, names=names, seed=split)
    splits = data.splits(denoiser.tokenizer)
    plan = Plan(PositionTable(data.length, steps, split=LEFT, counts="attended"))
    learn_plan(plan, denoiser, splits["train"], steps, rows=rows, lr=lr, bonus=bonus, seed=seed, out=out / "order")

    test = splits["test"]
    title = "Antibodies" if regions is None else f"Antibodies, {regions} to be written"
    records = compare(plan, denoiser, test, steps, chosen_on=splits["train"].take(64), seed=seed, out=out, title=title)

    regions_of = [antibody_regions(domain) for domain in domains(test)]
    known = torch.tensor([row for row, found in enumerate(regions_of) if found is not None])
    batch = test.batch.rows(known)
    # the region of every residue that is to be written, row by row
    groups = [
        [name for name, wanted in zip(regions_of[row] or (), latent[seen].tolist(), strict=True) if wanted]
        for row, latent, seen in zip(known.tolist(), batch.latent, batch.attention_mask, strict=True)
    ]
    means = mean_by_group(revealed_steps(plan, denoiser, batch, steps), groups, "region")
    means = means.sort_values("region", key=lambda names: names.map(REGIONS.index))
    longest = test.batch.rows(test.batch.attention_mask.sum(-1).argmax().reshape(1))
    shares = step_shares(plan, denoiser, longest, steps)[0]
    save_figure(figure_of([shares], [()], means, "region"), out / "order.svg")
    if judged:
        few = test.take(judged)
        found = [judge(domains(few), "held-out domains")]
        arms = {"learned": plan, "random": Ranked("random"), "entropy cosine": Ranked("entropy", "cosine")}
        for arm, policy in arms.items():
            output = decode(denoiser, policy, few.batch, max_steps=steps, mode=arm == "learned", temperature=1.0)
            found.append(judge(domains(few, output.sequences), arm))
        means = pd.concat([means, pd.DataFrame(found)])
    labels = {"task": "antibodies", "sequences": "drawn" if train is None else "file", "rows": rows}
    config = {**labels, "steps": steps, "regions": regions, "names": names, "seed": seed, "lr": lr, "bonus": bonus}
    write_results(out, "antibodies", config, pd.concat([records, means]).assign(**labels))


def domains(examples: Examples, written: Tensor | None = None) -> list[str]:
    """The sequences of the rows, or what was written in their place; given residues included."""
    batch, tokenizer = examples.batch, examples.tokenizer
    assert tokenizer is not None
    rows = zip(batch.tokens if written is None else written, batch.attention_mask, strict=True)
    return [tokenizer.decode(tokens[seen].tolist()) for tokens, seen in rows]


def judge(sequences: list[str], arm: str) -> dict[str, object]:
    """`judge_nats` of sequences: nats per residue of an independent model."""
    nats = AntibodyJudge().nats(sequences)
    interval = bootstrap_mean(nats)
    return {"metric": "judge_nats", "arm": arm, "n": len(nats), **vars(interval)}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
