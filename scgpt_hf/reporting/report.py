"""Writes report.html: one page that tells what a folder holds, for a pretraining run, a fine-tuning or an evaluation.

Which folder gets which page is decided here; the pages are made in `report_run.py`, `report_finetuning.py` and
`report_evaluation.py`.
"""

from pathlib import Path

from scgpt_hf.publishing.record import Record
from scgpt_hf.reporting.evaluation_files import SCORES
from scgpt_hf.reporting.report_evaluation import report_evaluation
from scgpt_hf.reporting.report_finetuning import report_finetuning
from scgpt_hf.reporting.report_run import report_run
from scgpt_hf.training.run_folder import METRICS, SUMMARY, write_whole

REPORT = "report.html"


def write_report(run: str | Path) -> Path:
    """Write report.html into a folder and return its path: self-contained, to be sent, opened anywhere, printed.

    Args:
        run: the folder of a pretraining run (finished or not), of a fine-tuning, or of an evaluation.

    Raises:
        FileNotFoundError: the folder is none of these.
        ValueError: a file of the folder is malformed; the message names it.
    """
    run = Path(run)
    if (run / SCORES).is_file():
        text = report_evaluation(run)
    elif Record(run / SUMMARY).get("task", str):
        text = report_finetuning(run)
    elif (run / METRICS).is_file() or (run / SUMMARY).is_file():
        text = report_run(run)
    else:
        raise FileNotFoundError(
            f"nothing to report in {run}: it has no {METRICS} of a run, nor {SCORES} of an evaluation; expected one "
            "that pretrain.py, finetune.py or evaluate.py wrote"
        )
    write_whole(run / REPORT, text)
    return run / REPORT
