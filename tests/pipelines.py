"""Diffusers folders of networks that no paper has seen, with random weights, and recipes that are trained from them."""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
"""Of pixels: the digits'."""

CONTEXT = 24
TEXT_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
"""Of latents: VAE's."""

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}

TRAINING = """
[method]
name = "binarydm"
activation_bits = 4
ebb_scope = 1
lrm_k = 4

[train]
steps = 3
batch = 4
lr = 1e-4
threads = 1

[sample]
steps = 2
n_images = 6
batch = 3
to_bytes = "round"

[evaluate]
features = "digits"
"""


def unet(kind: str = "UNet2DModel", **changes: object) -> nn.Module:
    """A fresh network. Its zero-initialized layers are given values, so that everything in it matters."""
    torch.manual_seed(0)
    network = getattr(diffusers, kind)(**({"UNet2DModel": UNET}.get(kind, TEXT_UNET) | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return network.eval()


def pixel_pipeline(folder: Path, network: nn.Module | None = None, scheduler: object | None = None) -> nn.Module:
    """Writes unet/ and scheduler/ of a DDPM on digits; returns the network."""
    network = network or unet()
    network.save_pretrained(folder / "unet")
    (scheduler or diffusers.DDPMScheduler(beta_end=0.03)).save_pretrained(folder / "scheduler")
    return network


def text_pipeline(folder: Path, network: nn.Module | None = None) -> nn.Module:
    """Writes unet/, vae/ and scheduler/ of a text-to-image model, without its text encoder; returns the U-Net."""
    network = network or unet("UNet2DConditionModel")
    network.save_pretrained(folder / "unet")
    torch.manual_seed(1)
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    return network


def text_encoder(folder: Path, width: int = CONTEXT) -> None:
    """Writes tokenizer/ and text_encoder/ (CLIP, one token per character). Needs transformers."""
    import transformers

    characters = [chr(c) for c in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "tokenizer" / "vocab.json"
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    merges = str(folder / "tokenizer" / "merges.txt")
    transformers.CLIPTokenizer(str(vocabulary), merges, model_max_length=16).save_pretrained(folder / "tokenizer")
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def captioned_images(folder: Path, n: int = 12) -> list[str]:
    """Writes n PNGs of 20x18 with <name>.txt beside them; returns their captions, in the order of the names."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    captions = [f"picture {i} of {n}" for i in range(n)]
    for i, caption in enumerate(captions):
        Image.fromarray(random.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption)
    return captions


def pixel_recipe(file: Path, pretrained: str | Path, further: str = "") -> str:
    """Writes a recipe on digits without a network of its own; returns its path."""
    data = '[data]\ndataset = "digits"\nimage_size = 16\nchannels = 1\n'
    return _written(file, data, pretrained, further)


def text_recipe(file: Path, pretrained: str | Path, images: str | Path, further: str = "") -> str:
    """As pixel_recipe, on a folder of images."""
    data = (
        f'[data]\ndataset = "folder"\npath = "{images}"\nimage_size = 16\nchannels = 3\nprepare = "square-bicubic"\n'
        f'latents = "{file.stem}-latents"\n'
    )
    return _written(file, data, pretrained, further)


def _written(file: Path, data: str, pretrained: str | Path, further: str) -> str:
    model = f'summary = "tests: a model of one\'s own"\n{data}\n[model]\npretrained = "{pretrained}"\n'
    file.write_text(model + TRAINING + further)
    return str(file)
