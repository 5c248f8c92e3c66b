"""Models whose code comes with their weights, under a transformers that has moved on since it was written.

Nothing here runs before the user has agreed to remote code.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.errors import UserError, first_line, is_out_of_memory

AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM")


def load_remote(
    folder: Path, auto_map: dict[str, str], dtype: torch.dtype, places: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load a model by its own code.

    Args:
        folder: of its files.
        auto_map: class names by what they are for, as in its config.json.
        dtype: of the parameters.
        places: further options of `from_pretrained`, which say where the parts go.

    Returns:
        The model, and what was missing in its files.

    Raises:
        UserError: it names no class that could be loaded, or its code does not run.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = next((auto_map[kind] for kind in AUTO_CLASSES if kind in auto_map), None)
    if name is None or "AutoConfig" not in auto_map:
        problem = f"the auto_map of {folder} names no AutoConfig with one of {', '.join(AUTO_CLASSES)}"
        raise UserError("denoiser", problem, "give a model of the kinds that the documentation lists")
    try:
        config_class: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], str(folder))
        network_class: Any = get_class_from_dynamic_module(name, str(folder))
        with _as_expected(network_class):
            config = config_class.from_pretrained(str(folder))
            if not hasattr(config, "use_cache"):  # read by forward methods, no longer set by the base class
                config.use_cache = False
            network, info = network_class.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the second result
                **places,
            )
            if getattr(config, "tie_word_embeddings", False) and hasattr(network, "tied_by_hand"):
                network.get_output_embeddings().weight = network.get_input_embeddings().weight
                info["missing_keys"] = set(info["missing_keys"]) - set(network.tied_by_hand)
            recompute_buffers(network)
    except UserError:
        raise
    except Exception as error:  # anything may happen in foreign code
        if is_out_of_memory(error):
            raise
        import transformers

        reason = first_line(error)
        problem = f"the code of {folder} fails under transformers {transformers.__version__} ({reason})"
        raise UserError("denoiser", problem, "use the transformers_version of its config.json") from error
    return network, info


@contextmanager
def _as_expected(network_class: Any) -> Iterator[None]:
    """Give code of transformers 4 what it expects; what is not of its own classes is put back afterwards."""
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not hasattr(network_class, "all_tied_weights_keys"):  # set by a post_init that not every class calls
        network_class.all_tied_weights_keys = {}
    if isinstance(getattr(network_class, "_tied_weights_keys", None), list):  # what transformers 5 wants is a dict
        network_class.tied_by_hand, network_class._tied_weights_keys = network_class._tied_weights_keys, None
    _tolerate(network_class, "tie_weights")
    package = network_class.__module__.rpartition(".")[0]
    for kind in GenerationConfig.__subclasses__():
        if kind.__module__.startswith(package):
            _tolerate(kind, "validate")
    # All weights are in the files, or the model is refused; transformers 5.0 lets such a method write over loaded ones.
    own = [kind for kind in _heirs(PreTrainedModel) if kind.__module__.startswith(package)]
    initialise = {kind: vars(kind)["_init_weights"] for kind in own if "_init_weights" in vars(kind)}
    for kind in initialise:
        kind._init_weights = lambda self, module: None
    known = dict(ROPE_INIT_FUNCTIONS)
    ROPE_INIT_FUNCTIONS.setdefault("default", _default_rope)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of old names in its configuration
            yield
    finally:
        ROPE_INIT_FUNCTIONS.clear()
        ROPE_INIT_FUNCTIONS.update(known)
        for kind, method in initialise.items():
            kind._init_weights = method


def _heirs(kind: Any) -> list[Any]:
    """All classes derived from one."""
    return [heir for child in kind.__subclasses__() for heir in (child, *_heirs(child))]


def _tolerate(kind: Any, name: str) -> None:
    """Let a method ignore the arguments that its caller has learnt since; only if the class itself defines it."""
    method = vars(kind).get(name)
    if method is None or any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values()):
        return
    known = set(inspect.signature(method).parameters)

    def tolerant(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **{key: value for key, value in kwargs.items() if key in known})

    setattr(kind, name, tolerant)


def _default_rope(config: Any, device: Any = None, seq_len: int | None = None, **options: Any) -> tuple[Tensor, float]:
    """Inverse frequencies of plain rotary embeddings, float [size / 2], and the factor 1 on attention."""
    parameters = getattr(config, "rope_parameters", None) or {}
    base = options.get("base") or parameters.get("rope_theta") or config.rope_theta
    size = options.get("dim") or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / base ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size), 1.0


def recompute_buffers(network: nn.Module) -> None:
    """Set buffers that are not stored, such as rotary frequencies, to what the constructor of the model computes.

    Loading makes the model without memory and then gives such buffers memory, but no values.
    """
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with init_empty_weights(include_buffers=False):
            fresh = type(network)(network.config)
    finally:
        torch.set_default_dtype(before)
    modules = dict(network.named_modules())
    for path, module in fresh.named_modules():
        for name in module._non_persistent_buffers_set:
            value = getattr(module, name)
            if value is not None:
                old = getattr(modules[path], name)
                modules[path].register_buffer(name, value.to(old.device), persistent=False)
                if hasattr(module, f"original_{name}"):  # dynamic rotary embeddings return to it
                    setattr(modules[path], f"original_{name}", getattr(modules[path], name))


def check_loads_alike(first: Tensor, second: Tensor, source: str) -> None:
    """Refuse a model that two loads of the same files give different logits, float [N, S, V].

    Raises:
        UserError: they differ, or are not finite.
    """
    if torch.equal(first, second) and bool(first.isfinite().all()):
        return
    largest = (first - second).abs().max().item()
    problem = f"two loads of {source} give different logits (by up to {largest:.2g}): something in it is uninitialised"
    raise UserError("denoiser", problem, "use the transformers_version of its config.json")
