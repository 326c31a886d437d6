"""`python -m serve.cli`."""

from serve.cli.main import main

main()
