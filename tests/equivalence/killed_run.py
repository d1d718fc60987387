"""Run by test_kill_resume.py: compare a run that is killed twice, in different epochs, with one that is not killed."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from kill_resume import finish, remove_unresumable, require_same, start, traced, train_uninterrupted, warm_up

from scgpt_hf.training.fault_tolerance.checkpoints import newest_valid

BATCH, SAVE_EVERY = 8, 3


def kill_after(step: int, pause_s: float, flags: list[str], folder: Path) -> dict[str, int]:
    """Train and send SIGKILL some time after a step; return the last step done and the newest checkpoint's step."""
    remove_unresumable(folder)
    trace = folder.with_suffix(".trace")
    n_before = len(traced(trace, 0))
    children = start(1, flags, folder, trace)
    (child,) = children
    while not (lines := traced(trace, 0)[n_before:]) or json.loads(lines[-1])["step"] < step:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            finish(children)
            raise SystemExit(f"the session ended before step {step}")
        time.sleep(0.001)
    time.sleep(pause_s)
    os.kill(child, signal.SIGKILL)
    assert not finish(children), f"the session ended before it was killed at step {step}"
    return {"killed_after": json.loads(traced(trace, 0)[-1])["step"], "resumes_at": int(newest_valid(folder).name[11:])}


def main(census: str, scratch: Path, seed: int) -> None:
    flags = ["--data", census, "--per_device_train_batch_size", str(BATCH), "--save_steps", str(SAVE_EVERY)]
    flags += ["--min_gene_counts", "1", "--validation_fraction", "0.3", "--num_train_epochs", "2"]
    warm_up()
    expected = train_uninterrupted(flags, 1, scratch / "uninterrupted")
    n_steps = len(expected[0])
    epoch, chance, folder = n_steps // 2, random.Random(seed), scratch / "killed"
    kills = []
    for first, last in ((SAVE_EVERY + 1, epoch // 2), (epoch + 1, n_steps - 8)):
        kills.append(kill_after(chance.randint(first, last), chance.uniform(0, 0.03), flags, folder))
    assert finish(start(1, flags, folder, folder.with_suffix(".trace")))
    n_compared = require_same(folder, scratch / "uninterrupted", expected)
    weights = [newest_valid(scratch / name) / "model.safetensors" for name in ("uninterrupted", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    print(json.dumps({"steps": n_steps, "epoch": epoch, "compared": n_compared, "kills": kills}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
