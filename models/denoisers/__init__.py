"""Denoisers: a small transformer, exact ones, pretrained models of molecules, and public masked language models."""

from orderppl.models.denoisers.antibody import AntibodyDenoiser
from orderppl.models.denoisers.loading import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    TRAINED,
    denoiser_tokenizer,
    load_denoiser,
    load_trained,
    trained_tokenizer,
)
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.pretrained import PretrainedDenoiser, SplitPretrainedDenoiser
from orderppl.models.denoisers.reaction import ReactionDenoiser, reaction_vocabulary
from orderppl.models.denoisers.smdm import SmdmConfig, SmdmDenoiser
from orderppl.models.denoisers.training import MaskedDiffusionLoss, masked_diffusion_nelbo, train_denoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser
from orderppl.models.denoisers.tree_field import TreeFieldDenoiser

ExactDenoiser = MarkovChainDenoiser | TreeFieldDenoiser
"""Those that know their log evidence and the best fixed order."""

__all__ = [
    "TOKENIZER_FILE",
    "TOKENIZER_FOLDER",
    "TRAINED",
    "AntibodyDenoiser",
    "ExactDenoiser",
    "MarkovChainDenoiser",
    "MaskedDiffusionLoss",
    "PretrainedDenoiser",
    "ReactionDenoiser",
    "SmdmConfig",
    "SmdmDenoiser",
    "SplitPretrainedDenoiser",
    "TransformerDenoiser",
    "TreeFieldDenoiser",
    "denoiser_tokenizer",
    "load_denoiser",
    "load_trained",
    "masked_diffusion_nelbo",
    "reaction_vocabulary",
    "train_denoiser",
    "trained_tokenizer",
]
