"""Train a feature network: a classifier of labelled images, whose features then serve the metrics."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from bdm_cli import output
from bdm_cli.diffusion.data import labelled_images
from bdm_cli.metrics.features import FeatureNet, Shape, extract, trained

WIDTHS = {"digits": 64, "cifar10": 256}
STEPS = {"digits": 1000, "cifar10": 20_000}
THREADS = {"digits": 1}
"""CPU threads. A fixed number makes a CPU's result independent of its cores; for digits one is also the fastest."""
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
HELD_OUT = 0.2


def run(dataset: str, path: str, steps: int | None = None, seed: int = 0, out: Path | None = None) -> float:
    """Train on four fifths of the images, write the network, return the accuracy in percent on the other fifth.

    The fifth is the same for every seed. AdamW, one cycle of the learning rate, images shifted by up to one pixel.
    steps: None = enough for the data set (STEPS). out: the file to write; None = runs/features/<dataset>.safetensors,
        where evaluate.features = "cifar10" looks for it (the one of the digits lies in the package).
    Raises: BdmError if the images cannot be read or the file cannot be written.
    """
    images, labels = labelled_images(dataset, path)
    steps = STEPS[dataset] if steps is None else steps
    seen, unseen = train_test_split(np.arange(len(images)), test_size=HELD_OUT, random_state=0, stratify=labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_num_threads(THREADS.get(dataset, torch.get_num_threads()))
    n_classes = int(labels.max()) + 1
    network = FeatureNet(Shape(dataset, images.shape[3], images.shape[1], n_classes, WIDTHS[dataset])).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    with output.progress("feature network", steps, "steps") as advance:
        for _ in range(steps):
            batch = torch.from_numpy(seen)[torch.randint(len(seen), (BATCH,), generator=generator)].numpy()
            pixels = shifted(torch.from_numpy(images[batch]).permute(0, 3, 1, 2), generator)
            loss = F.cross_entropy(network(pixels.to(device)), torch.from_numpy(labels[batch]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1, f"loss {loss.item():.3f}")
    network.eval()
    answers = extract(network, images[unseen]).logits.argmax(1).numpy()
    accuracy = 100 * float((answers == labels[unseen]).mean())
    network.save(out or trained(dataset), accuracy=accuracy, seed=seed, steps=steps)
    return accuracy


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [N, C, H, W] moved by -1, 0 or 1 pixels along both axes, its border repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(images.dtype)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 3, 3, H, W]
    down, right = torch.randint(3, (2, n), generator=generator)
    return windows[torch.arange(n), :, down, right]
