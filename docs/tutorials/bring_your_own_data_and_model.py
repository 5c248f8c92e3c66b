# %% [markdown]
# # Bring your own data and model
#
# Rows of text, templates with holes, sequences, a masked model that you have on disk, a model and a grade that you
# wrote: each reaches every command by its class path, and nothing is registered. All of this runs on tiny sizes.
#
# Run it: `python docs/tutorials/bring_your_own_data_and_model.py`.

# %%
import json
import os
import random
import shlex
import tempfile
from pathlib import Path

import torch
from own_model import BagOfWords, same_number
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from orderppl import decode, evaluate, load_run
from orderppl.cli.main import main
from orderppl.data import JsonLines
from orderppl.evaluation import Arm, summary, sweep
from orderppl.models.denoisers import load_denoiser


def orderppl(arguments: str) -> None:
    """Run a command in this process, as `orderppl ...` does in a shell."""
    assert main(shlex.split(arguments)) == 0, arguments


os.chdir(tempfile.mkdtemp())
rng = random.Random(0)
NAMES = ["Tom", "Ann", "Sam", "Eve"]


def write_lines(path: str, rows: list[dict[str, object]]) -> None:
    """JSON lines: one object per line."""
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


# %% [markdown]
# ## Prompts and responses
#
# `JsonLines` reads one object per line. The names of the fields can be set; `CsvFile` and `HubDataset` (any name that
# `datasets` loads) have the same fields. Without files for validation and test their rows are drawn from the training
# file, by a hash of the row. A row that cannot be read is an error that names its line.

# %%
sums = [(rng.choice(NAMES), a, b) for a in range(1, 10) for b in range(1, 10)]
rows = [{"question": f"{name} has {a} and gets {b} .", "answer": f"{a} + {b} = {a + b}"} for name, a, b in sums]
write_lines("sums.jsonl", rows)

DATA = "--data JsonLines --data.train sums.jsonl --data.prompt question --data.response answer --data.answer answer"
orderppl(
    f"""train-denoiser {DATA} --denoiser.width 32 --denoiser.layers 1 --denoiser.heads 2
    --fit.updates 60 --fit.lr 0.01 --fit.progress false --out runs/sums-denoiser"""
)
orderppl(
    f"""fit-order {DATA} --denoiser load_denoiser --denoiser.name_or_path runs/sums-denoiser --num_steps 3
    --policy LearnedPolicy --policy.network PolicyNetwork --policy.network.width 16 --policy.network.heads 2
    --guide PolicyGuide --fit.updates 10 --fit.progress false --out runs/sums"""
)
orderppl('generate runs/sums --prompt "Tom has 3 and gets 4 ."')

# %% [markdown]
# ## A model and a grade of your own
#
# A denoiser is anything with `mask_index`, `vocab_size` and `denoiser(state, attention_mask) -> logits`. Arguments that
# a run knows, such as `vocab_size`, `mask_index` and `max_length`, need not be given. `--data.grade` names a function
# that says which texts are right. Both are in `own_model.py`, in the current folder or wherever Python finds it:
#
# ```python
# --8<-- "own_model.py"
# ```

# %%
orderppl(
    f"""train-denoiser {DATA} --data.grade own_model.same_number --denoiser own_model.BagOfWords
    --fit.updates 60 --fit.lr 0.01 --fit.progress false --out runs/own-denoiser"""
)
orderppl(
    f"""frontier {DATA} --data.grade own_model.same_number --denoiser load_denoiser
    --denoiser.name_or_path runs/own-denoiser --heuristics '[{{policy: Threshold, tau: [0.3, 0.5]}}]' --seeds 1
    --out runs/own-frontier"""
)
assert isinstance(load_run("runs/own-denoiser").denoiser, BagOfWords)
assert same_number(["3 + 4 = 7"], ["4 + 3 = 7"]).item() == 1

# %% [markdown]
# ## Texts with holes, and a BERT from your disk
#
# A row may be a template: `[MASK]` where something is to be filled in, and what fills it. All the rest is given.
#
# Any masked model of transformers is a denoiser, read with its own tokeniser. Here one with random weights is saved;
# yours is a folder like it, or a name on the hub. `train-denoiser` goes on training it on these rows.

