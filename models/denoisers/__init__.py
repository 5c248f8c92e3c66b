"""Denoisers: a small transformer, an exact Markov chain, a pretrained antibody model."""

from orderppl.models.denoisers.antibody import AntibodyDenoiser
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.training import MaskedDiffusionLoss, masked_diffusion_nelbo, train_denoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser

__all__ = [
    "AntibodyDenoiser",
    "MarkovChainDenoiser",
    "MaskedDiffusionLoss",
    "TransformerDenoiser",
    "masked_diffusion_nelbo",
    "train_denoiser",
]
