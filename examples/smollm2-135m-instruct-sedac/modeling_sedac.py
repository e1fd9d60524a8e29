"""Lets transformers load this artefact without importing sedac_hf first."""

from sedac_hf import SedacConfig, SedacForCausalLM  # noqa: F401
