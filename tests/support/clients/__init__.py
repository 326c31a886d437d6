"""Client libraries of others, each in an environment of its own: what tests/campaigns/clients.py has them ask."""
