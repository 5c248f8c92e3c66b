"""Denoisers: a small transformer, an exact Markov chain, an exact field on a tree, a pretrained antibody model."""

from orderppl.models.denoisers.antibody import AntibodyDenoiser
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.training import MaskedDiffusionLoss, masked_diffusion_nelbo, train_denoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser
from orderppl.models.denoisers.tree_field import TreeFieldDenoiser

ExactDenoiser = MarkovChainDenoiser | TreeFieldDenoiser
"""Those that know their log evidence and the best fixed order."""

__all__ = [
    "AntibodyDenoiser",
    "ExactDenoiser",
    "MarkovChainDenoiser",
    "MaskedDiffusionLoss",
    "TransformerDenoiser",
    "TreeFieldDenoiser",
    "masked_diffusion_nelbo",
    "train_denoiser",
]
