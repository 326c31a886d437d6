"""An honest load harness for any OpenAI-compatible server.

    settings > prompts > load (over wire) > watch > rounds > report

`rounds` decides what is run when, `load` runs one round, `watch` sees what the machine did meanwhile.
"""
