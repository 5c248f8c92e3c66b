"""A denoiser and a policy as a model of the lm-evaluation-harness, `pip install "orderppl[lm-eval]"`.

The command `lm_eval` knows the model `orderppl` once this module is imported, as a task does that names something of it
(`process_results: !function orderppl.evaluation.harness.score_answer`). For tasks that do not,
`python -m orderppl.evaluation.harness` is the same command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401 (its own models first: it would not list them beside ours)
import torch
from lm_eval.api.filter import Filter
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from tqdm.auto import tqdm

from orderppl.data.answers import answers_match, parse_answer
from orderppl.data.dataset import padded
from orderppl.data.tokenizers import Tokenizer
from orderppl.decoding.decode import decode, follow
from orderppl.errors import UserError
from orderppl.policies import Policy
from orderppl.runs import load_order
from orderppl.unmasking import Batch, Denoiser

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

model_registry.register("orderppl", target="orderppl.evaluation.harness:OrderLM")


class OrderLM(LM):
    """The text a denoiser writes in the order of a policy, and the likelihood of a text along that order.

    Generation fills a canvas of `max_new_tokens` positions; the answer is its text up to the first end of sequence or
    stop string. The log-likelihood of a continuation is that of its tokens along the policy's own order, nats: a lower
    bound that depends on the policy and the budget. A request is answered alike whatever is asked beside it.

    Args:
        denoiser: see `Denoiser`; it has been trained on canvases of about this size.
        policy: decides the reveal sets.
        tokenizer: between text and ids.
        max_steps: step budget T per canvas.
        max_new_tokens: canvas of a generated answer, tokens; a task's `max_gen_toks` goes first.
        max_prompt: longest prompt, tokens; longer ones lose their beginning. All of it when left out.
        separator: end every prompt with the end token, as the data's `separator` does.
        batch_size: requests answered together.
        mode: play the most probable set of every step instead of drawing one.
        seed: of stochastic policies and token sampling.
        device: where to run; that of the denoiser's parameters when left out.

    Raises:
        UserError: a size below 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Policy,
        tokenizer: Tokenizer,
        *,
        max_steps: int,
        max_new_tokens: int = 256,
        max_prompt: int | None = None,
        separator: bool = False,
        batch_size: int = 32,
        mode: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"max_new_tokens": max_new_tokens, "max_prompt": max_prompt, "batch_size": batch_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(name, f"{size} is not positive", "give at least 1")
        self.denoiser = denoiser
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_steps = max_steps
        self.max_new_tokens = max_new_tokens
        self.max_prompt = max_prompt
        self.separator = separator
        self.batch_size = batch_size
        self.mode = mode
        self.seed = seed
        parameter = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
        self._device = torch.device(device or (parameter.device if parameter is not None else "cpu"))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> OrderLM:
        """Make it as `lm_eval --model orderppl --model_args order=FOLDER` does.

        Args:
            arg_dict: `order`, a run folder, or folder or hub name of a shared order; `revision`, `trust_remote_code`;
                and arguments of the class. What is left out is as the order was learned: steps, canvas, separator.
            additional_config: `batch_size` and `device` of the command.

        Raises:
            UserError: there is no order, or see `load_order`.
        """
        settings = {**(additional_config or {}), **arg_dict}
        source = {name: settings.pop(name) for name in ("order", "revision", "trust_remote_code") if name in settings}
        if "order" not in source:
            raise UserError("model_args", "no order", "give order=FOLDER, such as runs/order")
        settings.pop("max_batch_size", None)
        if not str(settings.setdefault("batch_size", 32)).isdecimal():
            raise UserError("batch_size", f"{settings['batch_size']!r} is no number", "give one, such as 32")
        settings["batch_size"] = int(settings["batch_size"])
        if not torch.cuda.is_available() and str(settings.get("device")).startswith("cuda"):
            settings["device"] = "cpu"  # the command says cuda of itself, whether there is one or not
        order = load_order(str(source.pop("order")), device=settings.get("device") or "cpu", **source)
        if order.policy is None or order.tokenizer is None:
            raise UserError("order", f"{order.name} has no order, or reads no text", "give a run of fit-order on text")
        about = order.info["response"]
        learned = {"max_steps": order.num_steps, "mode": order.mode, "separator": about["separator_index"] is not None}
        learned["max_new_tokens"] = about["length"] - about["prompt_length"] if about["length"] else 256
        return cls(order.denoiser, order.policy, order.tokenizer, **{**learned, **settings})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> OrderLM:
        """The same from `order=FOLDER,max_steps=4`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokeniser, by which the harness keeps its requests apart."""
        return str(getattr(self._templates, "name_or_path", "") or type(self.tokenizer).__name__)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template of the tokeniser, for the harness's records."""
        return str(self._templates.get_chat_template()) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt, as the tokeniser writes it.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: end where the answer begins.

        Raises:
            UserError: the tokeniser has no chat template.
        """
        if getattr(self._templates, "chat_template", None) is None:
            raise UserError("apply_chat_template", "this tokeniser has no chat template", "leave it out")
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self._templates.apply_chat_template(chat_history, **options))

    @property
    def _templates(self) -> Any:
        return getattr(self.tokenizer, "tokenizer", None)  # of Hugging Face, behind `PretrainedTokenizer`

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decode one answer per request.

        Args:
            requests: with `args` of a prompt and settings: `until` (one stop string or several), `max_gen_toks` (the
                canvas), `do_sample`, `temperature`. Others, such as `top_p`, mean nothing here and are left out.
            disable_tqdm: show no progress.

        Raises:
            UserError: a canvas below 1.
        """
        answers = [""] * len(requests)
        settings = [self._settings(request.args[1]) for request in requests]
        alike = sorted(range(len(requests)), key=lambda index: settings[index])
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for (length, temperature), same in groupby(alike, key=lambda index: settings[index]):
                for rows in _slices(list(same), self.batch_size):
                    hidden = [self.denoiser.mask_index] * length
                    batch = self._batch([(self._prompt(requests[row].args[0]), hidden) for row in rows])
                    written = self._decode(batch, rows, temperature)[:, -length:]
                    for row, ids in zip(rows, written.tolist(), strict=True):
                        answers[row] = _before(self.tokenizer.decode(ids), requests[row].args[1].get("until"))
                    bar.update(len(rows))
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its prompt, and whether decoding would have written it.

        Args:
            requests: with `args` of a prompt and a continuation.
            disable_tqdm: show no progress.

        Raises:
            UserError: an empty continuation.
        """
        pairs = [(self._prompt(prompt), self.tokenizer.encode(text)) for prompt, text in (r.args for r in requests)]
        return list(self._score(pairs, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in canvases of `max_new_tokens` tokens that see what stands before them.

        Args:
            requests: with `args` of one text.
            disable_tqdm: show no progress.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for start in range(0, len(ids), self.max_new_tokens):
                pairs.append((ids[:start], ids[start : start + self.max_new_tokens]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += nats
        return totals

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of the second given the first of each pair, and whether decoding writes it."""
        if not all(ids for _, ids in pairs):
            raise UserError("continuation", "an empty one has no likelihood", "remove it from the task")
        for rows in tqdm(_slices(range(len(pairs)), self.batch_size), desc="likelihoods", disable=quiet):
            batch = self._batch([pairs[row] for row in rows])
            options: dict[str, Any] = {"generator": self._generator(), "row_ids": torch.tensor(rows)}
            path = follow(self.policy, self.denoiser, batch.to(self._device), self.max_steps, mode=self.mode, **options)
            same = ((self._decode(batch, rows) == batch.tokens) | ~batch.latent).all(-1)  # bool [B]
            yield from zip((-path.nats).tolist(), same.tolist(), strict=True)

    def _decode(self, batch: Batch, rows: Sequence[int], temperature: float = 0.0) -> Tensor:
        """What is written where a batch has positions to reveal: int64 [B, S], on the CPU."""
        output = decode(
            self.denoiser,
            self.policy,
            batch.to(self._device),
            max_steps=self.max_steps,
            mode=self.mode,
            temperature=temperature,
            generator=self._generator(),
            row_ids=torch.tensor(rows),
        )
        return output.sequences.cpu()

    def _settings(self, given: Mapping[str, Any]) -> tuple[int, float]:
        """Canvas and temperature of a request."""
        length = int(given.get("max_gen_toks", self.max_new_tokens))
        if length < 1:
            raise UserError("max_gen_toks", f"a canvas of {length} tokens", "give at least 1")
        sampled = given.get("do_sample", float(given.get("temperature", 0.0)) > 0)
        return length, float(given.get("temperature", 1.0)) if sampled else 0.0

    def _prompt(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return [*ids, self.tokenizer.eos_index] if ids and self.separator else ids

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Prompts, which are given, and what follows them, side by side: padding stands before and behind."""
        begin = self.tokenizer.frame[0]
        prompts = [[*begin, *ids[max(0, len(ids) - (self.max_prompt or len(ids))) :]] for ids, _ in pairs]
        left, given = padded(prompts, self.tokenizer.pad_index, max(map(len, prompts)))
        right, latent = padded([ids for _, ids in pairs], self.tokenizer.pad_index)
        attended, given = torch.cat([given, latent], 1), torch.cat([given, torch.zeros_like(latent)], 1)
        return Batch(torch.cat([left, right], 1), attended, given)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


class AnswerFilter(Filter):
    """A filter of the harness: the answer of every response as our parser reads it, a plain number or nothing.

    Args:
        flexible: the last number of a text, whatever stands before it.
    """

    def __init__(self, flexible: bool = False) -> None:
        self.flexible = flexible

    def apply(self, resps: Any, docs: Any) -> list[list[str]]:
        """Read the responses to every question."""
        found = ((parse_answer(text, self.flexible) for text in texts) for texts in resps)
        return [["" if answer is None else f"{answer:f}" for answer in answers] for answers in found]


def score_answer(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """`process_results` of a task of the harness: whether what `AnswerFilter` has read is the answer of the row.

    Args:
        row: with `answer`: a text that ends in `#### number`, or a bare number.
        answers: the first counts.
    """
    return {"exact_match": float(answers_match(f"#### {answers[0]}", str(row["answer"])))}


def gsm8k_task(
    path: str | Path,
    prompt: str = "{{question}}",
    name: str = "gsm8k_local",
    *,
    train: str | Path | None = None,
    num_fewshot: int = 0,
) -> dict[str, Any]:
    """Task of the harness for a local file of GSM8K, scored by our own answer parser.

    `exact_match,strict-match` reads the number behind the last mark, `exact_match,flexible-extract` the last number of
    the text, as the tasks of the harness call them.

    Give it to `lm_eval.simple_evaluate(model=OrderLM(...), tasks=[gsm8k_task("test.jsonl")])`.

    Args:
        path: JSON lines with `question` and `answer`.
        prompt: template of the prompt.
        name: of the task.
        train: the same of training rows, which examples before a prompt are drawn from.
        num_fewshot: how many.

    Raises:
        UserError: there is no such file, or examples without training rows.
    """
    files = {"test": path} if train is None else {"test": path, "train": train}
    for file in files.values():
        if not Path(file).is_file():
            raise UserError("path", f"{file} is not a file", "give a file of JSON lines with question and answer")
    if num_fewshot and train is None:
        raise UserError("num_fewshot", "there are no training rows to take examples from", "give train")
    ways = {"strict-match": False, "flexible-extract": True}
    first = {"function": "take_first"}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        "test_split": "test",
        **({} if train is None else {"training_split": "train", "fewshot_split": "train"}),
        **({"num_fewshot": num_fewshot} if num_fewshot else {}),  # none, said as 0, could not be changed by a command
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False},
        "filter_list": [
            {"name": way, "filter": [{"function": AnswerFilter, "flexible": flexible}, first]}
            for way, flexible in ways.items()
        ],
        "process_results": score_answer,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _slices(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _before(text: str, until: str | Sequence[str] | None) -> str:
    """Cut a text at the first stop string."""
    stops = [until] if isinstance(until, str) else list(until or [])
    return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
