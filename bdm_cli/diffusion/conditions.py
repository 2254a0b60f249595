"""What a conditional network is told beside x_t and t: nothing, a class, or a text."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bdm_cli import output, pretrained
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

REMEMBERED = 256
"""Texts whose hidden states are kept."""


class Condition:
    """The condition of an unconditional network: none. Conditional ones override all of it.

    Each method returns the positional arguments of the U-Net's forward after (x, t), one row per image.
    """

    def of_training(self, known: Sequence | np.ndarray | None, dropped: Tensor) -> tuple[Tensor, ...]:
        """Of training images. known: their labels or captions; dropped: bool [N], whose condition is hidden."""
        return ()

    def of_images(self, indices: range, seed: int) -> tuple[Tensor, ...]:
        """Of the images to draw; a function of (seed, index)."""
        return ()

    def none(self, n: int) -> tuple[Tensor, ...]:
        """The empty condition of classifier-free guidance, n times."""
        return ()

    def labels(self, indices: range, seed: int) -> np.ndarray | None:
        """Class of each drawn image, int64 [N], where there are classes."""
        return None


class Classes(Condition):
    """Class ids int64 [N]; the last of n_classes stands for "no class".

    Drawn images get every chosen class once per block of as many images, in a shuffled order: equal shares, no runs of
    one class (ADM's Inception Score takes the file in order), and independent of how many images are drawn.
    """

    def __init__(self, n_classes: int, chosen: Sequence[int] = ()) -> None:
        self.unconditional = n_classes - 1
        self.chosen = np.array(chosen or range(self.unconditional), dtype=np.int64)

    def of_training(self, known: np.ndarray, dropped: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(dropped, self.unconditional, torch.from_numpy(np.asarray(known, dtype=np.int64))),)

    def of_images(self, indices: range, seed: int) -> tuple[Tensor, ...]:
        return (torch.from_numpy(self.labels(indices, seed)),)

    def none(self, n: int) -> tuple[Tensor, ...]:
        return (torch.full((n,), self.unconditional),)

    def labels(self, indices: range, seed: int) -> np.ndarray:
        return self.chosen[dealt(len(self.chosen), indices, seed)]


class Text(Condition):
    """A text encoder's hidden states [N, L, D]; the empty text is the empty condition. Drawn images share the prompts.

    The encoder is the pretrained folder's own (tokenizer/, text_encoder/, read by `transformers`). Without one every
    text is one row of zeros.
    """

    def __init__(
        self, folder: Path | None, width: int, prompts: Sequence[str] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.width, self.prompts = width, list(prompts) or [""]
        self.known: collections.OrderedDict[str, Tensor] = collections.OrderedDict()
        self.tokenizer = self.encoder = None
        if folder is not None and (folder / "text_encoder").is_dir():
            self.tokenizer, self.encoder = _text_encoder(folder)
            self.encoder.to(device)
            if self.encoder.config.hidden_size != width:
                raise BdmError(
                    f"the text encoder in {folder} gives rows of {self.encoder.config.hidden_size} numbers, the "
                    f"network takes {width}.\n  use the encoder that the network was trained with"
                )
        elif self.prompts != [""]:
            raise BdmError(
                "sample.prompts: there is no text encoder to read them (text_encoder/ and tokenizer/ in the folder of "
                "model.pretrained).\n  leave sample.prompts out, or use a whole pipeline's folder"
            )

    @torch.no_grad()
    def encoded(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Hidden states of the texts; those of the last REMEMBERED distinct ones are not computed again."""
        if self.encoder is None:
            return (torch.zeros(len(texts), 1, self.width),)
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            longest = self.tokenizer.model_max_length
            tokens = self.tokenizer(
                new, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
            ).to(self.encoder.device)
            self.known |= zip(new, self.encoder(tokens.input_ids).last_hidden_state, strict=True)
        found = torch.stack([self.known[text] for text in texts])
        while len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return (found,)

    def of_training(self, known: Sequence[str] | None, dropped: Tensor) -> tuple[Tensor, ...]:
        texts = [""] * len(dropped) if known is None else known
        return self.encoded(["" if hidden else text for text, hidden in zip(texts, dropped.tolist(), strict=True)])

    def of_images(self, indices: range, seed: int) -> tuple[Tensor, ...]:
        return self.encoded([self.prompts[i] for i in dealt(len(self.prompts), indices, seed)])

    def none(self, n: int) -> tuple[Tensor, ...]:
        return self.encoded([""] * n)


def dealt(choices: int, indices: range, seed: int) -> np.ndarray:
    """Which of `choices` each image gets: block after block of all of them, each block in an order of its own."""
    order = {b: np.random.default_rng([seed, 1, b]).permutation(choices) for b in {i // choices for i in indices}}
    return np.array([order[i // choices][i % choices] for i in indices], dtype=np.int64)


def of_recipe(spec: Recipe, device: torch.device | str = "cpu") -> Condition:
    """The condition of a recipe's network; a text encoder runs on `device`. Raises: BdmError if that cannot be read."""
    if spec.unet.condition == "classes":
        return Classes(spec.unet.n_classes, spec.sample.classes)
    if spec.unet.condition == "text":
        source = spec.model.pretrained
        folder = pretrained.folder(source) if pretrained.is_folder(source) else None
        found = Text(folder, spec.unet.arguments["cross_attention_dim"], spec.sample.prompts, device)
        if found.encoder is None:
            output.say(f"{spec.name}: no text encoder beside the network; every text is a row of zeros")
        return found
    return Condition()


def _text_encoder(folder: Path) -> tuple[object, torch.nn.Module]:
    try:
        import transformers
    except ImportError:
        raise BdmError(
            f"{folder} has a text encoder, which needs the package transformers.\n  pip install 'bdm-cli[text]'"
        ) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        name = transformers.AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True).architectures[0]
        encoder, info = getattr(transformers, name).from_pretrained(
            folder / "text_encoder", local_files_only=True, output_loading_info=True
        )
        invented = [*info["missing_keys"], *info["mismatched_keys"]]
        if invented:
            raise ValueError(f"{len(invented)} tensors missing or misshapen: {min(map(str, invented))} ...")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise BdmError(f"cannot read the text encoder in {folder} ({reason}).\n  copy the folder again") from None
    return tokenizer, encoder.eval().requires_grad_(False)
