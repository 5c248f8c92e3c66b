"""Tiny random checkpoints in the formats of public masked models, remote code included."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from orderppl.models.denoisers.smdm import SmdmDenoiser

WORDS = [str(number) for number in range(21)] + [*"+-*/=#<>().,?|%", "<<", ">>", "####"]
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # of all masked models
VOCABULARY = len(SPECIAL + WORDS)

# ---- every architecture that transformers loads as a masked language model

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
}
_TEXT_AND_IMAGE = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    },
    "image_token_id": VOCABULARY - 1,
}
_XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2}
MASKED_LM: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bart": {"d_model": 16},
    "bert": {},
    "big_bird": {},
    "camembert": {},
    "convbert": {"embedding_size": 16},
    "data2vec-text": {},
    "deberta": {},
    "deberta-v2": {},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "esm": {
        "mask_token_id": SPECIAL.index("[MASK]"),
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
    },
    "esmc": {},
    "eurobert": {},
    "flaubert": _XLM,
    "fnet": {},
    "funnel": {
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 32,
        "num_hidden_layers": ...,  # left out
    },
    "gte": {},
    "ibert": {},
    "jina_embeddings_v3": {},
    "layoutlm": {},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "mbart": {"d_model": 16},
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"local_attention": 8, "reference_compile": False},
    "modernvbert": {
        "text_config": {"model_type": "modernbert", "vocab_size": VOCABULARY, **SIZES, "local_attention": 8},
        **_TEXT_AND_IMAGE,
    },
    "mpnet": {},
    "mra": {},
    "mvp": {"d_model": 16},
    "neomme": {"num_key_value_heads": 1, "embedding_rank": 8, "head_dim": 16},
    "nomic_bert": {},
    "nystromformer": {},
    "perceiver": {
        "d_model": 16,
        "d_latents": 16,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "is_decoder": False,
        "attention_head_size": 8,
        "feed_forward_size": 32,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "roformer": {},
    "squeezebert": {
        "embedding_size": 16,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    },
    "tapas": {},
    "ultrabert": {"sliding_window": 8},
    "ultravbert": {
        "text_config": {"model_type": "ultrabert", "vocab_size": VOCABULARY, **SIZES, "sliding_window": 8},
        **_TEXT_AND_IMAGE,
    },
    "xlm": _XLM,
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "yoso": {},
}
"""Kind -> settings of a tiny one, beside or instead of `SIZES`."""
KINDS = ("bert", "roberta", "distilbert", "modernbert", "esm", "smdm", "llada", "Dream")


def write_model(folder: Path, kind: str, **settings: Any) -> Path:
    """A checkpoint of a kind in `KINDS` or `MASKED_LM` with its tokeniser, in a new folder; fixed by the torch seed."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in MASKED_LM:
        names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
        write_tokenizer(folder, SPECIAL, frame=True, **names)
        chosen = {"vocab_size": VOCABULARY, **SIZES, **MASKED_LM[kind], **settings}
        config = AutoConfig.for_model(kind, **{key: value for key, value in chosen.items() if value is not ...})
        network = AutoModelForMaskedLM.from_config(config)
        loud(network)
        network.save_pretrained(folder)
    elif kind == "smdm":
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        size = write_tokenizer(folder, ["<unk>", "<s>", "</s>"], **names)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "intermediate_size": 24, "vocab_size": size} | settings
        denoiser = SmdmDenoiser(**sizes)
        loud(denoiser)
        denoiser.save_pretrained(folder)
    else:
        {"llada": write_llada, "Dream": write_dream}[kind](folder, **settings)
    return folder


def loud(network: nn.Module) -> None:
    """Make every weight count: at a usual initialisation attention is uniform and positions hardly matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def write_tokenizer(folder: Path, special: list[str], frame: bool = False, **names: str) -> int:
    """Words and numerals behind some special tokens, framed by the first and the third or not; the number of tokens."""
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    unknown = next((word for word in special if "unk" in word.lower()), special[0])
    raw = RawTokenizer(WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = Whitespace()
    if frame:
        ends = [(special[place], place) for place in (0, 2)]
        raw.post_processor = TemplateProcessing(single=f"{special[0]} $A {special[2]}", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return len(vocabulary)


def write_remote(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], code: dict[str, str]) -> None:
    """A checkpoint whose code lies beside its weights."""
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in code.items():
        (folder / f"{name}.py").write_text(dedent(text))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _linear(state: dict[str, torch.Tensor], name: str, out: int, size: int, bias: bool = False) -> None:
    state[f"{name}.weight"] = torch.randn(out, size) * size**-0.5
    if bias:
        state[f"{name}.bias"] = 0.1 * torch.randn(out)


# ---- LLaDA: no post_init, a `tie_weights` without arguments, `config.use_cache`, MASK known to the config alone

LLADA_CONFIG = """
    from transformers import PretrainedConfig

    class LLaDAConfig(PretrainedConfig):
        model_type = "llada"

        def __init__(self, d_model=16, n_heads=2, n_layers=2, embedding_size=64, weight_tying=False,
                     max_sequence_length=128, rope_theta=10000.0, reads_mask=False, flaw=None, **kwargs):
            self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
            self.embedding_size, self.weight_tying = embedding_size, weight_tying
            self.max_sequence_length, self.rope_theta = max_sequence_length, rope_theta
            self.reads_mask, self.flaw = reads_mask, flaw
            super().__init__(**kwargs)
