"""`python -m serve.cli`."""

from serve.cli.entry import main

main()
