"""A stand-in for a public denoiser: an SMDM of any size with random weights, written in the format of the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from orderppl.errors import UserError
from orderppl.experiments.config import setting
from orderppl.models.denoisers import TOKENIZER_FOLDER, SmdmConfig, SmdmDenoiser

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # those of the tokeniser of the real ones
NUMERAL_OR_SIGN = r"\d|<<|>>|#+"  # digits are tokens of their own, as there


@dataclass(frozen=True)
class StandInConfig:
    """A random SMDM with a tokeniser made from the data, for runs without a public model. It knows nothing."""

    name: Literal["stand_in"] = "stand_in"
    n_layer: int = setting(2, "blocks", at_least=1)
    n_head: int = setting(2, "attention heads", at_least=1)
    n_embd: int = setting(16, "size of the hidden vectors", at_least=4)
    intermediate_size: int = setting(32, "width of the feed-forward networks", at_least=4)
    vocab_size: int = setting(1000, "token classes; the tokeniser has at most as many", at_least=300)
    block_size: int = setting(2048, "longest canvas, tokens", at_least=1)


def write_stand_in(config: StandInConfig, folder: Path, texts: Callable[[], Iterable[str]], seed: int) -> None:
    """Write weights, configuration and tokeniser, as `load_denoiser` reads them; config.json comes last.

    Args:
        config: the sizes.
        folder: where they go; one that holds this model already is left as it is.
        texts: gives what the tokeniser is made from.
        seed: of the weights.

    Raises:
        UserError: the folder holds another model.
    """
    sizes = SmdmConfig(**{key: value for key, value in asdict(config).items() if key != "name"})
    written = folder / "config.json"
    if written.is_file():
        before = json.loads(written.read_text(encoding="utf-8"))
        changed = [item.name for item in fields(sizes) if before.get(item.name) != getattr(sizes, item.name)]
        if changed:
            problem = f"{changed[0]} differs from that of {folder}"
            raise UserError(f"denoiser.{changed[0]}", problem, "delete that folder or change --out")
        return
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # slow to import
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(NUMERAL_OR_SIGN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(str(folder / TOKENIZER_FOLDER))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        SmdmDenoiser(sizes).save_pretrained(folder)
