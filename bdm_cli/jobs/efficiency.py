"""Model size and operations of the recipes' networks at given bits, beside the paper's numbers (Tables 2 and 5)."""

import csv
import re
from importlib.resources import files

import pandas as pd
import torch
from torch import nn

from bdm_cli import recipe as recipes
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError, unknown
from bdm_cli.metrics.cost import Bits, NetworkCost, model_size_mb, network_cost, operations, scales_mb
from bdm_cli.recipe import Recipe

EDGE_BITS = (8, 32)
PAPER_TABLES = ("5", "2")
GIGA = 1e9


def run(bits: str, model: str | None = None) -> pd.DataFrame:
    """One row for full precision and one per choice of edge bits, for `model` (a recipe's unet.name) or for all.

    bits: "W/A", weight and activation bits. Savings are against full precision. As in the papers, OPs leave out the
        attention products, and sizes the scales.
    Raises: BdmError for bits or a model that do not exist.
    """
    weight, activation = parse_bits(bits)
    known = models()
    if model is not None and model not in known:
        raise unknown("model", model, known, "a model is what a recipe's unet.name says")
    rows = []
    for name in sorted(known) if model is None else [model]:
        cost = unet_cost(known[name][0])
        paper = _paper({recipe.data.dataset for recipe in known[name]})
        choices = [Bits()]
        if (weight, activation) != (32, 32):
            choices += [Bits(weight, activation, edge) for edge in EDGE_BITS]
        rows += [_row(name, cost, choice, paper) for choice in choices]
    return pd.DataFrame(rows)


def parse_bits(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4). Raises: BdmError unless both are 1..8 or 32."""
    found = re.fullmatch(r"(\d{1,2})/(\d{1,2})", text.strip())
    bits = tuple(int(part) for part in found.groups()) if found else ()
    if not bits or not all(b == 32 or 1 <= b <= 8 for b in bits):
        raise BdmError(
            f"cannot read --bits '{text}'.\n"
            "  allowed: weight bits / activation bits, each 1..8, or 32 for full precision; e.g. --bits 1/4"
        )
    return bits


def models() -> dict[str, list[Recipe]]:
    """The networks of all recipes, by unet.name."""
    found: dict[str, list[Recipe]] = {}
    for name in recipes.names():
        recipe = recipes.load(name)
        found.setdefault(recipe.unet.name, []).append(recipe)
    return found


def unet_cost(recipe: Recipe) -> NetworkCost:
    """The recipe's U-Net, built without memory, and one forward of one image (or latent)."""
    with torch.device("meta"):
        unet = build_unet(recipe.unet)
        return network_cost(unet, meta_inputs(unet))


def meta_inputs(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Arguments of one forward with one image: size and channels from the network's own configuration."""
    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    found = {
        "sample": torch.empty(1, config.in_channels, size, size, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if hasattr(unet, "class_embedder"):
        found["classes"] = torch.zeros(1, dtype=torch.long, device="meta")
    elif getattr(config, "cross_attention_dim", None):
        found["encoder_hidden_states"] = torch.empty(1, 1, config.cross_attention_dim, device="meta")
    return found


def _row(name: str, cost: NetworkCost, bits: Bits, paper: dict[tuple[str, str], float]) -> dict[str, object]:
    text = f"{bits.weight}/{bits.activation}"
    size, count = model_size_mb(cost, bits), operations(cost, bits)
    return {
        "Model": name,
        "Bits": text,
        "Edges": bits.edge,
        "Size (MiB)": round(size, 2),
        "Scales (MiB)": round(scales_mb(cost, bits), 2),
        "BOPs (G)": round(count.bops / GIGA, 3),
        "FLOPs (G)": round(count.flops / GIGA, 3),
        "OPs (G)": round(count.ops / GIGA, 3),
        "Size saving": round(model_size_mb(cost, Bits()) / size, 1),
        "OPs saving": round(operations(cost, Bits()).ops / count.ops, 1),
        "Attention MACs (G)": round(cost.attention_macs / GIGA, 3),
        "Paper: Size (MB)": paper.get((text, "size_mb")),
        "Paper: OPs (G)": paper.get((text, "ops_g")),
    }


def _paper(datasets: set[str]) -> dict[tuple[str, str], float]:
    """The paper's numbers for networks of these data sets: (bits 'W/A', metric) -> value."""
    found: dict[tuple[str, str], float] = {}
    with (files("bdm_cli.paper") / "cells.csv").open() as file:
        for cell in csv.DictReader(file):
            dataset, _, rest = cell["recipe"].partition("-")
            match = re.match(r"w(\d+)a(\d+)", rest)
            text = f"{match[1]}/{match[2]}" if match else "32/32"
            if cell["table"] in PAPER_TABLES and cell["metric"] in ("size_mb", "ops_g") and dataset in datasets:
                found.setdefault((text, cell["metric"]), float(cell["value"]))
    return found
