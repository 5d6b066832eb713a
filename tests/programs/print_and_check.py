"""Prints a line as a command does, and checks that it was written."""

from wavelet_jax.commands import cli, terminal


def main() -> None:
    print("all there is")
    terminal.check()


cli.run(main)