# %%
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
words = [*map(str.lower, NAMES), "has", "pens", "cups", "in", "all", "and", ",", ".", *map(str, range(1, 10))]
Path("vocab.txt").write_text("\n".join(special + words), encoding="utf-8")
tokenizer = BertTokenizerFast("vocab.txt")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained("bert")
tokenizer.save_pretrained("bert")

TEMPLATE = "{} has [MASK] pens, [MASK] in all, and [MASK] cups, [MASK] in all."
pairs = [(rng.choice(NAMES), str(rng.randint(1, 9)), str(rng.randint(1, 9))) for _ in range(400)]
write_lines("holes.jsonl", [{"text": TEMPLATE.format(name), "fill": [a, a, b, b]} for name, a, b in pairs])

HOLES = "--data JsonLines --data.train holes.jsonl --data.template text --data.response fill"
orderppl(
    f"""train-denoiser {HOLES} --denoiser load_denoiser --denoiser.name_or_path bert
    --fit.updates 300 --fit.batch_size 64 --fit.lr 0.01 --fit.progress false --out runs/bert"""
)

# %% [markdown]
# Two holes have to hold the same number, and two others, too. In two steps, an order should open one hole of each pair,
# and then their partners. The learned plan finds that; no heuristic knows it, since all holes look alike.

# %%
orderppl(
    f"""fit-order {HOLES} --denoiser load_denoiser --denoiser.name_or_path runs/bert --num_steps 2
    --policy Plan --policy.network PositionTable --policy.network.noise 0.1 --guide PolicyGuide
    --fit.updates 80 --fit.lr 0.1 --fit.progress false --out runs/holes"""
)
orderppl("evaluate runs/holes")
orderppl('generate runs/holes --template "Tom has [MASK] pens, [MASK] in all, and [MASK] cups, [MASK] in all."')

# %% [markdown]
# `diagnose`, `report`, `frontier` and `share` take the same folder. What was shared is a folder of its own, with the
# denoiser in it, since nobody else has that one.

# %%
orderppl("share runs/holes --out my-order")
orderppl('generate my-order --template "Eve has 2 pens, [MASK] in all, and [MASK] cups, 7 in all."')

# %% [markdown]
# ## Sequences
#
# `Fasta` reads FASTA or a column of a CSV file, one token per letter. A protein model of transformers, loaded by
# `load_denoiser`, reads them too.

# %%
letters = "ACDEFGHIKLMNPQRSTVWY"
domains = ["".join(rng.choice(letters) for _ in range(12)) for _ in range(40)]
Path("domains.fasta").write_text("".join(f">domain-{i}\n{domain}\n" for i, domain in enumerate(domains)), "utf-8")
orderppl(
    """train-denoiser --data Fasta --data.train domains.fasta --denoiser.width 16 --denoiser.layers 1 --denoiser.heads 2
    --fit.updates 5 --fit.progress false --out runs/domains"""
)

# %% [markdown]
# ## The same in Python
#
# A data set has `splits(tokenizer)`, and a split its `batch`: tokens, `attention_mask` and `given`. `evaluate` makes
# one table, a pandas DataFrame with one row per arm, seed and example. `decode` takes a batch, or what a tokeniser
# returns, and fills every MASK of it.

# %%
denoiser = load_denoiser("runs/bert")
test = JsonLines("holes.jsonl", template="text", response="fill").splits(denoiser.tokenizer)["test"]
policy = load_run("runs/holes").policy
heuristics = sweep({"policy": "Ranked", "score": ["random", "top_prob", "entropy", "left_to_right"], "budgets": 2})
arms = [Arm("learned", policy, 2, mode=True, training_seed=0), *heuristics]
table = evaluate(arms, denoiser, test, progress=False)
found = summary(table).query("metric == 'path_nats'").set_index("arm").value.sort_values()
print(found.round(3))
assert found.index[0] == "learned"

holes = tokenizer(TEMPLATE.format("Sam"), return_tensors="pt", return_token_type_ids=False)
output = decode(denoiser, policy, holes, max_steps=2, mode=True)
print(tokenizer.decode(output.sequences[0]))
assert output.reveal_step[output.latent].tolist() in ([0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0])
