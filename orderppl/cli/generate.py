"""Write behind prompts or fill holes with a learned order, and watch the text being revealed."""

from __future__ import annotations

from dataclasses import dataclass, field

from orderppl.cli.hints import any_class


@dataclass(frozen=True, kw_only=True)
class Config:
    r"""Write behind prompts or fill holes with a learned order, and watch the text being revealed.

        orderppl generate runs/gsm8k --template "Tom has 3 [MASK] and buys [MASK] more."
        orderppl generate OWNER/NAME --prompt "2 + 3 =" --length 16
        orderppl generate runs/mine --prompt "2 + 3 =" --prompt "7 * 6 =" --out answers.json
        orderppl generate my-order --denoiser load_denoiser --denoiser.name_or_path GSAI-ML/LLaDA-8B-Instruct \
            --trust_remote_code --prompt "2 + 3 ="
        orderppl generate --policy Threshold --denoiser load_denoiser --denoiser.name_or_path bert-base-uncased \
            --template "Paris is the [MASK] of [MASK]."           # no learned order at all

    Args:
        run: run folder, or folder or hub name of a shared order.
        prompt: what to write behind; may be given several times.
        template: text with holes, each [MASK] one token; may be given several times.
        length: of the responses to prompts, tokens; the longest of the training data when left out.
        steps: step budget; that of the run when left out.
        temperature: of the tokens; 0 takes the most likely.
        mode: play the most probable sets; false: draw them; as it was shared when left out.
        policy: another policy than the run's, or a wrapper of it, such as AtPrice.
        denoiser: another denoiser than the run's.
        seed: of everything random.
        trust_remote_code: run code that comes with the order or its denoiser.
        out: JSON file of the texts.
        device: such as cpu or cuda:0.
    """

    run: str | None = None
    prompt: list[str] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    mode: bool | None = None
    policy: any_class("orderppl.policies.Policy") | None = None  # type: ignore[valid-type]
    denoiser: any_class("orderppl.unmasking.Denoiser") | None = None  # type: ignore[valid-type]
    seed: int = 0
    trust_remote_code: bool = False
    out: str | None = None
    device: str = "cpu"
    POSITIONAL = "run"
    REPEATED = ("prompt", "template")


def run(config: Config) -> None:
    """Load the order, and decode one text after another."""
    from orderppl.cli.writing import write

    write(config)