"""
LLADA_MODEL = """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from .configuration_llada import LLaDAConfig

    def rotate(x, theta):
        size = x.shape[-1]
        rate = theta ** (-torch.arange(0, size, 2, device=x.device).float() / size)
        angle = torch.arange(x.shape[-2], device=x.device).float()[:, None] * rate
        angle = torch.cat([angle, angle], -1).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    class Block(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.att = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
            self.out = nn.Linear(config.d_model, config.d_model, bias=False)

        def forward(self, x, keys):
            n, s, w = x.shape
            q, k, v = self.att(x).view(n, s, 3, self.config.n_heads, -1).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, self.config.rope_theta), rotate(k, self.config.rope_theta)
            return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(-2))

    class LLaDAModel(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.transformer = nn.ModuleDict(dict(
                wte=nn.Embedding(config.embedding_size, config.d_model),
                blocks=nn.ModuleList([Block(config) for _ in range(config.n_layers)]),
                ln_f=nn.LayerNorm(config.d_model, bias=False),
            ))
            if not config.weight_tying:
                self.transformer.update(dict(ff_out=nn.Linear(config.d_model, config.embedding_size, bias=False)))

    class LLaDAModelLM(PreTrainedModel):
        config_class = LLaDAConfig
        base_model_prefix = "model"

        def __init__(self, config, model=None, init_params=False):
            super().__init__(config)
            self.model = LLaDAModel(config) if model is None else model
            self.flaw = torch.rand((), device="cpu").item() if config.flaw == "random" else 0.0

        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, use_cache=None,
                    output_hidden_states=None, return_dict=None):
            if use_cache is None:
                use_cache = self.config.use_cache
            assert not use_cache
            if self.config.flaw == "raises":
                raise NotImplementedError("cannot run\\nat all")
            hidden = self.model.transformer.wte(input_ids) + self.flaw
            keys = None
            if attention_mask is not None and self.config.reads_mask:
                keys = attention_mask.bool()[:, None, None]
            for block in self.model.transformer.blocks:
                hidden = block(hidden, keys)
            hidden = self.model.transformer.ln_f(hidden)
            logits = self.get_output_embeddings()(hidden)
            if self.config.flaw == "caps":
                logits = logits.tanh()
            return CausalLMOutputWithPast(logits=logits, hidden_states=(hidden,) if output_hidden_states else None)

        def get_input_embeddings(self):
            return self.model.transformer.wte

        def get_output_embeddings(self):
            return self.model.transformer.ff_out

        def tie_weights(self):
            if self.config.weight_tying:
                self.model.transformer.ff_out = self.model.transformer.wte
"""


def write_llada(folder: Path, **settings: Any) -> None:
    special = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
    names = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]}
    write_tokenizer(folder, special, **names)  # which does not know its mask token
    config = {
        "model_type": "llada",
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "mask_token_id": 2,
        "vocab_size": 64,
        "embedding_size": 64,
        **settings,
    }
    state: dict[str, torch.Tensor] = {}
    _linear(state, "model.transformer.wte", 64, 16)
    state["model.transformer.wte.weight"] *= 4
    for layer in range(2):
        _linear(state, f"model.transformer.blocks.{layer}.att", 48, 16)
        _linear(state, f"model.transformer.blocks.{layer}.out", 16, 16)
    state["model.transformer.ln_f.weight"] = torch.ones(16)
    _linear(state, "model.transformer.ff_out", 64, 16)
    write_remote(folder, config, state, {"configuration_llada": LLADA_CONFIG, "modeling_llada": LLADA_MODEL})


# ---- Dream: rotary frequencies in a buffer that is not stored, a list of tied weights, logits shifted by one

DREAM_CONFIG = """
    from transformers import PretrainedConfig

    class DreamConfig(PretrainedConfig):
        model_type = "Dream"

        def __init__(self, vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
                     max_position_embeddings=128, rope_theta=10000.0, rope_scaling=None, mask_token_id=2,
                     tie_word_embeddings=False, **kwargs):
            self.vocab_size, self.hidden_size = vocab_size, hidden_size
            self.num_attention_heads, self.num_hidden_layers = num_attention_heads, num_hidden_layers
            self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
            self.rope_scaling, self.mask_token_id = rope_scaling, mask_token_id
            super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
