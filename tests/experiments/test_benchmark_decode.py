from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from orderppl.experiments import benchmark_decode as benchmark
from orderppl.experiments import cli
from orderppl.experiments.config import load_config
from orderppl.experiments.results import read_results

QUICK = load_config(benchmark.Config, "decode_quick")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Of a quick run as from the command line."""
    out = tmp_path_factory.mktemp("decode")
    cli.run_experiment("benchmark decode", sys.modules[benchmark.__name__], QUICK, out)
    assert (out / "decode.png").stat().st_size > 0
    return read_results(out)["records"]


def chosen(records: list[dict[str, object]], metric: str, **labels: object) -> list[dict[str, object]]:
    return [r for r in records if r["metric"] == metric and all(r.get(k) == v for k, v in labels.items())]


def test_every_case_is_measured(records: list[dict[str, object]]) -> None:
    cases = {(d, v, p) for d in ("0.6M", "10M") for v in QUICK.vocab_sizes for p in benchmark.POLICIES}
    for metric in ("time_ratio", "cpu_time_ratio"):
        for other in (benchmark.FORWARDS, benchmark.NEEDED, benchmark.REFERENCE):
            found = chosen(records, metric, of=other)
            assert {(r["denoiser"], r["vocab_size"], r["policy"]) for r in found} == cases
            assert all(0 < r["low"] <= r["value"] <= r["high"] for r in found)
        assert {r["denoiser"] for r in chosen(records, metric, of=benchmark.REREAD)} == {"0.6M", "10M"}
    assert all(0 < r["tau"] < 1 for r in chosen(records, "time_ratio", policy="threshold"))


def test_decoding_spends_no_forward_in_vain(records: list[dict[str, object]]) -> None:
    """Row-forwards are the rows' own NFE; the loop that keeps finished rows spends at least as many."""
    ours = chosen(records, "row_forward_ratio", variant=benchmark.DECODE)
    assert {r["value"] for r in ours} == {1.0}
    theirs = chosen(records, "row_forward_ratio", variant=benchmark.REFERENCE)
    assert len(theirs) == len(ours)
    assert min(float(str(r["value"])) for r in theirs) >= 1
    assert {r["value"] for r in chosen(records, "same_rows")} == {1.0}
    shares = {r["policy"]: float(str(r["value"])) for r in chosen(records, "head_share", denoiser="10M", vocab_size=20)}
    assert shares["random"] < shares["top_prob"] < 1


@pytest.mark.parametrize("policy", benchmark.POLICIES)
def test_the_reference_loop_decodes_the_same(policy: str) -> None:
    """Larger than the quick run: 12 rows of unequal length and NFE, prompts of unequal length."""
    config = dataclasses.replace(QUICK, batch_size=12, length=11, prompt=6, steps=5, seed=4)
    size = benchmark.DenoiserSize(width=32, layers=2, heads=2)
    case = benchmark.Case("test", size, 30, policy, config.prompt)
    batch, denoiser = benchmark.make_batch(config, case), benchmark.make_denoiser(config, case).double()
    rule = benchmark.build_policy(config, case, batch, denoiser)
    output = benchmark._decode(denoiser, rule, batch, config)
    sequences, nfe = benchmark.reference_loop(denoiser, rule, batch, config)
    assert torch.equal(output.sequences, sequences)
    assert torch.equal(output.nfe, nfe)
    if policy == "threshold":
        assert len(set(nfe.tolist())) > 1
