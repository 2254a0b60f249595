"""Scores of generated images, and the networks whose features they compare. Nothing here imports torch.

Every metric is a function (samples: Summary, reference: Summary) -> float.
"""

from bdm_cli.registry import Entry

_MODULE = "bdm_cli.metrics"

METRICS: dict[str, Entry] = {
    "fid": Entry("FID", f"{_MODULE}.frechet:fid", "arXiv:1706.08500, Eq. 6; ADM evaluations/evaluator.py"),
    "sfid": Entry("sFID", f"{_MODULE}.frechet:sfid", "arXiv:2103.03841; ADM evaluations/evaluator.py"),
    "is": Entry("IS", f"{_MODULE}.inception_score:inception_score", "arXiv:1606.03498; ADM evaluations/evaluator.py"),
    "precision": Entry("Prec.", f"{_MODULE}.precision_recall:precision", "arXiv:1904.06991, Eq. 2"),
    "recall": Entry("Recall", f"{_MODULE}.precision_recall:recall", "arXiv:1904.06991, Eq. 2"),
}

FEATURES: dict[str, Entry] = {
    "digits": Entry("digits network", f"{_MODULE}.features:digits", "bdm features --dataset digits; in the package"),
    "cifar10": Entry("CIFAR-10 network", f"{_MODULE}.features:cifar10", "bdm features --dataset cifar10"),
    "inception": Entry("Inception-v3", f"{_MODULE}.features:inception", "torch-fidelity, the weights of ADM's graph"),
}
