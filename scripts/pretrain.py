"""Launch `scgpt_hf.cli.pretrain`; see `--help`."""

from scgpt_hf.cli.pretrain import main

if __name__ == "__main__":
    main()
