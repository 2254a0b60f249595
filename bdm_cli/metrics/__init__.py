"""Scores of generated images, and the networks whose features they compare. Nothing here imports torch."""

from bdm_cli.registry import Entry

_MODULE = "bdm_cli.metrics"

METRICS: dict[str, str] = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "precision": "Prec.",
    "recall": "Recall",
    "kid": "KID",
}
"""Every metric and how it is printed; what each is under a protocol: PROTOCOLS."""

PROTOCOLS: dict[str, Entry] = {
    "adm": Entry("ADM", f"{_MODULE}.protocols:ADM", "openai/guided-diffusion, evaluations/evaluator.py"),
    "clean": Entry("clean-fid", f"{_MODULE}.protocols:CLEAN", "arXiv:2104.11222; GaParmar/clean-fid"),
    "torch-fidelity": Entry(
        "torch-fidelity", f"{_MODULE}.protocols:TORCH_FIDELITY", "toshas/torch-fidelity, its defaults"
    ),
}

FEATURES: dict[str, Entry] = {
    "digits": Entry("bdm's digits network", f"{_MODULE}.features:digits", "bdm features --dataset digits; shipped"),
    "cifar10": Entry(
        "bdm's CIFAR-10 network", f"{_MODULE}.features:cifar10", "bdm features --dataset cifar10; shipped"
    ),
    "inception": Entry(
        "Inception-v3", f"{_MODULE}.inception:InceptionFeatures", "torch-fidelity, the weights of ADM's graph"
    ),
}
