"""`bdm demo`: the paper in miniature: teacher, baseline, +EBB, +EBB+LRM on digits at W1A4, and the report."""

from pathlib import Path

import pandas as pd

from bdm_cli import output, places
from bdm_cli.jobs import ablate, report


def run(jobs: int = 0) -> tuple[pd.DataFrame, Path]:
    """The twin of Table 7 and the path of the HTML report."""
    output.say("bdm demo: four models of handwritten digits are made, sampled and scored; a few minutes on two cores")
    table = ablate.run("components", base="digits-w1a4", seeds=1, jobs=jobs, anew=True)
    output.say("seed 0 was measured here and now; the means take in the seeds that results/records/ holds already")
    report.run()
    return table, places.home() / "results" / "report.html"
