"""Turn denoisers of the format before version 0.2 into run folders, in place.

    python experiments/convert_denoisers.py docs/results/*/denoiser docs/results/gsm8k/run/*/denoiser

A folder with `denoiser.json` (arguments), `denoiser.safetensors` and perhaps `tokenizer.json` becomes one with
`config.yaml`, `run.json` and `weights.safetensors`, which `load_denoiser` reads. Delete this script once no such folder
is left.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError
from orderppl.files import load_weights
from orderppl.models.denoisers import SmdmDenoiser, TransformerDenoiser
from orderppl.runs import finish_run, start_run

OLD = ("denoiser.json", "denoiser.safetensors", "tokenizer.json", "stage.json", "config.yaml")


def convert(folder: Path) -> None:
    """Replace the files of one folder; others, such as tables, stay.

    Raises:
        UserError: it holds no such denoiser.
    """
    if not (folder / OLD[0]).is_file():
        raise UserError("folder", f"{folder} holds no {OLD[0]}", "give a folder that train-denoiser made before 0.2")
    arguments = json.loads((folder / OLD[0]).read_text(encoding="utf-8"))
    denoiser: SmdmDenoiser | TransformerDenoiser
    if arguments.pop("model_type", None) == "smdm":
        denoiser = SmdmDenoiser(**arguments)
    else:
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            assert content.pop("type") == "WordTokenizer"
            tokenizer = WordTokenizer(**content)
        assert (arguments.pop("mlp"), arguments.pop("tied")) == (None, True)  # as nobody set them
        denoiser = TransformerDenoiser(**{k: v for k, v in arguments.items() if v is not None}, tokenizer=tokenizer)
    load_weights(denoiser, folder / OLD[1])
    parts = {"denoiser": denoiser, "data": None, "fit": None}
    new = folder.with_name(f"{folder.name}.new")
    start_run(new, "denoiser", parts)
    finish_run(new, parts)
    for name in OLD:
        (folder / name).unlink(missing_ok=True)
    for file in new.iterdir():
        shutil.move(file, folder / file.name)
    new.rmdir()


def main() -> None:
    """Convert the folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        convert(folder)
        print(f"{folder}: converted")


if __name__ == "__main__":
    main()
