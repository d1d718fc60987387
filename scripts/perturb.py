"""Launch `scgpt_hf.cli.perturbation.perturb`; see `--help`."""

from scgpt_hf.cli.perturbation.perturb import main

if __name__ == "__main__":
    main()
