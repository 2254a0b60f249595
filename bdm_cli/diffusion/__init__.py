"""Diffusion: networks, data, sampling and losses. The only place that knows diffusers."""
