"""Write report.html into the folder of a run: one self-contained page about a pretraining, fine-tuning or evaluation.

This module chooses the page; `pretraining_report.py`, `finetuning_report.py`, `evaluation_report.py` and
`perturbation/report.py` make it.
"""

from pathlib import Path

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.perturbation.evaluation.results import RESULTS
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.reporting.evaluation_report import evaluation_report
from scgpt_hf.reporting.evaluation_results import SCORES
from scgpt_hf.reporting.finetuning_report import finetuning_report
from scgpt_hf.reporting.perturbation.report import perturbation_report
from scgpt_hf.reporting.pretraining_report import pretraining_report
from scgpt_hf.training.run_folder import METRICS, SUMMARY

REPORT = "report.html"


def write_report(run: str | Path) -> Path:
    """Write report.html into a folder and return its path.

    The page needs no other file and no network, so you can send it by mail.

    Args:
        run: the folder of a pretraining run (finished or in progress), of a fine-tuning run, or of an evaluation.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: the folder is none of these.
        ValueError: a file in the folder is malformed; the message names it.

    Example:
        >>> write_report("runs/demo")  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    run = Path(run)
    if (run / SCORES).is_file():
        text = evaluation_report(run)
    elif (run / RESULTS).is_file():
        text = perturbation_report(run)
    elif RunRecord.read(run / SUMMARY).get("task", str):
        text = finetuning_report(run)
    elif (run / METRICS).is_file() or (run / SUMMARY).is_file():
        text = pretraining_report(run)
    else:
        raise FileNotFoundError(
            f"nothing to report in {run}: found neither {METRICS} of a run nor {SCORES} of an evaluation; pass the "
            "folder of a run or of an evaluation"
        )
    write_atomically(run / REPORT, text)
    return run / REPORT
