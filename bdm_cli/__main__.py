"""`python -m bdm_cli`; several GPUs: `accelerate launch -m bdm_cli train ...`."""

from bdm_cli.cli import entry

if __name__ == "__main__":
    entry()
