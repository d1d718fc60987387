"""Fault tolerance: what a training run survives, and how it resumes exactly.

What can happen, and what the run does:

- The process is killed (`kill -9`, out of memory, power loss): you lose the steps since the last checkpoint.
  Checkpoints are complete or absent, never partial, and survive a crash of the machine (`checkpoints`).
- SIGTERM, SIGUSR1 or SIGINT, as job schedulers and Ctrl-C send them: the run finishes its step, saves a checkpoint and
  stops. A second signal ends it at once (`signals`). The command line does this; in Python, pass a `StopSignal`.
- Cells cannot be read any more: the run saves a checkpoint and raises an error that names the cause.
- A loss or gradient is not finite: the step is skipped, and its cells are logged. After several such steps in a row the
  run stops; weights that are not finite are never saved (`nonfinite`).
- The disk is full: the run raises an error. The previous checkpoint is still valid.
- A checkpoint is damaged or incomplete: its hashes reveal it, and `--resume_from_checkpoint latest` uses the newest
  valid one (`checkpoints`). If somebody has edited it, the run raises an error before it loads anything (`resume`).
- The run resumes on another number of processes, or with another batch size: every cell of the epoch is still visited
  once. Dropout draws other random numbers; everything else continues (`scgpt_hf.cells.schedule.run`).
- One of several processes has a problem: all of them stop together, after the same step (`ranks`).

With the same hardware, libraries, number of processes and batch size, a resumed run is bitwise equal to one that was
never interrupted: weights, optimizer state, log lines. It works in five steps:

1. The plan of a run is a pure function of the cell ids, the seed and the batch size. So the position in the data is one
   number, the step; no loader state is saved.
2. Which genes are sampled and masked depends only on the seed, the epoch, the cell and the gene, not on the order in
   which threads tokenize.
3. A checkpoint holds the model, the optimizer, the learning rate schedule, the random state of each process (used for
   dropout) and the losses summed since the last log line. It is written to a staging folder, hashed, flushed to the
   disk and then renamed. With `save_in_background`, a thread does this, from a copy of the tensors in host memory that
   it makes before the next optimizer step (`background`, `host_copy`). The bytes are the same.
4. On resume, the hashes are verified, then the contents, then that the data and settings are those of the run: the same
   donors, genes, order, masks and token settings.
5. Checkpoints later than the one resumed from are renamed, so that the next resume does not choose one of them. A
   validation that was due when the run stopped is done before the first step.
"""
