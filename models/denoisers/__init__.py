"""Denoisers: a small transformer, exact ones, pretrained models of molecules, and public masked language models."""

from orderppl.models.denoisers.antibody import AntibodyDenoiser
from orderppl.models.denoisers.chain_orders import GapPolicy
from orderppl.models.denoisers.loading import load_denoiser
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.models.denoisers.reaction import ReactionDenoiser
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.models.denoisers.training import (
    DenoiserSettings,
    MaskedDiffusionLoss,
    masked_diffusion_nelbo,
    train_denoiser,
)
from orderppl.models.denoisers.transformer import TransformerDenoiser
from orderppl.models.denoisers.tree_field import TreeFieldDenoiser

__all__ = [
    "AntibodyDenoiser",
    "DenoiserSettings",
    "GapPolicy",
    "MarkovChainDenoiser",
    "MaskedDiffusionLoss",
    "PretrainedDenoiser",
    "ReactionDenoiser",
    "SmdmDenoiser",
    "TransformerDenoiser",
    "TreeFieldDenoiser",
    "load_denoiser",
    "masked_diffusion_nelbo",
    "train_denoiser",
]