"""
DREAM_GENERATION = """
    from transformers import GenerationConfig

    class DreamGenerationConfig(GenerationConfig):
        def __init__(self, **kwargs):
            self.steps = kwargs.pop("steps", 512)
            super().__init__(**kwargs)
            self.validate(is_init=True)

        def validate(self, is_init=False):
            pass
"""
DREAM_MODEL = """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.modeling_utils import PreTrainedModel
    from .configuration_dream import DreamConfig
    from .generation_utils import DreamGenerationConfig

    class DreamRotaryEmbedding(nn.Module):
        def __init__(self, config, device=None):
            super().__init__()
            self.rope_type = "default" if config.rope_scaling is None else config.rope_scaling["rope_type"]
            self.config = config
            self.rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
            inv_freq, self.attention_scaling = self.rope_init_fn(self.config, device)
            self.register_buffer("inv_freq", inv_freq, persistent=False)
            self.original_inv_freq = self.inv_freq

        @torch.no_grad()
        def forward(self, x, position_ids):
            angle = position_ids[..., None].float() * self.inv_freq.float()
            angle = torch.cat([angle, angle], -1)[:, None]
            return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def rotate(x, cos, sin):
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    class DreamLayer(nn.Module):
        def __init__(self, config):
            super().__init__()
            w = config.hidden_size
            self.heads = config.num_attention_heads
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(w, w) for _ in range(3))
            self.o_proj = nn.Linear(w, w, bias=False)
            self.rotary_emb = DreamRotaryEmbedding(config)

        def forward(self, x, attention_mask, position_ids):
            n, s, w = x.shape
            q, k, v = (p(x).view(n, s, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            cos, sin = self.rotary_emb(v, position_ids)
            mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
            mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
            return x + self.o_proj(mixed.transpose(1, 2).flatten(-2))

    class DreamPreTrainedModel(PreTrainedModel):
        config_class = DreamConfig
        base_model_prefix = "model"

        def _init_weights(self, module):
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.data.normal_(mean=0.0, std=0.02)

        @classmethod
        def from_pretrained(cls, name, *args, **kwargs):
            loaded = super().from_pretrained(name, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.generation_config = DreamGenerationConfig(steps=8)
            return loaded

    class DreamBaseModel(DreamPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList([DreamLayer(config) for _ in range(config.num_hidden_layers)])
            self.norm = nn.LayerNorm(config.hidden_size, bias=False)
            self.post_init()

    class DreamModel(DreamPreTrainedModel):
        _tied_weights_keys = ["lm_head.weight"]

        def __init__(self, config):
            super().__init__(config)
            self.model = DreamBaseModel(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self):
            return self.model.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None,
                    output_hidden_states=None, return_dict=None):
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            hidden = self.model.embed_tokens(input_ids)
            for layer in self.model.layers:
                hidden = layer(hidden, attention_mask, position_ids)
            hidden = self.model.norm(hidden)
            return MaskedLMOutput(
                logits=self.lm_head(hidden), hidden_states=(hidden,) if output_hidden_states else None
            )
"""


def write_dream(folder: Path, **settings: Any) -> None:
    special = ["<|endoftext|>", "<|im_end|>", "<|mask|>"]
    write_tokenizer(folder, special, eos_token=special[0], pad_token=special[0], mask_token=special[2])
    config = {
        "model_type": "Dream",
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "vocab_size": 64,
        "hidden_size": 16,
        "mask_token_id": 2,
        "tie_word_embeddings": False,
        **settings,
    }
    state: dict[str, torch.Tensor] = {}
    _linear(state, "model.embed_tokens", 64, 16)
    state["model.embed_tokens.weight"] *= 4
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj"):
            _linear(state, f"model.layers.{layer}.{name}", 16, 16, bias=True)
        _linear(state, f"model.layers.{layer}.o_proj", 16, 16)
    state["model.norm.weight"] = torch.ones(16)
    if not config["tie_word_embeddings"]:
        _linear(state, "lm_head", 64, 16)
    code = {
        "configuration_dream": DREAM_CONFIG,
        "generation_utils": DREAM_GENERATION,
        "modeling_dream": DREAM_MODEL,
    }
    write_remote(folder, config, state, code)
