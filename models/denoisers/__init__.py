"""Denoisers: a small transformer, exact ones, pretrained models of molecules, and public masked language models."""

from orderppl.models.denoisers.antibody import AntibodyDenoiser
from orderppl.models.denoisers.loading import load_denoiser
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.own_output import OwnOutput
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.models.denoisers.reaction import ReactionDenoiser
from orderppl.models.denoisers.training import train_denoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser
from orderppl.models.denoisers.tree_field import TreeFieldDenoiser
from orderppl.models.denoisers.trigram import PhoneDenoiser

__all__ = [
    "AntibodyDenoiser",
    "MarkovChainDenoiser",
    "OwnOutput",
    "PhoneDenoiser",
    "PretrainedDenoiser",
    "ReactionDenoiser",
    "TransformerDenoiser",
    "TreeFieldDenoiser",
    "load_denoiser",
    "train_denoiser",
]
