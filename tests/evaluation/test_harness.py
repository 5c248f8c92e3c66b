"""The adapter of the lm-evaluation-harness, offline, on a small denoiser that is right about some rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from orderppl.data import Examples, exact_match
from orderppl.data.dataset import Row, TextData
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, WordTokenizer
from orderppl.decoding.decode import follow
from orderppl.errors import UserError
from orderppl.evaluation import Arm, evaluate
from orderppl.evaluation.harness import OrderLM, gsm8k_task
from orderppl.models.denoisers import TransformerDenoiser, train_denoiser
from orderppl.policies import RandomSteps, Ranked
from orderppl.unmasking import Batch

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and what it imports warn
CANVAS = 7
ROWS = [(f"{a} and {b}", f"so {a} {b} #### {a if b < 5 else b}") for a in range(8) for b in range(8)]


class Pairs(TextData):
    """The rows as examples."""

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        return {"train": [Row(response, prompt) for prompt, response in ROWS]}


def examples(tokenizer: Tokenizer, **options: Any) -> Examples:
    return Pairs(max_prompt=8, separator=True, grade=exact_match, **options).splits(tokenizer)["train"]


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.build([text for row in ROWS for text in row])


@pytest.fixture(scope="module")
def denoiser(tokenizer: WordTokenizer) -> TransformerDenoiser:
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(tokenizer.vocab_size, tokenizer.mask_index, width=32, layers=2, heads=2)
    train_denoiser(denoiser, examples(tokenizer).batch, updates=120, batch_size=32, lr=5e-3, progress=False)
    return denoiser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS))
    return path


def model(denoiser: TransformerDenoiser, tokenizer: WordTokenizer, **options: object) -> OrderLM:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "max_new_tokens": CANVAS,
        "separator": True,
        "batch_size": 10,
        **options,
    }
    policy = settings.pop("policy", Ranked("top_prob"))
    return OrderLM(denoiser, policy, tokenizer, **settings)


def run(lm: OrderLM, task: dict[str, object]) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)  # the index of the built-in tasks takes a while to read
    return simple_evaluate(lm, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0)


def request(*args: object) -> Instance:
    return Instance("generate_until", {}, args, 0)


def test_exact_match_is_that_of_our_own_evaluation(
    denoiser: TransformerDenoiser, tokenizer: WordTokenizer, file: Path
) -> None:
    task = gsm8k_task(file)
    result = run(model(denoiser, tokenizer), task)
    data = examples(tokenizer, canvas=CANVAS)
    options: dict[str, Any] = {"metrics": ["accuracy"], "batch_size": 7, "progress": False}
    ours = evaluate([Arm("top_prob", Ranked("top_prob"), 3)], denoiser, data, **options)["correct"]
    samples = sorted(result["samples"]["gsm8k_local"], key=lambda sample: sample["doc_id"])
    assert [sample["exact_match"] for sample in samples] == ours.tolist()
    assert result["results"]["gsm8k_local"]["exact_match,none"] == ours.mean()
    assert result["results"]["gsm8k_local"]["flexible_match,none"] >= ours.mean()
    assert 0.1 < ours.mean() < 1  # some right, some wrong


def test_the_regular_expression_of_the_harness_agrees(
    denoiser: TransformerDenoiser, tokenizer: WordTokenizer, file: Path
) -> None:
    task = gsm8k_task(file)
    own = run(model(denoiser, tokenizer), dict(task))
    del task["process_results"]
    task["filter_list"] = [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                {"function": "take_first"},
            ],
        }
    ]
    task["metric_list"] = [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
        }
    ]
    theirs = run(model(denoiser, tokenizer), task)
    assert (
        theirs["results"]["gsm8k_local"]["exact_match,strict-match"]
        == own["results"]["gsm8k_local"]["exact_match,none"]
    )


def test_answers_do_not_depend_on_what_is_asked_beside_them(
    denoiser: TransformerDenoiser, tokenizer: WordTokenizer
) -> None:
    policy = RandomSteps()
    sampled = {"do_sample": True, "temperature": 1.0}
    requests = [request(prompt, sampled if i % 3 else {"max_gen_toks": 4}) for i, (prompt, _) in enumerate(ROWS[:20])]
    together = model(denoiser, tokenizer, policy=policy).generate_until(requests, disable_tqdm=True)
    in_pieces = model(denoiser, tokenizer, policy=policy, batch_size=3).generate_until(requests, disable_tqdm=True)
    assert together == in_pieces
    assert len(set(together)) > 5


def test_generation_stops_at_a_stop_string(denoiser: TransformerDenoiser, tokenizer: WordTokenizer) -> None:
    lm = model(denoiser, tokenizer)
    whole = lm.generate_until([request(ROWS[9][0], {})])[0]
    assert "####" in whole
    cut = lm.generate_until([request(ROWS[9][0], {"until": ["####", "never"]}), request(ROWS[9][0], {"until": "so"})])
    assert cut == [whole.split("####")[0], whole.split("so")[0]]


def test_log_likelihood_is_that_of_the_path(denoiser: TransformerDenoiser, tokenizer: WordTokenizer) -> None:
    lm = model(denoiser, tokenizer)
    scored = lm.loglikelihood([request(*row) for row in ROWS], disable_tqdm=True)
    batch = examples(tokenizer).batch
    ends = batch.latent & (batch.tokens == tokenizer.eos_index)  # a continuation has none
    path = follow(Ranked("top_prob"), denoiser, Batch(batch.tokens, batch.attention_mask & ~ends, batch.given), 3)
    torch.testing.assert_close(torch.tensor([value for value, _ in scored]).double(), -path.nats, rtol=1e-5, atol=1e-5)
    length = int((batch.latent & ~ends).sum(-1)[0])
    written = lm.generate_until([request(prompt, {"max_gen_toks": length}) for prompt, _ in ROWS], disable_tqdm=True)
    assert [greedy for _, greedy in scored] == [text == row[1] for text, row in zip(written, ROWS, strict=True)]


def test_rolling_likelihood_counts_every_token_once(denoiser: TransformerDenoiser, tokenizer: WordTokenizer) -> None:
    text = " ".join(response for _, response in ROWS[:3])
    ids = tokenizer.encode(text)
    # Without a prompt all hidden positions look alike to rotary attention: confidence would rank them by rounding.
    policy = Ranked("left_to_right")
    lm = model(denoiser, tokenizer, separator=False, policy=policy)
    chunks = [ids[start : start + CANVAS] for start in range(0, len(ids), CANVAS)]
    expected = 0.0
    for index, chunk in enumerate(chunks):
        before = [token for earlier in chunks[:index] for token in earlier]
        given = torch.tensor([[True] * len(before) + [False] * len(chunk)])
        expected += float(follow(policy, denoiser, Batch(torch.tensor([[*before, *chunk]]), given=given), 3).nats)
    assert lm.loglikelihood_rolling([request(text)], disable_tqdm=True)[0] == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("field", ["max_new_tokens", "max_prompt", "batch_size"])
def test_bad_sizes(denoiser: TransformerDenoiser, tokenizer: WordTokenizer, field: str) -> None:
    with pytest.raises(UserError, match=field):
        model(denoiser, tokenizer, **{field: 0})


def test_bad_requests(denoiser: TransformerDenoiser, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    lm = model(denoiser, tokenizer)
    with pytest.raises(UserError, match="max_gen_toks"):
        lm.generate_until([request("1 and 2", {"max_gen_toks": 0})])
    with pytest.raises(UserError, match="continuation"):
        lm.loglikelihood([request("1 and 2", "")])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        gsm8k_task(tmp_path / "absent.jsonl")


def test_long_prompts_lose_their_beginning(denoiser: TransformerDenoiser, tokenizer: WordTokenizer) -> None:
    long, short = request(f"{ROWS[5][0]} and {ROWS[9][0]}", {}), request(ROWS[9][0], {})
    size = len(tokenizer.encode(ROWS[9][0])) + 1  # with its end
    lm = model(denoiser, tokenizer, max_prompt=size)
    assert lm.generate_until([long]) == lm.generate_until([short])


def test_chat_templates_are_those_of_the_tokeniser(denoiser: TransformerDenoiser, tokenizer: WordTokenizer) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<mask>", "<eos>", "<user>", "<bot>", "one", "two"]
    fast = Fast(models.WordLevel({word: place for place, word in enumerate(words)}, "<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>", name_or_path="tiny"
    )
    theirs.chat_template = (
        "{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    lm = model(denoiser, tokenizer=PretrainedTokenizer(theirs))  # type: ignore[arg-type]
    assert lm.apply_chat_template([{"role": "user", "content": "one two"}]) == "<user> one two <bot>"
    assert lm.chat_template(True) == theirs.chat_template
    assert lm.tokenizer_name == "tiny"
    with pytest.raises(UserError, match="no chat template"):
        model(denoiser, tokenizer).apply_chat_template([])
