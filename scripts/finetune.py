"""Launch `scgpt_hf.cli.finetune`; see `--help`."""

from scgpt_hf.cli.finetune import main

if __name__ == "__main__":
    main()
