"""Train a feature network: a classifier of labelled images, whose features then serve the metrics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from bdm_cli import output, runs
from bdm_cli.diffusion.data import labelled_images
from bdm_cli.metrics.extraction import BATCH, extract
from bdm_cli.metrics.features import FeatureNet, Shape


@dataclass(frozen=True)
class Budget:
    """A feature network and its training: AdamW, one cycle of the learning rate.

    shift: images are moved by up to so many pixels; flip: and mirrored, every other time. smoothing: of the labels.
    threads: CPU threads; a fixed number makes a CPU's result independent of its cores (for digits one is also the
    fastest), 0 leaves torch's.
    """

    width: int
    body: str
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    shift: int
    flip: bool
    smoothing: float
    threads: int


BUDGETS = {
    "digits": Budget(64, "plain", 1000, 128, 2e-3, 1e-2, 1, flip=False, smoothing=0.0, threads=1),
    "cifar10": Budget(192, "residual", 3200, 256, 5e-3, 5e-2, 4, flip=True, smoothing=0.1, threads=0),
}
HELD_OUT = 0.2


def run(dataset: str, path: str, steps: int | None = None, seed: int = 0, out: Path | None = None) -> float:
    """Train on four fifths of the images, write the network, return the accuracy in percent on the other fifth.

    The fifth is the same for every seed. steps: None = enough for the data set. out: the file to write; None =
        runs/features/<dataset>.safetensors. Those that evaluate.features names lie in the package.
    Raises: BdmError if the images cannot be read or the file cannot be written.
    """
    images, labels = labelled_images(dataset, path)
    budget = BUDGETS[dataset]
    steps = budget.steps if steps is None else steps
    seen, unseen = train_test_split(np.arange(len(images)), test_size=HELD_OUT, random_state=0, stratify=labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_num_threads(budget.threads or torch.get_num_threads())
    shape = Shape(dataset, images.shape[3], images.shape[1], int(labels.max()) + 1, budget.width, budget.body)
    network = FeatureNet(shape).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=budget.learning_rate, weight_decay=budget.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, budget.learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    with output.progress("feature network", steps, "steps") as advance:
        for _ in range(steps):
            batch = torch.from_numpy(seen)[torch.randint(len(seen), (budget.batch,), generator=generator)].numpy()
            pixels = shifted(torch.from_numpy(images[batch]).permute(0, 3, 1, 2), generator, budget.shift)
            if budget.flip:
                mirrored = torch.rand(len(pixels), generator=generator) < 0.5
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
            logits, wanted = network(pixels.to(device)), torch.from_numpy(labels[batch]).to(device)
            loss = F.cross_entropy(logits, wanted, label_smoothing=budget.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1, f"loss {loss.item():.3f}")
    network.eval()
    accuracy = 100 * float((answers(network, images[unseen]) == labels[unseen]).mean())
    path = out or runs.runs_dir() / "features" / f"{dataset}.safetensors"
    network.save(path, accuracy=accuracy, seed=seed, steps=steps)
    return accuracy


def answers(network: FeatureNet, images: np.ndarray) -> np.ndarray:
    """The class that the network takes each image for."""
    device = next(network.parameters()).device
    parts = extract(network, images, range(len(images)), BATCH, device)
    return torch.cat([part["logits"].argmax(1).cpu() for part in parts]).numpy()


def shifted(images: Tensor, generator: torch.Generator, by: int = 1) -> Tensor:
    """Each image [N, C, H, W] moved by -by ... by pixels along both axes, its border repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (by, by, by, by), mode="replicate").to(images.dtype)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2 by + 1, 2 by + 1, H, W]
    down, right = torch.randint(2 * by + 1, (2, n), generator=generator)
    return windows[torch.arange(n), :, down, right]
