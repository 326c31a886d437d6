"""Several servers as one fleet: which of them an adapter is at home on, and whom a request is best sent to.

The same code places requests on a server, in Ray's router and in the simulation. It knows no HTTP, engine or Ray: who
uses it says who lives, how much each has to do, and what time it is.
"""
