"""The `loradock` command, a module for each group of commands.

Commands may use anything, and nothing imports them. No rules live here: a command checks, calls, and prints.
"""
