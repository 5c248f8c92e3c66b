"""The adapter of the lm-evaluation-harness, offline, on a small denoiser that is right about some rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from orderppl import evaluate, fit
from orderppl.data import Examples, JsonLines, exact_match
from orderppl.data.answers import flexible_match
from orderppl.data.dataset import Row, TextData
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, WordTokenizer
from orderppl.decoding.decode import follow
from orderppl.errors import UserError
from orderppl.evaluation import Arm
from orderppl.evaluation.harness import AnswerFilter, OrderLM, gsm8k_task, score_answer
from orderppl.guides import PolicyGuide
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser, load_denoiser, train_denoiser
from orderppl.policies import Plan, RandomSteps, Ranked
from orderppl.unmasking import Batch

from tiny_models import write_model

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
    strict = [sample for sample in result["samples"]["gsm8k_local"] if sample["filter"] == "strict-match"]
    samples = sorted(strict, key=lambda sample: sample["doc_id"])
    assert [sample["exact_match"] for sample in samples] == ours.tolist()
    assert result["results"]["gsm8k_local"]["exact_match,strict-match"] == ours.mean()
    assert result["results"]["gsm8k_local"]["exact_match,flexible-extract"] >= ours.mean()
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
        == own["results"]["gsm8k_local"]["exact_match,strict-match"]
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
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(UserError, match="num_fewshot: there are no training rows"):
        gsm8k_task(tmp_path / "test.jsonl", num_fewshot=2)


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


@pytest.mark.parametrize(
    ("text", "answer", "strict", "flexible"),
    [
        ("so #### 9{,}500", 9500, 1, 1),
        (r"so \boxed{$9{,}500}", "a #### 9,500", 1, 1),
        ("so #### +18", 18, 1, 1),
        ("so #### $-5", -5, 1, 1),
        ("so #### \u22125", "#### -5", 1, 1),
        ("so #### 18 (see note #2)", 18, 1, 0),
        ("so it is 18", 18, 0, 1),
        ("so it is 18", 18.0, 0, 1),
        ("nothing", 18, 0, 0),
    ],
)
def test_answers_as_people_write_them(text: str, answer: int | float | str, strict: int, flexible: int) -> None:
    """What the filters of the task read, against answers that are texts or numbers."""
    found = [
        score_answer({"answer": answer}, AnswerFilter(last).apply([[text]], [{}])[0])["exact_match"]
        for last in (False, True)
    ]
    assert found == [strict, flexible]


# ---- the command of the harness


def write_task(folder: Path, train: Sequence[Any], test: Sequence[Any]) -> None:
    """The task of the page on public models, and its files."""
    page = (Path(__file__).parents[2] / "docs" / "public_models.md").read_text("utf-8")
    (task,) = re.findall(r"```yml\n(.*?)```", page, flags=re.DOTALL)
    (folder / "gsm8k.yaml").write_text(task)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows)
        (folder / f"{name}.jsonl").write_text(text)


def learn(folder: Path, denoiser: Any, canvas: int, grade: Callable[..., Any], separator: bool) -> None:
    """An order for the rows, in a run folder."""
    files: dict[str, Any] = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    names = {"prompt": "question", "response": "answer", "answer": "answer"}
    data = JsonLines(**files, **names, validation_share=0.0, canvas=canvas, grade=grade, separator=separator)
    data.splits(denoiser.tokenizer)
    plan = Plan(PositionTable(data.length, 2))
    pair = UnmaskingModel(denoiser, RandomSteps(), 2), PolicyGuide(plan, denoiser, 2)
    fit(*pair, data, updates=5, batch_size=16, lr=0.1, out=folder / "order", progress=False)


def command(folder: Path, *words: str) -> str:
    """What a command of this environment prints, run in a folder."""
    first = [sys.executable] if words[0] == "-m" else [str(Path(sys.executable).with_name(words[0]))]
    done = subprocess.run(
        [*first, *words[words[0] != "-m" :]], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def by_row(folder: Path, way: str) -> list[dict[str, Any]]:
    """The samples that the harness has logged for a filter, by row."""
    (file,) = folder.glob("found/*/samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted((one for one in samples if one["filter"] == way), key=lambda one: int(one["doc_id"]))


def ours(folder: Path) -> list[float]:
    """What `orderppl evaluate` says of the learned order, by row."""
    command(folder, "orderppl", "evaluate", "order", "--out", "ours")
    table = pd.read_csv(folder / "ours" / "table.csv")
    learned = table[(table["arm"] == "learned") & table["correct"].notna()]
    return list(learned.sort_values("row")["correct"])


ASK = ("--model", "orderppl", "--model_args", "order=order", "--output_path", "found", "--log_samples", "--batch_size")


def test_the_command_of_the_harness_runs_our_model(tokenizer: WordTokenizer, tmp_path: Path) -> None:
    """Plain `lm_eval`, with the task as the documentation shows it, row by row as `orderppl evaluate`."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 2}
    denoiser = TransformerDenoiser(tokenizer.vocab_size, tokenizer.mask_index, tokenizer=tokenizer, **sizes)
    train_denoiser(denoiser, examples(tokenizer).batch, updates=120, batch_size=32, lr=5e-3, progress=False)
    write_task(tmp_path, ROWS[::2], ROWS[1::2])
    learn(tmp_path, denoiser, CANVAS, exact_match, separator=True)
    printed = command(tmp_path, "lm_eval", *ASK, "16", "--tasks", "gsm8k.yaml")
    theirs = [sample["exact_match"] for sample in by_row(tmp_path, "strict-match")]
    assert theirs == ours(tmp_path)
    assert 0.1 < sum(theirs) / len(theirs) < 1
    assert f"|{sum(theirs) / len(theirs):.4f}|" in printed


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_integer_answers_examples_and_chat_templates_through_the_command(tmp_path: Path, chat: bool) -> None:
    """A model of transformers; answers are numbers, and examples come from the training rows."""
    torch.manual_seed(0)
    rows = [(f"{a} + {b}", a + b) for a in range(10) for b in range(10)]
    write_task(tmp_path, rows[::2], rows[1::2])
    theirs: Any = load_denoiser(write_model(tmp_path / "bert", "bert")).tokenizer
    theirs.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
    )
    theirs.tokenizer.save_pretrained(tmp_path / "bert")
    learn(tmp_path, load_denoiser(tmp_path / "bert"), 3, flexible_match, separator=False)
    more = ("--num_fewshot", "2", "--apply_chat_template") if chat else ()
    command(tmp_path, "-m", "orderppl.evaluation.harness", *ASK, "16", "--tasks", "gsm8k.yaml", *more)
    samples = by_row(tmp_path, "flexible-extract")
    prompts = [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples]
    if not chat:
        assert [sample["exact_match"] for sample in samples] == ours(tmp_path)
        assert 0 < sum(sample["exact_match"] for sample in samples) < len(samples)
        assert prompts == [question for question, _ in rows[1::2]]
        return
    known = dict(rows[::2])
    for prompt, (question, _) in zip(prompts, rows[1::2], strict=True):
        turns = re.fullmatch(r"user (.*) assistant (.*) user (.*) assistant (.*) user (.*) bot", prompt)
        assert turns is not None and turns[5] == question
        assert (known[turns[1]], known[turns[3]]) == (int(turns[2]), int(turns[4]))
